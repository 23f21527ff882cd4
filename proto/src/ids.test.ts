import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { type IdPrefix, newId, parseId } from "./ids.ts";

const prefixes: IdPrefix[] = ["ins", "nod", "org", "key", "usr", "ent", "opr"];
const prefix = fc.constantFrom(...prefixes);
const time = fc.integer({ min: 0, max: 2 ** 48 - 1 });

/** The UUID inside an id, decoded independently of the encoder. */
function uuidOf(id: string): string {
  let value = 0n;
  for (const digit of id.slice(4)) value = value * 32n + BigInt("0123456789abcdefghjkmnpqrstvwxyz".indexOf(digit));
  return value.toString(16).padStart(32, "0");
}

test("a new id parses under its own prefix and under no other", () => {
  fc.assert(
    fc.property(prefix, prefix, time, (made, asked, nowMs) => {
      const id = newId(made, nowMs);
      assert.equal(parseId(asked, id), made === asked ? id : undefined);
    }),
  );
});

test("a new id carries its time, version 7 and the variant of RFC 9562", () => {
  fc.assert(
    fc.property(time, (nowMs) => {
      const uuid = uuidOf(newId("ins", nowMs));
      assert.equal(Number.parseInt(uuid.slice(0, 12), 16), nowMs);
      assert.equal(uuid.charAt(12), "7");
      assert.match(uuid.charAt(16), /[89ab]/);
    }),
  );
});

test("text order is order of creation", () => {
  fc.assert(
    fc.property(time, time, (first, second) => {
      fc.pre(first !== second);
      assert.equal(newId("ins", first) < newId("ins", second), first < second);
    }),
  );
});

test("the example of the TypeID specification parses", () => {
  assert.equal(parseId("usr", "usr_01h455vb4pex5vsknk084sn02q"), "usr_01h455vb4pex5vsknk084sn02q");
  assert.equal(uuidOf("usr_01h455vb4pex5vsknk084sn02q"), "01890a5dac967 74bbcceb302099a8057".replace(" ", ""));
});

test("ten thousand ids of one millisecond are all different", () => {
  const ids = new Set(Array.from({ length: 10_000 }, () => newId("ins", 1_700_000_000_000)));
  assert.equal(ids.size, 10_000);
});

test("other spellings are refused", () => {
  const good = "ins_01h455vb4pex5vsknk084sn02q";
  assert.equal(parseId("ins", good), good);
  const hostile = [
    "",
    "ins_",
    "01h455vb4pex5vsknk084sn02q",
    good.toUpperCase(),
    `${good} `,
    ` ${good}`,
    `${good}\n`,
    `${good}0`,
    good.slice(0, -1),
    "ins_81h455vb4pex5vsknk084sn02q", // does not fit 128 bits
    "ins_01h455vb4pex5vsknk084sn02i",
    "ins_01h455vb4pex5vsknk084sn02o",
    "ins-01h455vb4pex5vsknk084sn02q",
    "nod_01h455vb4pex5vsknk084sn02q",
    "inss_01h455vb4pex5vsknk084sn02q",
    "ins_01h455vb4pex5vsknk084sn0' ",
  ];
  for (const text of hostile) assert.equal(parseId("ins", text), undefined, JSON.stringify(text));
});

test("no text but ids parses", () => {
  fc.assert(
    fc.property(fc.string({ unit: "binary" }), (text) => {
      const id = parseId("ins", text);
      assert.ok(id === undefined || /^ins_[0-7][0-9a-hjkmnp-tv-z]{25}$/.test(id));
    }),
  );
});

test("a time that does not fit is refused", () => {
  for (const nowMs of [-1, 2 ** 48, Number.NaN, Number.POSITIVE_INFINITY]) {
    assert.throws(() => newId("ins", nowMs), RangeError);
  }
});
