/**
 * What no message can hold, refused before anything is sent: the transport would take the failed encoding for a lost
 * connection, and whatever it does encode for what was meant. TypeScript finds most of it; JavaScript and `any` do
 * not. What a message can hold and the API does not allow is the server's to say.
 */
import { type DescField, type DescMessage, type MessageInitShape, ScalarType } from "@bufbuild/protobuf";
import { isFieldError, reflect } from "@bufbuild/protobuf/reflect";
import { ClodeiError, type FieldViolation } from "./errors.ts";

/** A list can break a rule very often; the caller mends the rule once. */
const maxViolations = 32;

/** Throws INVALID_ARGUMENT with these violations, if there are any. */
export function refuseFields(violations: readonly FieldViolation[]): void {
  if (violations.length === 0) return;
  const fieldViolations = violations.slice(0, maxViolations);
  const text = fieldViolations.map(({ field, message }) => `${field}: ${message}`).join("; ");
  throw new ClodeiError("invalid_argument", "INVALID_ARGUMENT", text, { fieldViolations });
}

/**
 * Refuses a request that is no message of the schema.
 *
 * @throws ClodeiError with INVALID_ARGUMENT and the fields.
 */
export function checkRequest<D extends DescMessage>(schema: D, init: MessageInitShape<D> | undefined): void {
  refuseFields(violationsOf(schema, init ?? {}, ""));
}

/** Passes on what no message can hold, so that the check of the request refuses it, and names its field. */
export function unwritable(value: unknown): never {
  return value as never;
}

/** The fields of what a message is to be made of that it cannot hold, and those that it does not have. */
export function violationsOf(schema: DescMessage, init: unknown, path: string): FieldViolation[] {
  if (!isObject(init)) return [notA(objectWords[schema.typeName] ?? "an object", init, path, "message")];
  const names = ["$typeName", "$unknown", ...schema.members.map(({ localName }) => localName)];
  const known = schema.fields.flatMap((field) => {
    const value = valueIn(init, field);
    // What is null counts as absent when a message is made.
    if (value === undefined || value === null) return [];
    return fieldViolations(field, value, join(path, field.name));
  });
  return [...unknownFields(init, names, path), ...known];
}

/** The fields of an object that have none of these names. */
export function unknownFields(object: unknown, names: readonly string[], path: string): FieldViolation[] {
  if (!isObject(object)) return [];
  return Object.keys(object)
    .filter((key) => object[key] !== undefined && !names.includes(key))
    .map((key) => ({
      field: join(path, key),
      rule: "unknown_field",
      message: `is not known; allowed are ${names.filter((name) => !name.startsWith("$")).join(", ")}`,
    }));
}

/** The names of an options object: all of them, or this does not compile. */
export function optionNames<T extends object>(names: Readonly<Record<keyof T, true>>): readonly string[] {
  return Object.keys(names);
}

/**
 * Refuses options that do not exist: a mistyped filter that is dropped in silence lists everything.
 *
 * @throws ClodeiError with INVALID_ARGUMENT and the names.
 */
export function checkOptions(options: unknown, names: readonly string[], path = ""): void {
  if (!isObject(options)) refuseFields([notA("an object", options, path === "" ? "options" : path, "message")]);
  refuseFields(unknownFields(options, names, path));
}

/** What a caller of the SDK gives where the schema has a message of these types. */
const objectWords: Readonly<Record<string, string>> = {
  "google.protobuf.Duration": "a number of seconds",
  "google.protobuf.Timestamp": "a valid Date",
};

function valueIn(init: Readonly<Record<string, unknown>>, field: DescField): unknown {
  if (field.oneof === undefined) return init[field.localName];
  const selected = init[field.oneof.localName];
  return isObject(selected) && selected["case"] === field.localName ? selected["value"] : undefined;
}

function fieldViolations(field: DescField, value: unknown, path: string): FieldViolation[] {
  const message = reflect(field.parent);
  switch (field.fieldKind) {
    case "message":
      return violationsOf(field.message, value, path);
    case "list":
      if (!Array.isArray(value)) return [notA("a list", value, path, "repeated")];
      return value.flatMap((item: unknown, index) => {
        const itemPath = `${path}[${index}]`;
        if (field.listKind === "message") return violationsOf(field.message, item, itemPath);
        return valueViolations(field, item, itemPath, () => message.get(field).add(item));
      });
    case "map":
      if (!isObject(value)) return [notA("an object", value, path, "map")];
      return Object.entries(value).flatMap(([key, item]) => {
        const itemPath = `${path}[${JSON.stringify(key)}]`;
        if (field.mapKind === "message") return violationsOf(field.message, item, itemPath);
        return valueViolations(field, item, itemPath, () => message.get(field).set(key, item));
      });
    case "scalar":
    case "enum":
      return valueViolations(field, value, path, () => message.set(field, value));
  }
}

/** Whether a message can hold a value is protobuf's own word: `write` puts it into an empty one. */
function valueViolations(field: DescField, value: unknown, path: string, write: () => void): FieldViolation[] {
  try {
    write();
    return [];
  } catch (error) {
    if (!isFieldError(error)) throw error;
  }
  if (field.enum !== undefined) {
    const names = field.enum.values.filter(({ number }) => number !== 0).map(({ localName }) => localName);
    const given = typeof value === "string" ? JSON.stringify(value) : shown(value);
    return [{ field: path, rule: "enum", message: `must be one of ${names.join(", ")}, not ${given}` }];
  }
  const scalar = field.scalar ?? ScalarType.STRING;
  return [notA(scalarWords[scalar], value, path, ScalarType[scalar].toLowerCase())];
}

const scalarWords: Readonly<Record<ScalarType, string>> = {
  [ScalarType.DOUBLE]: "a number",
  [ScalarType.FLOAT]: "a number",
  [ScalarType.INT64]: "a whole number of 64 bits",
  [ScalarType.UINT64]: "a whole number of 64 bits from 0",
  [ScalarType.INT32]: "a whole number of 32 bits",
  [ScalarType.FIXED64]: "a whole number of 64 bits from 0",
  [ScalarType.FIXED32]: "a whole number from 0 to 4294967295",
  [ScalarType.BOOL]: "true or false",
  [ScalarType.STRING]: "a string",
  [ScalarType.BYTES]: "a Uint8Array",
  [ScalarType.UINT32]: "a whole number from 0 to 4294967295",
  [ScalarType.SFIXED32]: "a whole number of 32 bits",
  [ScalarType.SFIXED64]: "a whole number of 64 bits",
  [ScalarType.SINT32]: "a whole number of 32 bits",
  [ScalarType.SINT64]: "a whole number of 64 bits",
};

function notA(allowed: string, value: unknown, field: string, rule: string): FieldViolation {
  return { field, rule, message: `must be ${allowed}, not ${shown(value)}` };
}

/** Texts are not shown: they may be secret. */
function shown(value: unknown): string {
  if (typeof value === "string") return value.isWellFormed() ? "a string" : "half a surrogate pair";
  if (typeof value === "function" || typeof value === "symbol") return `a ${typeof value}`;
  if (typeof value !== "object" || value === null || value instanceof Date) return String(value);
  if (isObject(value)) return "an object";
  return Array.isArray(value) ? "a list" : `a ${Object.prototype.toString.call(value).slice("[object ".length, -1)}`;
}

function join(path: string, name: string): string {
  return path === "" ? name : `${path}.${name}`;
}

/** No list, no Map, no Date: their contents would be lost. */
export function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return Object.prototype.toString.call(value) === "[object Object]";
}
