import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DomainError } from "../platform/errors.ts";
import { limitedAddressOf, RateLimiter } from "./rate-limit.ts";

test("whatever the times, no more than the burst and the rate pass, and a wait as told is long enough", () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 50 }),
      fc.integer({ min: 1, max: 20 }),
      fc.array(fc.integer({ min: 0, max: 500 }), { minLength: 1, maxLength: 100 }),
      (perSecond, burst, pausesMs) => {
        const limiter = new RateLimiter({ perSecond, burst });
        let [nowMs, passed] = [0, 0];
        for (const pauseMs of pausesMs) {
          nowMs += pauseMs;
          try {
            limiter.take("a", nowMs);
            passed += 1;
          } catch (error) {
            assert.ok(error instanceof DomainError && error.retryAfterMs !== undefined && error.retryAfterMs > 0);
            nowMs += error.retryAfterMs;
            limiter.take("a", nowMs);
            passed += 1;
          }
          assert.ok(passed <= burst + (nowMs / 1_000) * perSecond + 1e-5);
        }
      },
    ),
    { numRuns: 5_000, examples: [[20, 1, [0, 4, 0]]] },
  );
});

test("memory is bounded however many ask", () => {
  const limiter = new RateLimiter({ perSecond: 0.001, burst: 1 });
  limiter.take("first", 0);
  for (let n = 0; n < 20_000; n += 1) limiter.take(`address ${n}`, 1);
  // Forgotten, and so full again: a bound costs some strictness, never memory.
  limiter.take("first", 2);
  assert.throws(() => limiter.take("address 19999", 3), DomainError);
});

test("one user's addresses share a bucket: all of IPv4, the /64 of IPv6", () => {
  assert.equal(limitedAddressOf("10.0.0.1"), "10.0.0.1");
  assert.equal(limitedAddressOf("::ffff:10.0.0.1"), "10.0.0.1");
  // As version 2 of the PROXY protocol has addresses: each group in full.
  assert.equal(limitedAddressOf("0000:0000:0000:0000:0000:ffff:0a00:0001"), "10.0.0.1");
  assert.equal(limitedAddressOf("2001:0db8:0000:0001:0000:0000:0000:0007"), limitedAddressOf("2001:db8:0:1::8"));
  assert.equal(limitedAddressOf("2001:db8:1:2:3:4:5:6"), limitedAddressOf("2001:db8:1:2:ffff::1"));
  assert.notEqual(limitedAddressOf("2001:db8:1:2::1"), limitedAddressOf("2001:db8:1:3::1"));
  assert.equal(limitedAddressOf("2001:db8::1"), "2001:db8:0:0::/64");
  assert.equal(limitedAddressOf("::1"), "0:0:0:0::/64");
  assert.equal(limitedAddressOf("fe80::1%eth0"), "fe80:0:0:0::/64");
});
