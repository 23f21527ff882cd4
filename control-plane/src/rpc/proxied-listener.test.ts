// The public listener behind proxies, without one: what a proxy sends is sent from addresses of loopback.
import assert from "node:assert/strict";
import { once } from "node:events";
import { Agent, request as httpRequest } from "node:http";
import { Agent as HttpsAgent, request as httpsRequest } from "node:https";
import { connect as connectTcp } from "node:net";
import { describe, test } from "node:test";
import { createClient } from "@connectrpc/connect";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { RateLimiter } from "./rate-limit.ts";
import {
  adminCredential,
  reasonOf,
  showingRoutes,
  startTestListener,
  type TestListener,
  transportKinds,
} from "./test-listener.ts";
import { TrustedProxies } from "./trusted-proxies.ts";

const whoAmI = "/clodei.v1.IdentityService/WhoAmI";
/** Loopback is all of 127.0.0.0/8 on Linux: one of it is the proxy, another is anybody. */
const [proxy, stranger] = ["127.0.0.9", "127.0.0.8"];
const loopbackIsWide = process.platform === "linux" ? undefined : "needs Linux: more than one address of loopback";

type Answer = { readonly status: number; readonly body: string };

/** Asks who one is, from an address of loopback, on a connection of its own. */
async function ask(
  test: TestListener,
  localAddress: string,
  headers: Readonly<Record<string, string>> = {},
): Promise<Answer> {
  const isPlain = test.url.startsWith("http:");
  const send = isPlain ? httpRequest : httpsRequest;
  const request = send(`${test.url}${whoAmI}`, {
    method: "POST",
    localAddress,
    agent: isPlain ? new Agent() : new HttpsAgent({ ca: test.caPem }),
    headers: { "content-type": "application/json", authorization: adminCredential, connection: "close", ...headers },
  });
  request.end("{}");
  const { promise, resolve, reject } = Promise.withResolvers<Answer>();
  request.once("error", reject);
  request.once("response", (response) => {
    let body = "";
    response.setEncoding("utf8").on("data", (text: string) => (body += text));
    response.once("end", () => resolve({ status: response.statusCode ?? 0, body }));
  });
  return promise;
}

function twoOfEachAddress(): { readonly addressLimiter: RateLimiter } {
  return { addressLimiter: new RateLimiter({ perSecond: 0.001, burst: 2 }) };
}

describe("the public listener behind a proxy that ends TLS", { skip: loopbackIsWide }, () => {
  test("speaks Connect, gRPC and gRPC-Web over plain HTTP/1.1 and HTTP/2, streams too", async () => {
    await using plain = await startTestListener(showingRoutes, {
      tls: undefined,
      trustedProxies: new TrustedProxies(["127.0.0.1"]),
    });
    for (const kind of transportKinds) {
      const transport = plain.transport(kind, adminCredential);
      assert.match((await createClient(IdentityService, transport).whoAmI({})).callerId, /^usr_/, kind);
      for await (const message of createClient(InstanceService, transport).watchInstances({})) {
        assert.equal(message.cursor, "first", kind);
        break;
      }
    }
  });

  test("says nothing in plain text to anybody else, and counts who tried", async () => {
    await using plain = await startTestListener(showingRoutes, {
      tls: undefined,
      trustedProxies: new TrustedProxies([proxy]),
    });
    assert.equal((await ask(plain, proxy)).status, 200);
    await assert.rejects(ask(plain, stranger), /ECONNRESET|socket hang up/);
    await assert.rejects(ask(plain, stranger, { "x-forwarded-for": proxy }), /ECONNRESET|socket hang up/);
    const { values } = await plain.metrics.refusedConnections.get();
    assert.equal(values[0]?.value, 2);
  });

  test("answers a start of HTTP/2 that comes in pieces, and outlives one that is neither version", async () => {
    await using plain = await startTestListener(showingRoutes, {
      tls: undefined,
      trustedProxies: new TrustedProxies([proxy]),
    });
    const open = () => connectTcp({ host: "127.0.0.1", port: plain.listener.port, localAddress: proxy, noDelay: true });
    const pieces = open();
    for (const piece of ["P", "RI", " * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\0\0\0\x04\0\0\0\0\0"]) {
      pieces.write(piece, "latin1");
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    const [settings] = (await once(pieces, "data")) as [Buffer];
    assert.equal(settings[3], 4, "the server's settings");
    pieces.destroy();
    const garbage = open();
    garbage.on("error", () => undefined);
    garbage.write("\x16\x03\x01 this is TLS \r\n\r\n", "latin1");
    garbage.resume();
    await once(garbage, "close");
    assert.equal((await ask(plain, proxy)).status, 200);
  });

  test("a drain ends streams, and connections that wait", async () => {
    const plain = await startTestListener(showingRoutes, {
      tls: undefined,
      trustedProxies: new TrustedProxies(["127.0.0.1"]),
    });
    const idle = connectTcp({ host: "127.0.0.1", port: plain.listener.port });
    idle.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    await once(idle, "data");
    const idleEnded = once(idle.resume(), "close");
    const reasons = transportKinds.map(async (kind) => {
      const client = createClient(InstanceService, plain.transport(kind, adminCredential));
      const stream = client.watchInstances({})[Symbol.asyncIterator]();
      await stream.next();
      return {
        ended: stream.next().then(() => "none", reasonOf),
      };
    });
    const streams = await Promise.all(reasons);
    const closed = plain.listener.close(60_000);
    for (const { ended } of streams) assert.equal(await ended, "UNAVAILABLE");
    await Promise.all([closed, idleEnded]);
  });
});

describe("whose request it is", { skip: loopbackIsWide }, () => {
  test("a header that was forged is ignored, and that of a trusted proxy counts, over TLS as in plain text", async () => {
    for (const tls of ["on", "off"] as const) {
      await using listener = await startTestListener(showingRoutes, {
        ...twoOfEachAddress(),
        trustedProxies: new TrustedProxies([proxy]),
        ...(tls === "off" ? { tls: undefined } : {}),
      });
      const status = async (from: string, headers?: Record<string, string>) =>
        (await ask(listener, from, headers)).status;
      if (tls === "on") {
        // Each a new name, and yet one address.
        assert.equal(await status(stranger, { "x-forwarded-for": "203.0.113.1" }), 200);
        assert.equal(await status(stranger, { forwarded: "for=203.0.113.2" }), 200);
        assert.equal(await status(stranger, { "x-forwarded-for": "203.0.113.3", forwarded: "for=203.0.113.3" }), 429);
      }
      // One proxy, many clients: each has a limit of its own.
      for (const client of ["198.51.100.1", "198.51.100.2", "2001:db8:1::1", "2001:db8:2::1"]) {
        assert.equal(await status(proxy, { "x-forwarded-for": client }), 200);
        assert.equal(await status(proxy, { "x-forwarded-for": `203.0.113.4, ${client}` }), 200);
        const third = await ask(listener, proxy, {
          "x-forwarded-for": `${client}, 203.0.113.5,${client}`,
          forwarded: "for=203.0.113.6",
        });
        assert.equal(third.status, 429, client);
        assert.match(third.body, /RATE_LIMITED/);
      }
      assert.ok(!/198\.51\.100|203\.0\.113/.test(listener.lines.join("")), "a network address is personal data");
    }
  });

  test("many connections of a trusted proxy are served, and one client has no more requests open through it than others have connections", async () => {
    await using listener = await startTestListener(showingRoutes, {
      trustedProxies: new TrustedProxies(["127.0.0.1"]),
      maxConnectionsPerAddress: 2,
    });
    const client = createClient(InstanceService, listener.transport("connect-http1", adminCredential));
    const watch = async (address: string) => {
      const ending = new AbortController();
      const options = { headers: { "x-forwarded-for": address }, signal: ending.signal };
      const stream = client.watchInstances({}, options)[Symbol.asyncIterator]();
      const outcome = await stream.next().then(
        () => "open",
        (error: unknown) => reasonOf(error) ?? String(error),
      );
      return { outcome, end: () => ending.abort() };
    };
    const first = await watch("198.51.100.1");
    const second = await watch("198.51.100.1");
    const others = await Promise.all(["198.51.100.2", "198.51.100.3", "198.51.100.4"].map(watch));
    assert.deepEqual(
      [first, second, ...others].map(({ outcome }) => outcome),
      ["open", "open", "open", "open", "open"],
    );
    assert.equal((await watch("198.51.100.1")).outcome, "RATE_LIMITED");
    first.end();
    // The server learns of it a moment later.
    let again = await watch("198.51.100.1");
    while (again.outcome !== "open") again = await watch("198.51.100.1");
    for (const { end } of [second, again, ...others]) end();
  });
});
