import assert from "node:assert/strict";
import { test } from "node:test";
import { defaultRetryPolicy, retryDelayMs } from "./backoff.ts";

test("waits spread over the whole range below a ceiling that doubles and then stands", () => {
  const most = () => 0.999_999;
  const ceilings = [1, 2, 3, 4, 5, 6, 7, 8, 100].map((attempt) =>
    Math.round(retryDelayMs(defaultRetryPolicy, attempt, undefined, most)),
  );
  assert.deepEqual(ceilings, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
  assert.equal(
    retryDelayMs(defaultRetryPolicy, 8, undefined, () => 0),
    0,
  );
});

test("what the server asks for is a floor, and jitter comes on top", () => {
  assert.equal(
    retryDelayMs(defaultRetryPolicy, 1, 700, () => 0),
    700,
  );
  assert.equal(
    retryDelayMs(defaultRetryPolicy, 1, 700, () => 0.5),
    750,
  );
});
