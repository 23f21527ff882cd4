import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { formatEnrollmentToken, parseEnrollmentToken } from "./enrollment-token.ts";
import { newId } from "./ids.ts";
import { newSecret } from "./secret.ts";

const hex = fc.string({ unit: fc.constantFrom(..."0123456789abcdef".split("")), minLength: 64, maxLength: 64 });
const secret = fc.string({
  unit: fc.constantFrom(..."abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_".split("")),
  minLength: 32,
  maxLength: 128,
});

test("a token parses to the parts that it was made of, hyphens in the secret included", () => {
  fc.assert(
    fc.property(hex, secret, (caDigestHex, text) => {
      const parts = { caDigestHex, id: newId("ent"), secret: text };
      assert.deepEqual(parseEnrollmentToken(formatEnrollmentToken(parts)), parts);
    }),
  );
});

test("whatever parses is written the same again", () => {
  const good = formatEnrollmentToken({ caDigestHex: "ab".repeat(32), id: newId("ent"), secret: newSecret() });
  fc.assert(
    fc.property(fc.nat(good.length), fc.string({ unit: "binary", maxLength: 3 }), fc.nat(3), (at, insert, cut) => {
      const text = good.slice(0, at) + insert + good.slice(at + cut);
      const parts = parseEnrollmentToken(text);
      if (parts !== undefined) assert.equal(formatEnrollmentToken(parts), text);
    }),
    { numRuns: 1000 },
  );
});

test("other versions, digests, ids and stray white space are refused", () => {
  const id = newId("ent");
  const digest = "0".repeat(64);
  const hostile = [
    "",
    `CLDT-2-${digest}-${id}-${newSecret()}`,
    `cldt-1-${digest}-${id}-${newSecret()}`,
    `CLDT-1-${digest.slice(1)}-${id}-${newSecret()}`,
    `CLDT-1-${"A".repeat(64)}-${id}-${newSecret()}`,
    `CLDT-1-${digest}-${newId("nod")}-${newSecret()}`,
    `CLDT-1-${digest}-${id}-`,
    `CLDT-1-${digest}-${id}-short`,
    `CLDT-1-${digest}-${id}-${"x".repeat(129)}`,
    ` CLDT-1-${digest}-${id}-${newSecret()}`,
    `CLDT-1-${digest}-${id}-${newSecret()}\n`,
  ];
  for (const text of hostile) assert.equal(parseEnrollmentToken(text), undefined, JSON.stringify(text));
});

test("a malformed part is not written, and the error does not show the secret", () => {
  const parts = { caDigestHex: "nothex", id: newId("ent"), secret: newSecret() };
  assert.throws(
    () => formatEnrollmentToken(parts),
    (error: unknown) => error instanceof RangeError && !error.message.includes(parts.secret),
  );
});
