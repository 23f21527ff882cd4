import assert from "node:assert/strict";
import { test } from "node:test";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import fc from "fast-check";
import { DomainError } from "./errors.ts";
import { decodePageToken, encodePageToken, filterHash, pageSizeOf } from "./page-token.ts";

test("a page token gives its position back, and is refused with other filters", () => {
  fc.assert(
    fc.property(fc.array(fc.string({ maxLength: 40 }), { maxLength: 3 }), (position) => {
      const hash = filterHash({ state: 1, version: 5n });
      const token = encodePageToken(hash, position);
      assert.match(token, /^[A-Za-z0-9_-]+$/);
      assert.deepEqual(decodePageToken(token, hash), position);
      assert.throws(() => decodePageToken(token, filterHash({ state: 2 })), isInvalid);
    }),
  );
});

test("whatever is not one of ours is refused, and the empty token is the first page", () => {
  fc.assert(
    fc.property(fc.string({ minLength: 1 }), (text) => assert.throws(() => decodePageToken(text, "hash"), isInvalid)),
  );
  assert.throws(() => decodePageToken("A".repeat(100_000), "hash"), isInvalid);
  assert.equal(decodePageToken("", "hash"), undefined);
});

test("a page has 50 rows by default and never more than 500", () => {
  assert.deepEqual([0, 1, 500, 501].map(pageSizeOf), [50, 1, 500, 500]);
});

function isInvalid(error: unknown): boolean {
  return error instanceof DomainError && error.reason === ErrorReason.PAGE_TOKEN_INVALID;
}
