// The rules of fields stand in the schema. A request that breaks some is refused before its handler sees it, and
// told all of them: which field, which rule, and what is allowed.
import { create, type DescMessage, type DescMethod, type Message } from "@bufbuild/protobuf";
import { pathToString } from "@bufbuild/protobuf/reflect";
import { createValidator, type Validator, type Violation } from "@bufbuild/protovalidate";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError, type FieldViolation } from "../platform/errors.ts";

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
        const fields = result.violations.slice(0, maxViolations).map(toFieldViolation);
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
  return { field: pathToString(violation.field), rule: violation.ruleId, message: messageOf(violation) };
}

/** The library's sentence says what is allowed, but for enums, where the names are missing. */
function messageOf(violation: Violation): string {
  const last = violation.field.findLast((part) => part.kind === "field");
  if (last?.kind !== "field" || violation.ruleId.split(".")[0] !== "enum") return violation.message;
  const enumeration = "enum" in last ? last.enum : undefined;
  if (enumeration === undefined) return violation.message;
  const names = enumeration.values.filter(({ number }) => number !== 0).map(({ name }) => name);
  return `${violation.message}: one of ${names.join(", ")}`;
}
