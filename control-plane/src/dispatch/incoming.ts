// Every message of an agent passes here before anything looks at it: decoded, made storable, and checked against
// the rules of its schema. An agent is authenticated, not trusted: what PostgreSQL cannot hold would otherwise fail
// its transaction at every resend, and the node's journal would never drain.
import { create, fromBinary, type DescMessage, type MessageShape } from "@bufbuild/protobuf";
import { createValidator } from "@bufbuild/protovalidate";

/** A message that came in, or why it is none. */
export type Received<D extends DescMessage> =
  | { readonly kind: "message"; readonly message: MessageShape<D>; readonly bytes: number }
  | { readonly kind: "violation"; readonly text: string };

/** Decodes and checks a message. */
export type MessageCheck = <D extends DescMessage>(schema: D, bytes: Uint8Array) => Received<D>;

/** How many violations one Goodbye names. */
const maxNamedViolations = 8;
/** The greatest int8 of PostgreSQL. */
const maxInt8 = 2n ** 63n - 1n;
/** 0001-01-01 and 9999-12-31T23:59:59, the bounds of google.protobuf.Timestamp. */
const minTimestampSeconds = -62_135_596_800n;
const maxTimestampSeconds = 253_402_300_799n;

/**
 * Makes the check for these kinds of messages. Compiles their rules now, which takes a second or two: the first agent
 * after a start would wait for it, and with it every other one.
 */
export function createMessageCheck(schemas: readonly DescMessage[]): MessageCheck {
  const validator = createValidator();
  for (const schema of withParts(schemas)) {
    const result = validator.validate(schema, create(schema));
    if (result.kind === "error") throw result.error;
  }
  return (schema, bytes) => {
    let message: MessageShape<typeof schema>;
    try {
      message = fromBinary(schema, bytes);
    } catch {
      return { kind: "violation", text: `not a ${schema.typeName}` };
    }
    const unstorable = makeStorable(message, "");
    if (unstorable !== undefined) return { kind: "violation", text: unstorable };
    const result = validator.validate(schema, message);
    switch (result.kind) {
      case "valid":
        return { kind: "message", message, bytes: bytes.byteLength };
      case "invalid":
        return {
          kind: "violation",
          text: result.violations
            .slice(0, maxNamedViolations)
            .map((violation) => violation.toString())
            .join("; "),
        };
      case "error":
        throw result.error;
    }
  };
}

/** The messages, and those that stand in their fields. */
function withParts(schemas: readonly DescMessage[]): ReadonlySet<DescMessage> {
  const found = new Set<DescMessage>();
  const queue = [...schemas];
  for (let schema = queue.pop(); schema !== undefined; schema = queue.pop()) {
    if (found.has(schema)) continue;
    found.add(schema);
    queue.push(...schema.fields.flatMap((field) => field.message ?? []));
  }
  return found;
}

/**
 * Replaces what text in PostgreSQL cannot hold (NUL), in place, and names the first number or time that no column
 * can hold. A NUL is replaced and not refused: a tool's output, quoted in a message, may honestly contain one.
 */
function makeStorable(value: object, path: string): string | undefined {
  if (value instanceof Uint8Array) return undefined;
  if (isTimestamp(value) && (value.seconds < minTimestampSeconds || value.seconds > maxTimestampSeconds)) {
    return `${path}: outside the years 1 to 9999`;
  }
  // Keys and not entries: a pair for each field of each heartbeat is a fifth of what checking one costs.
  for (const key of Object.keys(value)) {
    const item: unknown = Reflect.get(value, key);
    if (typeof item === "string") {
      if (item.includes("\0")) Reflect.set(value, key, item.replaceAll("\0", "\u{fffd}"));
    } else if (typeof item === "bigint") {
      if (item > maxInt8) return `${path}.${key}: must be below 2^63`;
    } else if (typeof item === "object" && item !== null) {
      const found = makeStorable(item, path === "" ? key : `${path}.${key}`);
      if (found !== undefined) return found;
    }
  }
  return undefined;
}

function isTimestamp(value: object): value is { seconds: bigint } {
  return (
    "$typeName" in value &&
    value.$typeName === "google.protobuf.Timestamp" &&
    "seconds" in value &&
    typeof value.seconds === "bigint"
  );
}
