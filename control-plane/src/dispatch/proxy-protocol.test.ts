import assert from "node:assert/strict";
import { once } from "node:events";
import { connect as connectTcp } from "node:net";
import { after, before, describe, test } from "node:test";
import { connect as connectTls } from "node:tls";
import fc from "fast-check";
import { TrustedProxies } from "../rpc/trusted-proxies.ts";
import { ProxyHeaderError, readProxyHeader } from "./proxy-protocol.ts";
import { eventually } from "./scripted-agent.ts";
import { type NodeIdentity, type Replica, TestFleet } from "./test-fleet.ts";

/** A header of version 2. */
function binary(versionAndCommand: number, family: number, addresses: Buffer, extra: Buffer = Buffer.alloc(0)): Buffer {
  const fixed = Buffer.from("\r\n\r\n\0\r\nQUIT\n\0\0\0\0", "latin1");
  fixed.writeUInt8(versionAndCommand, 12);
  fixed.writeUInt8(family, 13);
  fixed.writeUInt16BE(addresses.length + extra.length, 14);
  return Buffer.concat([fixed, addresses, extra]);
}

const ipv4 = Buffer.from([198, 51, 100, 1, 10, 0, 0, 1, 0x12, 0x34, 0x20, 0xfb]);
const ipv6 = Buffer.from(`20010db8${"0".repeat(22)}01${"0".repeat(30)}0212345678`, "hex");
const text = (line: string): Buffer => Buffer.from(`${line}\r\n`, "latin1");

const headers: Readonly<Record<string, readonly [header: Buffer, address: string | undefined]>> = {
  "version 1, IPv4": [text("PROXY TCP4 198.51.100.1 10.0.0.1 4660 8443"), "198.51.100.1"],
  "version 1, IPv6": [text("PROXY TCP6 2001:db8::1 ::1 65535 0"), "2001:db8::1"],
  "version 1, unknown": [text("PROXY UNKNOWN"), undefined],
  "version 1, unknown, with more": [text("PROXY UNKNOWN ffff::1 ffff::2 1 2"), undefined],
  "version 2, IPv4": [binary(0x21, 0x11, ipv4), "198.51.100.1"],
  "version 2, IPv4, with more": [binary(0x21, 0x11, ipv4, Buffer.from([4, 0, 1, 0])), "198.51.100.1"],
  "version 2, IPv6": [binary(0x21, 0x21, ipv6), "2001:0db8:0000:0000:0000:0000:0000:0001"],
  "version 2, local": [binary(0x20, 0x00, Buffer.alloc(0)), undefined],
  "version 2, unspecified": [binary(0x21, 0x00, Buffer.alloc(0)), undefined],
};

describe("a PROXY header", () => {
  for (const [what, [header, address]] of Object.entries(headers)) {
    test(`${what}: is read as soon as it is whole, in whatever pieces it comes, and takes nothing that follows`, () => {
      for (let length = 1; length < header.length; length += 1) {
        assert.equal(readProxyHeader(header.subarray(0, length)), undefined, `after ${length} bytes`);
      }
      const followed = Buffer.concat([header, Buffer.from("\x16\x03\x01", "latin1")]);
      for (const bytes of [header, followed]) {
        assert.deepEqual(readProxyHeader(bytes), { value: address, takenBytes: header.length });
      }
    });
  }

  const wrong: Readonly<Record<string, Buffer>> = {
    TLS: Buffer.from([0x16, 0x03, 0x01]),
    HTTP: Buffer.from("POST / HTTP/1.1\r\n"),
    "another line": text("PROXY"),
    "small letters": text("proxy TCP4 198.51.100.1 10.0.0.1 1 2"),
    "no family": text("PROXY  198.51.100.1 10.0.0.1 1 2"),
    UDP: text("PROXY UDP4 198.51.100.1 10.0.0.1 1 2"),
    "IPv6 as IPv4": text("PROXY TCP4 2001:db8::1 10.0.0.1 1 2"),
    "a name": text("PROXY TCP4 client.example 10.0.0.1 1 2"),
    "a zone": text("PROXY TCP6 fe80::1%lo ::1 1 2"),
    "a port too large": text("PROXY TCP4 198.51.100.1 10.0.0.1 65536 2"),
    "a port with a zero": text("PROXY TCP4 198.51.100.1 10.0.0.1 01 2"),
    "no destination": text("PROXY TCP4 198.51.100.1"),
    "too much": text("PROXY TCP4 198.51.100.1 10.0.0.1 1 2 3"),
    "two spaces": text("PROXY TCP4 198.51.100.1 10.0.0.1  1 2"),
    "a line without an end": Buffer.from(`PROXY UNKNOWN ${"x".repeat(100)}`),
    "a line too long": text(`PROXY UNKNOWN ${"x".repeat(100)}`),
    "version 3": binary(0x31, 0x11, ipv4),
    "an unknown command": binary(0x22, 0x11, ipv4),
    "addresses too short": binary(0x21, 0x11, ipv4.subarray(1)),
    "IPv6 too short": binary(0x21, 0x21, ipv4),
    "a datagram": binary(0x21, 0x12, ipv4),
    "a socket of a file": binary(0x21, 0x31, Buffer.alloc(216)),
    "more than 2 KiB": binary(0x21, 0x11, ipv4, Buffer.alloc(2_048)),
  };
  for (const [what, bytes] of Object.entries(wrong)) {
    test(`${what}: is none`, () => assert.throws(() => readProxyHeader(bytes), ProxyHeaderError));
  }

  test("is never waited for beyond its bound, whatever comes", () => {
    const starts = fc.constantFrom("", "PROXY ", "\r\n\r\n\0\r\nQUIT\n", "\r\n\r\n\0\r\nQUIT\n\x21\x11");
    const bytes = fc.tuple(starts, fc.uint8Array({ maxLength: 3_000 }));
    fc.assert(
      fc.property(bytes, ([start, rest]) => {
        const all = Buffer.concat([Buffer.from(start, "latin1"), rest]);
        if (all.length === 0) return;
        try {
          const verdict = readProxyHeader(all);
          if (verdict === undefined) assert.ok(all.length < 2_048);
          else assert.ok(verdict.takenBytes <= all.length);
        } catch (error) {
          assert.ok(error instanceof ProxyHeaderError, String(error));
        }
      }),
    );
  });
});

const linuxOnly = process.platform === "linux" ? undefined : "needs Linux: more than one address of loopback";

describe("the node listener", { skip: linuxOnly }, () => {
  const [proxy, stranger] = ["127.0.0.9", "127.0.0.8"];
  let fleet: TestFleet;
  let node: NodeIdentity;
  let proxied: Replica;
  before(async () => {
    fleet = await TestFleet.start();
    node = await fleet.enroll();
    proxied = await fleet.startReplica({
      maxConnectionsPerAddress: 2,
      proxyProtocolFrom: new TrustedProxies([proxy]),
      limits: { proxyHeaderTimeoutMs: 1_000 },
    });
  });
  after(() => fleet[Symbol.asyncDispose]());

  /** Connects from an address, sends bytes, and shakes hands behind them. The listener's first frame says it is served. */
  async function connect(replica: Replica, localAddress: string, first: Buffer) {
    const tcp = connectTcp({ host: "127.0.0.1", port: replica.listener.port, localAddress });
    tcp.on("error", () => undefined);
    await once(tcp, "connect");
    if (first.length > 0) tcp.write(first);
    const socket = connectTls({
      socket: tcp,
      servername: "localhost",
      ca: fleet.authority.certificatePem,
      cert: node.certificatePem,
      key: node.privateKeyPem,
      ALPNProtocols: ["h2"],
    });
    const served = await new Promise<boolean>((resolve) => {
      socket.once("data", () => resolve(true));
      socket.once("error", () => resolve(false));
      socket.once("close", () => resolve(false));
    });
    return { served, end: () => socket.destroy() };
  }

  async function refusals(replica: Replica): Promise<Record<string, number>> {
    const text = await replica.registry.metrics();
    const lines = text.matchAll(/^clodei_node_proxy_connections_refused_total\{why="(\w+)"\} (\d+)$/gm);
    return Object.fromEntries([...lines].map(([, why = "", count]) => [why, Number(count)]));
  }

  test("takes both versions from a trusted proxy, and counts connections by the address that they name", async () => {
    const [one] = headers["version 1, IPv4"] ?? [];
    const [two] = headers["version 2, IPv4"] ?? [];
    const [other] = headers["version 2, IPv6"] ?? [];
    const [own] = headers["version 2, local"] ?? [];
    assert.ok(one !== undefined && two !== undefined && other !== undefined && own !== undefined);
    const first = await connect(proxied, proxy, one);
    const second = await connect(proxied, proxy, two);
    assert.deepEqual([first.served, second.served], [true, true]);
    assert.equal((await connect(proxied, proxy, two)).served, false, "the address has two");
    const others = await Promise.all([other, other, own, own].map((header) => connect(proxied, proxy, header)));
    assert.deepEqual(
      others.map(({ served }) => served),
      [true, true, true, true],
    );
    assert.match(await proxied.registry.metrics(), /^clodei_node_connections_refused_total 1$/m);
    first.end();
    await eventually("the connection's place is free", async () => {
      const again = await connect(proxied, proxy, one);
      again.end();
      return again.served;
    });
    for (const { end } of [second, ...others]) end();
  });

  test("takes no header from anybody else, nothing malformed, nothing without one, and waits for none for ever", async () => {
    const [good = Buffer.alloc(0)] = headers["version 1, IPv4"] ?? [];
    const before = await refusals(proxied);
    assert.equal((await connect(proxied, stranger, good)).served, false);
    assert.equal((await connect(proxied, proxy, text("PROXY TCP4 nobody 10.0.0.1 1 2"))).served, false);
    assert.equal((await connect(proxied, proxy, Buffer.alloc(0))).served, false, "TLS without a header");
    const silent = connectTcp({ host: "127.0.0.1", port: proxied.listener.port, localAddress: proxy });
    silent.write(good.subarray(0, 10));
    await once(silent.resume(), "close");
    const after = await refusals(proxied);
    const grown = (why: string): number => (after[why] ?? 0) - (before[why] ?? 0);
    assert.deepEqual([grown("no_trusted_proxy"), grown("malformed_proxy_header"), grown("no_proxy_header")], [1, 2, 1]);
    const served = await connect(proxied, proxy, good);
    assert.equal(served.served, true, "and serves the next one");
    served.end();
  });

  test("takes no header at all where none is configured", async () => {
    const direct = await fleet.startReplica();
    for (const [header] of Object.values(headers)) {
      assert.equal((await connect(direct, proxy, header)).served, false);
    }
    const served = await connect(direct, proxy, Buffer.alloc(0));
    assert.equal(served.served, true);
    served.end();
  });
});
