// Messages made from nothing but their descriptor, for fuzzing: some as a client would send them, within the rules of
// the schema, some with values that no client should send, and some with what is not in the schema at all.
import { type DescField, type DescMessage, getOption, ScalarType } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { field as fieldRules, type FieldRules } from "@bufbuild/protovalidate/gen/buf/validate/validate_pb.js";
import fc from "fast-check";
import type { Entry, MessageTree, Part, Scalar, Value } from "./message-tree.ts";

/** How many of a message's fields are hostile: none, one here and there, or every other one. */
export type Hostility = "plausible" | "seasoned" | "hostile";

/** What a test knows of a field and the schema does not say. */
export type Hints = {
  /** Values that stand for something, such as ids that exist. `never`: the field is left out of plausible messages. */
  readonly plausible: (field: DescField) => fc.Arbitrary<Scalar> | "never" | undefined;
  /** Texts that look like something else: ids of other kinds, tokens of others. */
  readonly confusing: fc.Arbitrary<string>;
};

const hostileShare: Readonly<Record<Hostility, number>> = { plausible: 0, seasoned: 1, hostile: 12 };
const plausibleShare = 12;
/** Deeper than any message of the contract. */
const maxDepth = 8;
/** What one repeated field may take, about: a quarter of the largest message that is read. */
const maxRepeatedBytes = 2 ** 20;

/** Trees of a message. */
export function messages(schema: DescMessage, hints: Hints): fc.Arbitrary<MessageTree> {
  const of = (hostility: Hostility): fc.Arbitrary<MessageTree> => new Trees(hostility, hints).of(schema);
  return fc.oneof(
    { weight: 4, arbitrary: of("plausible") },
    { weight: 4, arbitrary: of("seasoned") },
    { weight: 2, arbitrary: of("hostile") },
  );
}

/** Trees of one hostility. */
class Trees {
  readonly #hostility: Hostility;
  readonly #hints: Hints;
  readonly #made = new Map<DescMessage, fc.Arbitrary<MessageTree>>();

  constructor(hostility: Hostility, hints: Hints) {
    this.#hostility = hostility;
    this.#hints = hints;
  }

  of(schema: DescMessage, depth = 0): fc.Arbitrary<MessageTree> {
    if (depth > maxDepth) return fc.constant({ schema, parts: [] });
    const made = this.#made.get(schema) ?? this.#make(schema, depth);
    this.#made.set(schema, made);
    return made;
  }

  #make(schema: DescMessage, depth: number): fc.Arbitrary<MessageTree> {
    const members = schema.members.map((member): fc.Arbitrary<readonly Part[]> => {
      if (member.kind === "field") return this.#parts(member, depth);
      const fields = member.fields.map((field) => this.#parts(field, depth, true));
      if (fields.length === 0) return fc.constant([]);
      // More than one at a time is on the wire what it should not be.
      return this.#orHostile(
        fc.oneof(...fields),
        fc.tuple(...fields).map((all) => all.flat()),
      );
    });
    const junk = this.#orHostile<readonly Part[]>(fc.constant([]), fc.array(junkParts(schema), { maxLength: 3 }));
    return fc.tuple(...members, junk).map((parts) => ({ schema, parts: parts.flat() }));
  }

  #orHostile<T>(plausible: fc.Arbitrary<T>, hostile: fc.Arbitrary<T>): fc.Arbitrary<T> {
    const weight = hostileShare[this.#hostility];
    if (weight === 0) return plausible;
    return fc.oneof({ weight: plausibleShare, arbitrary: plausible }, { weight, arbitrary: hostile });
  }

  #parts(field: DescField, depth: number, isChosen = false): fc.Arbitrary<readonly Part[]> {
    const rules = getOption(field, fieldRules);
    const hint = this.#hints.plausible(field);
    const absent = fc.constant<readonly Part[]>([]);
    const present = this.#present(field, rules, hint === "never" ? undefined : hint, depth);
    if (hint === "never") return this.#orHostile(absent, present);
    const isPlain = field.fieldKind === "scalar" || field.fieldKind === "enum";
    if (isChosen || rules.required || (isPlain && !field.proto.proto3Optional)) return present;
    return fc.oneof({ weight: 1, arbitrary: absent }, { weight: 3, arbitrary: present });
  }

  #present(
    field: DescField,
    rules: FieldRules,
    hint: fc.Arbitrary<Scalar> | undefined,
    depth: number,
  ): fc.Arbitrary<readonly Part[]> {
    const values = (list: fc.Arbitrary<readonly Value[]>): fc.Arbitrary<readonly Part[]> =>
      list.map((found) => [{ kind: "values", field, values: found }]);
    switch (field.fieldKind) {
      case "scalar":
      case "enum": {
        const one = this.#orHostile(hint ?? plausibleScalar(field, rules), this.#hostileScalar(field));
        // A field that comes twice: the last one counts.
        return values(this.#orHostile(fc.tuple(one), fc.array(one, { minLength: 2, maxLength: 3 })));
      }
      case "message": {
        const one: fc.Arbitrary<Value> =
          wellKnown(field.message, rules, this.#hostility) ?? this.of(field.message, depth + 1);
        return values(this.#orHostile(fc.tuple(one), fc.array(one, { maxLength: 3 })));
      }
      case "list": {
        const items = rules.type.case === "repeated" ? rules.type.value : undefined;
        const max = Math.min(3, Number(items?.maxItems ?? 3n) || 3);
        const one: fc.Arbitrary<Value> =
          field.listKind === "message"
            ? this.of(field.message, depth + 1)
            : this.#orHostile(hint ?? plausibleScalar(field, items?.items), this.#hostileScalar(field));
        const many = fc
          .tuple(one, fc.constantFrom(0, 40, 700, 5_000))
          .map(([item, count]) => Array.from({ length: boundedCount(item, count) }, () => item));
        return values(
          this.#orHostile(fc.array(one, { minLength: Number(items?.minItems ?? 0n), maxLength: max }), many),
        );
      }
      case "map":
        return this.#entries(field, rules, depth).map((entries) => [{ kind: "entries", field, entries }]);
    }
  }

  #entries(field: DescField & { fieldKind: "map" }, rules: FieldRules, depth: number): fc.Arbitrary<readonly Entry[]> {
    const map = rules.type.case === "map" ? rules.type.value : undefined;
    const key = this.#orHostile(plausibleText(map?.keys), this.#hostileText());
    const text = field.mapKind === "scalar" && field.scalar === ScalarType.STRING;
    const value: fc.Arbitrary<Value> =
      field.mapKind === "message"
        ? this.of(field.message, depth + 1)
        : this.#orHostile<Scalar>(text ? plausibleText(map?.values) : fc.constant(1n), this.#hostileText());
    const whole = fc.record({ key, value });
    const torn = fc.record({ key: fc.option(key, { nil: undefined }), value: fc.option(value, { nil: undefined }) });
    const many = fc
      .tuple(value, fc.constantFrom(33, 129, 3_000))
      .map(([item, count]) =>
        Array.from({ length: boundedCount(item, count) }, (_, index) => ({ key: `k${index}`, value: item })),
      );
    return this.#orHostile<readonly Entry[]>(
      fc.array(whole, { maxLength: 3 }),
      fc.oneof(fc.array(torn, { maxLength: 4 }), many),
    );
  }

  #hostileText(): fc.Arbitrary<string> {
    return fc.oneof(hostileTexts, this.#hints.confusing);
  }

  #hostileScalar(field: DescField): fc.Arbitrary<Scalar> {
    if (field.enum !== undefined) return hostileWholes;
    switch (field.scalar) {
      case ScalarType.STRING:
        return this.#hostileText();
      case ScalarType.BYTES:
        return hostileBytes;
      case ScalarType.BOOL:
        return fc.constantFrom<Scalar>(true, false, 2n, -1n);
      case ScalarType.DOUBLE:
      case ScalarType.FLOAT:
        return fc.oneof(fc.double(), fc.constantFrom(NaN, Infinity, -Infinity, -0));
      default:
        return hostileWholes;
    }
  }
}

/** So many that they do not make a message that no listener reads: a test would do nothing but encode it. */
function boundedCount(item: Value, count: number): number {
  return Math.min(count, Math.ceil(maxRepeatedBytes / weightOf(item)));
}

/** About how many bytes a value takes. */
function weightOf(value: Value): number {
  if (typeof value === "string" || value instanceof Uint8Array) return 4 + value.length;
  if (typeof value !== "object") return 8;
  const weights = value.parts.map((part) => {
    if (part.kind === "values") return part.values.reduce((sum: number, item) => sum + weightOf(item), 0);
    if (part.kind === "junk") return Math.max(part.junk.bytes.length, part.junk.json.length);
    return part.entries.reduce((sum, entry) => sum + weightOf(entry.key ?? "") + weightOf(entry.value ?? ""), 0);
  });
  return weights.reduce((sum, weight) => sum + weight, 8);
}

// --- within the rules

function plausibleScalar(field: DescField, rules: FieldRules | undefined): fc.Arbitrary<Scalar> {
  if (field.enum !== undefined) return fc.constantFrom(...field.enum.values.map(({ number }) => BigInt(number)));
  switch (field.scalar) {
    case ScalarType.STRING:
      return plausibleText(rules);
    case ScalarType.BYTES: {
      const of = rules?.type.case === "bytes" ? rules.type.value : undefined;
      const length = Number(of?.len ?? 0n);
      if (length > 0) return fc.uint8Array({ minLength: length, maxLength: length });
      return fc.uint8Array({ minLength: Number(of?.minLen ?? 0n), maxLength: Math.min(48, Number(of?.maxLen ?? 48n)) });
    }
    case ScalarType.BOOL:
      return fc.boolean();
    case ScalarType.DOUBLE:
    case ScalarType.FLOAT:
      return fc.double({ noNaN: true });
    default:
      return plausibleWhole(rules);
  }
}

function plausibleWhole(rules: FieldRules | undefined): fc.Arbitrary<bigint> {
  const { type } = rules ?? {};
  const bounds = { min: 0n, max: 1_000n };
  if (type?.case === "uint32" || type?.case === "uint64" || type?.case === "int32" || type?.case === "int64") {
    if (type.value.greaterThan.case === "gte") bounds.min = BigInt(type.value.greaterThan.value);
    if (type.value.lessThan.case === "lte") bounds.max = BigInt(type.value.lessThan.value);
  }
  return fc.bigInt({ min: bounds.min, max: bounds.max < bounds.min ? bounds.min : bounds.max });
}

function plausibleText(rules: FieldRules | undefined): fc.Arbitrary<string> {
  const of = rules?.type.case === "string" ? rules.type.value : undefined;
  const maxLength = Math.min(24, Number(of?.maxLen ?? 24n) || 24);
  if (of?.pattern !== undefined && of.pattern !== "")
    return fc.stringMatching(new RegExp(of.pattern), { maxLength: 200 });
  return fc.string({ minLength: Number(of?.minLen ?? 0n), maxLength, unit: "grapheme-ascii" });
}

/** Times and durations: whole ones within their rules, and such as no calendar has. */
function wellKnown(
  schema: DescMessage,
  rules: FieldRules,
  hostility: Hostility,
): fc.Arbitrary<MessageTree> | undefined {
  const isDuration = schema.typeName === "google.protobuf.Duration";
  if (!isDuration && schema.typeName !== "google.protobuf.Timestamp") return undefined;
  const of = rules.type.case === "duration" ? rules.type.value : undefined;
  const least = of?.greaterThan.case === "gte" ? of.greaterThan.value.seconds : 0n;
  const most = of?.lessThan.case === "lte" ? of.lessThan.value.seconds : 3_600n;
  const nowSeconds = 1_800_000_000n;
  const near = isDuration ? fc.bigInt(least, most) : fc.bigInt(nowSeconds - 10_000_000n, nowSeconds + 10_000_000n);
  const far = fc.oneof(hostileWholes, fc.constantFrom(-62_135_596_801n, 253_402_300_800n, 315_576_000_001n, -1n));
  const tree = (seconds: bigint, nanos: bigint): MessageTree => {
    const parts = schema.fields.map((field): Part => ({
      kind: "values",
      field,
      values: [field.name === "seconds" ? seconds : nanos],
    }));
    return { schema, parts };
  };
  const plausible = near.map((seconds) => tree(seconds, 0n));
  const weight = hostileShare[hostility];
  if (weight === 0) return plausible;
  const hostile = fc
    .tuple(far, fc.constantFrom(0n, -1n, 999_999_999n, 1_000_000_000n, 2n ** 31n))
    .map(([s, n]) => tree(s, n));
  return fc.oneof({ weight: plausibleShare, arbitrary: plausible }, { weight, arbitrary: hostile });
}

// --- outside of them

const hostileWholes: fc.Arbitrary<bigint> = fc.oneof(
  fc.constantFrom(
    0n,
    1n,
    -1n,
    99n,
    2n ** 31n - 1n,
    2n ** 31n,
    2n ** 32n - 1n,
    2n ** 32n,
    2n ** 53n,
    2n ** 63n - 1n,
    2n ** 63n,
    2n ** 64n - 1n,
  ),
  fc.bigInt({ min: -(2n ** 63n), max: 2n ** 64n - 1n }),
);

const hostileTexts: fc.Arbitrary<string> = fc.oneof(
  fc.constantFrom(
    "",
    " ",
    "\0",
    "a\0b",
    "\u{feff}",
    "\ud800",
    "a\udc00b",
    "‮gnp.exe",
    "𝕳🙂👩‍👩‍👧‍👦é",
    "\r\nset-cookie: a=b",
    "../../../etc/passwd",
    "'; drop table instances; --",
    "%00%s%n",
    "${jndi:ldap://x}",
    "__proto__",
    "constructor",
    "toString",
    "null",
    "NaN",
    "-1",
    "1e999",
    "{}",
    "[",
  ),
  fc.string({ unit: "binary", maxLength: 40 }),
  fc
    .constantFrom("a", "é", "🙂", "\u{301}")
    .chain((unit) => fc.constantFrom(64, 257, 5_000, 40_000).map((length) => unit.repeat(length))),
);

const hostileBytes: fc.Arbitrary<Uint8Array> = fc.oneof(
  fc.uint8Array({ maxLength: 64 }),
  fc.constantFrom(0, 8_193, 60_000).map((length) => new Uint8Array(length).fill(0x30)),
);

/** The highest number that a field can have. */
const maxFieldNumber = 2 ** 29 - 1;
/** A group that holds a group that holds … — the fields of an unknown group are skipped one by one. */
const nestedGroups = (depth: number): Uint8Array => {
  const writer = new BinaryWriter();
  for (let index = 0; index < depth; index += 1) writer.tag(1, WireType.StartGroup);
  for (let index = 0; index < depth; index += 1) writer.tag(1, WireType.EndGroup);
  return writer.finish();
};

const junkBytes: fc.Arbitrary<readonly [WireType, Uint8Array]> = fc.oneof(
  fc.constantFrom(
    [WireType.Varint, new Uint8Array([1])] as const,
    [WireType.Varint, new Uint8Array(11).fill(0xff)] as const,
  ),
  fc.uint8Array({ minLength: 8, maxLength: 8 }).map((bytes) => [WireType.Bit64, bytes] as const),
  fc.uint8Array({ minLength: 0, maxLength: 4 }).map((bytes) => [WireType.Bit32, bytes] as const),
  fc
    .uint8Array({ maxLength: 24 })
    .map((bytes) => [WireType.LengthDelimited, new BinaryWriter().bytes(bytes).finish()] as const),
  // Longer than what follows.
  fc.constant([WireType.LengthDelimited, new Uint8Array([0xff, 0xff, 0xff, 0xff, 0x0f])] as const),
  fc.constantFrom(1, 90, 150, 20_000).map((depth) => [WireType.StartGroup, nestedGroups(depth)] as const),
  fc.constant([WireType.EndGroup, new Uint8Array()] as const),
);

function junkParts(schema: DescMessage): fc.Arbitrary<Part> {
  const numbers = fc.constantFrom(0, 15, 1_000, maxFieldNumber, ...schema.fields.map(({ number }) => number));
  const keys = fc.oneof(
    fc.constantFrom(
      "privileged",
      "__proto__",
      "constructor",
      "",
      "$typeName",
      "@type",
      ...schema.fields.map(({ jsonName }) => jsonName),
    ),
    fc.string({ maxLength: 12 }),
  );
  const nested = fc.constantFrom(3, 5_000, 100_000).map((depth) => "[".repeat(depth) + "]".repeat(depth));
  const json = fc.oneof(
    fc.json(),
    fc.constantFrom("1e999", "-0", "123456789012345678901234567890", '"\\ud800"', "nul", '"', '{"a":1,"a":2}', "1,2"),
    nested,
  );
  return fc.tuple(numbers, junkBytes, keys, json).map(([number, [wireType, bytes], key, text]) => ({
    kind: "junk",
    junk: { number, wireType, bytes, key, json: text },
  }));
}
