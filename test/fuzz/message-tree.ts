// A message as a tree: before it is encoded, and so also what no encoder would write. One tree goes over the wire as
// binary and as JSON.
import { type DescField, type DescMessage, ScalarType } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";

/** A value without parts. Whole numbers are bigints, also those of enums. */
export type Scalar = string | number | bigint | boolean | Uint8Array;
export type Value = Scalar | MessageTree;
/** Either side of an entry may be missing. */
export type Entry = { readonly key: Scalar | undefined; readonly value: Value | undefined };
/** What is in no schema: a field's number, or one in use with the wire type of another; in JSON a key and any text. */
export type Junk = {
  readonly number: number;
  readonly wireType: WireType;
  readonly bytes: Uint8Array;
  readonly key: string;
  readonly json: string;
};
export type Part =
  | { readonly kind: "values"; readonly field: DescField; readonly values: readonly Value[] }
  | { readonly kind: "entries"; readonly field: DescField; readonly entries: readonly Entry[] }
  | { readonly kind: "junk"; readonly junk: Junk };

/** A message before it is encoded. May break every rule. */
export type MessageTree = { readonly schema: DescMessage; readonly parts: readonly Part[] };

/** The tree as it would be on the wire: every part in turn, whatever it breaks. */
export function toBytes({ parts }: MessageTree): Uint8Array {
  const writer = new BinaryWriter(encodeText);
  for (const part of parts) {
    switch (part.kind) {
      case "values":
        for (const value of part.values) writeValue(writer, part.field.number, part.field, value);
        break;
      case "entries":
        for (const { key, value } of part.entries) {
          const entry = new BinaryWriter(encodeText);
          if (key !== undefined) writeScalar(entry, 1, ScalarType.STRING, key);
          if (value !== undefined) writeValue(entry, 2, part.field, value);
          writer.tag(part.field.number, WireType.LengthDelimited).bytes(entry.finish());
        }
        break;
      case "junk":
        // By hand: the writer refuses a field of number 0.
        writer.uint32(((part.junk.number << 3) | part.junk.wireType) >>> 0).raw(part.junk.bytes);
        break;
    }
  }
  return writer.finish();
}

function writeValue(writer: BinaryWriter, number: number, field: DescField, value: Value): void {
  if (isTree(value)) writer.tag(number, WireType.LengthDelimited).bytes(toBytes(value));
  else writeScalar(writer, number, field.scalar ?? ScalarType.INT32, value);
}

function writeScalar(writer: BinaryWriter, number: number, type: ScalarType, value: Scalar): void {
  if (typeof value === "string") writer.tag(number, WireType.LengthDelimited).string(value);
  else if (value instanceof Uint8Array) writer.tag(number, WireType.LengthDelimited).bytes(value);
  else if (typeof value === "number") {
    if (type === ScalarType.FLOAT) writer.tag(number, WireType.Bit32).float(value);
    else writer.tag(number, WireType.Bit64).double(value);
  } else writer.tag(number, WireType.Varint).uint64(BigInt.asUintN(64, BigInt(value)));
}

/** UTF-8, and for half a surrogate pair what UTF-8 forbids: its three bytes. */
function encodeText(text: string): Uint8Array {
  if (text.isWellFormed()) return Buffer.from(text);
  return Buffer.concat(
    Array.from(text, (character) => {
      const code = character.codePointAt(0) ?? 0;
      if (code < 0xd800 || code > 0xdfff) return Buffer.from(character);
      return Buffer.from([0xe0 | (code >> 12), 0x80 | ((code >> 6) & 0x3f), 0x80 | (code & 0x3f)]);
    }),
  );
}

/** The tree as JSON, as far as JSON can say it. Keys may come twice, and what is junk may be no JSON at all. */
export function toJsonText({ schema, parts }: MessageTree): string {
  const isTime = schema.typeName === "google.protobuf.Timestamp";
  if (isTime || schema.typeName === "google.protobuf.Duration") return timeText(parts, isTime);
  const members = parts.flatMap((part): string[] => {
    switch (part.kind) {
      case "values":
        if (part.field.fieldKind === "list")
          return [`${keyOf(part.field)}:[${part.values.map((value) => valueText(part.field, value)).join(",")}]`];
        return part.values.map((value) => `${keyOf(part.field)}:${valueText(part.field, value)}`);
      case "entries": {
        const entries = part.entries.map(
          ({ key = "", value = "" }) => `${JSON.stringify(String(key))}:${valueText(part.field, value)}`,
        );
        return [`${keyOf(part.field)}:{${entries.join(",")}}`];
      }
      case "junk":
        return [`${JSON.stringify(part.junk.key)}:${part.junk.json}`];
    }
  });
  return `{${members.join(",")}}`;
}

function keyOf(field: DescField): string {
  return JSON.stringify(field.jsonName);
}

function valueText(field: DescField, value: Value): string {
  if (isTree(value)) return toJsonText(value);
  if (value instanceof Uint8Array) return JSON.stringify(Buffer.from(value).toString("base64"));
  if (typeof value === "bigint") {
    const name = field.enum?.values.find(({ number }) => BigInt(number) === value)?.name;
    return name === undefined ? value.toString() : JSON.stringify(name);
  }
  if (typeof value === "number" && !Number.isFinite(value)) return JSON.stringify(String(value));
  return JSON.stringify(value);
}

function timeText(parts: readonly Part[], isTime: boolean): string {
  const [seconds = 0n, nanos = 0n] = parts.map((part) => {
    const value = part.kind === "values" ? part.values[0] : undefined;
    return typeof value === "bigint" ? value : undefined;
  });
  if (!isTime) return JSON.stringify(`${seconds}.${nanos}s`);
  const date = new Date(Number(seconds) * 1_000);
  return JSON.stringify(Number.isNaN(date.getTime()) ? `${seconds}-01-01T00:00:00Z` : date.toISOString());
}

function isTree(value: Value): value is MessageTree {
  return typeof value === "object" && "schema" in value;
}
