import assert from "node:assert/strict";
import { test } from "node:test";
import { newId } from "./ids.ts";
import { containerName, renewalSignatureMessage } from "./node-link.ts";

test("a container is named by instance and attempt, as Docker allows names", () => {
  const id = newId("ins");
  assert.equal(containerName(id, 3), `clodei-${id}-3`);
  assert.match(containerName(id, 3), /^[a-zA-Z0-9][a-zA-Z0-9_.-]+$/);
});

test("an attempt that is no number from 1 names no container", () => {
  for (const attempt of [0, -1, 1.5, Number.NaN]) assert.throws(() => containerName(newId("ins"), attempt), RangeError);
});

test("a renewal signs context, challenge and request in this order", () => {
  const message = renewalSignatureMessage(new Uint8Array(32).fill(7), Uint8Array.of(1, 2, 3));
  assert.equal(Buffer.from(message.subarray(0, 23)).toString(), "clodei-renew-expired-v1");
  assert.deepEqual(message.subarray(23), Uint8Array.of(...new Uint8Array(32).fill(7), 1, 2, 3));
});

test("a challenge of another length is refused", () => {
  assert.throws(() => renewalSignatureMessage(new Uint8Array(31), Uint8Array.of(1)), RangeError);
});
