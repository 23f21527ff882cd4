import assert from "node:assert/strict";
import { test } from "node:test";
import { crc32 } from "node:zlib";
import fc from "fast-check";
import { formatApiKey, parseApiKey } from "./api-key.ts";
import { newId, parseId } from "./ids.ts";
import { newSecret } from "./secret.ts";

const apiKey = fc.constant(undefined).map(() => ({ id: newId("key"), secret: newSecret() }));

test("an API key parses to the parts that it was made of", () => {
  fc.assert(fc.property(apiKey, (key) => assert.deepEqual(parseApiKey(formatApiKey(key)), key)));
});

test("the checksum is the CRC-32 that zip uses", () => {
  const text = formatApiKey({ id: newId("key"), secret: newSecret() });
  const body = text.slice(0, text.lastIndexOf("_"));
  assert.equal(text.slice(body.length + 1), crc32(body).toString(16).padStart(8, "0"));
});

test("every single mistyped character is caught", () => {
  const text = formatApiKey({ id: newId("key"), secret: newSecret() });
  const other = fc.constantFrom(..."abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_- \n".split(""));
  fc.assert(
    fc.property(fc.nat(text.length - 1), other, (at, character) => {
      fc.pre(text.charAt(at) !== character);
      assert.equal(parseApiKey(text.slice(0, at) + character + text.slice(at + 1)), undefined);
    }),
    { numRuns: 500 },
  );
});

test("characters that changed places, are missing or were added are caught", () => {
  const text = formatApiKey({ id: newId("key"), secret: newSecret() });
  for (let at = 0; at < text.length; at++) {
    const [one, two] = [text.charAt(at), text.charAt(at + 1)];
    if (two !== "" && one !== two)
      assert.equal(parseApiKey(text.slice(0, at) + two + one + text.slice(at + 2)), undefined);
    assert.equal(parseApiKey(text.slice(0, at) + text.slice(at + 1)), undefined);
    assert.equal(parseApiKey(`${text.slice(0, at)}x${text.slice(at)}`), undefined);
  }
});

test("a malformed part is not written, and the error does not show the secret", () => {
  const secret = "short_secret-of-mine";
  assert.throws(
    () => formatApiKey({ id: newId("key"), secret }),
    (error: unknown) => error instanceof RangeError && !error.message.includes(secret),
  );
});

test("an id of another kind with a right checksum is refused", () => {
  const id = parseId("ins", newId("ins"));
  const body = `clodei_sk_${id}_${newSecret()}`;
  assert.equal(parseApiKey(`${body}_${crc32(body).toString(16).padStart(8, "0")}`), undefined);
});
