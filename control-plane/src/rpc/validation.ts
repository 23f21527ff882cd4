// The rules of fields stand in the schema. A request that breaks some is refused before its handler sees it, and
// told all of them: which field, which rule, and what is allowed.
import { create, type DescMessage, type DescMethod, type Message } from "@bufbuild/protobuf";
import { pathToString } from "@bufbuild/protobuf/reflect";
import { createValidator, type Validator, type Violation } from "@bufbuild/protovalidate";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError, type FieldViolation } from "../platform/errors.ts";
import { patternWords } from "./pattern-words.ts";

/** A request of 4 MiB can break a rule very often; the caller mends them one by one anyway. */
const maxViolations = 32;

/** Checks messages against the rules in their schemas. */
export class RequestValidator {
  readonly #validator: Validator = createValidator();

  /** @throws DomainError INVALID_ARGUMENT with a violation for each rule that the message breaks. */
  check(schema: DescMessage, message: Message): void {
    const result = this.#validator.validate(schema, message);
    switch (result.kind) {
      case "valid": {
        const field = unstorableField(message, "");
        if (field === undefined) return;
        const told = { field, rule: "string.storable", message: "must be Unicode text without the character U+0000" };
        throw new DomainError(ErrorReason.INVALID_ARGUMENT, `${field}: ${told.message}`, { fields: [told] });
      }
      case "invalid": {
        const fields = withoutEchoes(result.violations).slice(0, maxViolations).map(toFieldViolation);
        const text = fields.map(({ field, message: rule }) => (field === "" ? rule : `${field}: ${rule}`)).join("; ");
        throw new DomainError(ErrorReason.INVALID_ARGUMENT, text, { fields });
      }
      case "error":
        throw result.error;
    }
  }

  /** Compiles the rules of the methods' requests: the first check of a schema costs 60 to 270 ms. */
  warmUp(methods: Iterable<DescMethod>): void {
    for (const { input } of methods) {
      // What an empty message breaks does not matter. A rule that does not compile does, and comes as "error".
      const result = this.#validator.validate(input, create(input));
      if (result.kind === "error") throw result.error;
    }
  }
}

/**
 * The field of a text that PostgreSQL cannot hold (NUL, half a surrogate pair), which would come back as an error of
 * ours. No schema can say it: its rules let through whatever is UTF-8.
 */
function unstorableField(value: object, path: string): string | undefined {
  if (value instanceof Uint8Array) return undefined;
  const entries: [string, unknown][] = Object.entries(value);
  for (const [key, item] of entries) {
    // A field's own name, or the key of a map.
    const field = `${path}${path === "" ? "" : "."}${key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)}`;
    if (!isStorable(key)) return path;
    if (typeof item === "string" && !isStorable(item)) return field;
    const found = typeof item === "object" && item !== null ? unstorableField(item, field) : undefined;
    if (found !== undefined) return found;
  }
  return undefined;
}

function isStorable(text: string): boolean {
  return !text.includes("\0") && text.isWellFormed();
}

function toFieldViolation(violation: Violation): FieldViolation {
  return { field: pathOf(violation), rule: violation.ruleId, message: messageOf(violation) };
}

/** A text that must not be empty and is breaks the pattern as well, which says nothing more. */
function withoutEchoes(violations: readonly Violation[]): readonly Violation[] {
  const empty = new Set(violations.filter(({ ruleId }) => ruleId === "string.min_len").map(pathOf));
  return violations.filter((violation) => violation.ruleId !== "string.pattern" || !empty.has(pathOf(violation)));
}

function pathOf({ field }: Violation): string {
  return pathToString(field);
}

/** The library's sentence says what is allowed, but for patterns and enums, and for texts that are missing. */
function messageOf(violation: Violation): string {
  switch (violation.ruleId) {
    case "required":
      return "must be given";
    case "string.min_len":
      return violation.message === "must be at least 1 characters" ? "must not be empty" : violation.message;
    case "string.pattern":
      return wordsOfPattern(violation.message) ?? violation.message;
    case "enum.defined_only":
    case "enum.not_in":
      return `must be one of ${namesOfEnum(violation).join(", ")}`;
    default:
      return violation.message;
  }
}

/** The violation itself tells the pattern in its sentence alone. */
function wordsOfPattern(message: string): string | undefined {
  const allowed = patternWords.get(/`(?<pattern>.*)`$/su.exec(message)?.groups?.["pattern"] ?? "");
  return allowed && `must be ${allowed.words}, such as "${allowed.example}"`;
}

function namesOfEnum({ field }: Violation): readonly string[] {
  const last = field.findLast((part) => part.kind === "field");
  const values = last?.kind === "field" ? (last.enum?.values ?? []) : [];
  return values.filter(({ number }) => number !== 0).map(({ name }) => name);
}
