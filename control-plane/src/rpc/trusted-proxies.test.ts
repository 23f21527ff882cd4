import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { checkProxyRange, TrustedProxies } from "./trusted-proxies.ts";

const proxies = new TrustedProxies(["10.0.0.0/8", "192.0.2.7", "fd00::/8"]);

describe("trusted proxies", () => {
  test("are told by address and range, however an address is written", () => {
    for (const address of [
      "10.1.2.3",
      "::ffff:10.1.2.3",
      "::FFFF:0a01:0203",
      "192.0.2.7",
      "fd12::1",
      "FD12:0:0::0001",
    ]) {
      assert.ok(proxies.has(address), address);
    }
    for (const address of ["11.0.0.1", "192.0.2.8", "fe80::1", "::1", "127.0.0.1", "", "proxy.example"]) {
      assert.ok(!proxies.has(address), address);
    }
    assert.ok(!new TrustedProxies([]).has("127.0.0.1"));
  });

  test("are refused where they would be everybody, or nobody", () => {
    for (const range of ["10.0.0.0/8", "::1", "2001:db8::/32", "192.0.2.7/32"]) checkProxyRange(range);
    assert.throws(() => checkProxyRange("0.0.0.0/0"), /would trust everybody/);
    assert.throws(() => checkProxyRange("::/0"), /would trust everybody/);
    for (const range of ["::1/8", "::/64", "::ffff:0:0/90"]) {
      assert.throws(() => checkProxyRange(range), /by IPv4|write it as IPv4/, range);
    }
    assert.throws(() => checkProxyRange("10.0.0.0/8/9"), /no address and no range/);
    assert.throws(() => checkProxyRange("::ffff:10.0.0.0/104"), /write it as IPv4/);
    for (const wrong of ["proxy.example", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/-1", "10.0.0", "*", "fe80::1%eth0"]) {
      assert.throws(() => checkProxyRange(wrong), new RegExp(JSON.stringify(wrong).replaceAll("*", "\\*")), wrong);
    }
  });
});

describe("where a request comes from", () => {
  const cases: readonly (readonly [what: string, peer: string, header: string | undefined, origin: string])[] = [
    ["a client without a proxy", "198.51.100.1", undefined, "198.51.100.1"],
    ["a forged header of a client without a proxy", "198.51.100.1", "203.0.113.9", "198.51.100.1"],
    ["a client of a proxy", "10.0.0.1", "198.51.100.1", "198.51.100.1"],
    ["a client that forged what stands before", "10.0.0.1", "203.0.113.9, 10.9.9.9, 198.51.100.1", "198.51.100.1"],
    ["a client of a proxy behind a proxy", "10.0.0.1", "198.51.100.1, 192.0.2.7", "198.51.100.1"],
    ["a forged chain of trusted names", "10.0.0.1", "10.0.0.2,198.51.100.1,10.0.0.3", "198.51.100.1"],
    ["a proxy itself", "10.0.0.1", undefined, "10.0.0.1"],
    ["proxies all the way", "10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"],
    ["a header that is empty", "10.0.0.1", "", "10.0.0.1"],
    ["a client that its proxy does not name", "10.0.0.1", "198.51.100.1, unknown", "10.0.0.1"],
    ["garbage at the end", "10.0.0.1", "198.51.100.1, ,", "10.0.0.1"],
    ["ports behind addresses", "10.0.0.1", "198.51.100.1:4711, 10.0.0.2:80", "198.51.100.1"],
    ["IPv6", "fd00::1", "2001:DB8::0:1", "2001:db8::1"],
    ["IPv6 in brackets with a port", "fd00::1", "[2001:db8::1]:4711", "2001:db8::1"],
    ["IPv4 in IPv6", "::ffff:10.0.0.1", "::ffff:198.51.100.1", "198.51.100.1"],
  ];
  for (const [what, peer, header, origin] of cases) {
    test(what, () => assert.equal(proxies.origin(peer, header), origin));
  }

  test("is never what a client wrote before the part of the trusted proxies, whatever it wrote", () => {
    const client = "198.51.100.1";
    const forged = fc.oneof(fc.string(), fc.array(fc.ipV4()).map(String), fc.constant("10.0.0.9, "), fc.ipV6());
    fc.assert(fc.property(forged, (text) => proxies.origin("10.0.0.1", `${text}, ${client}`) === client));
    fc.assert(fc.property(forged, (text) => proxies.origin(client, text) === client));
  });
});
