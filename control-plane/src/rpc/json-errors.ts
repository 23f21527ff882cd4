// A body of JSON that does not fit its message is refused by the library, which names a message's type and at most a
// field of it. Where that type stands in one place of the request, this tells the field's path, as for every other rule.
import type { DescMessage } from "@bufbuild/protobuf";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";

/** Deeper than any request of ours. */
const maxDepth = 8;

/** The error with the field that it is about; undefined where the text is not of JSON, or names no single field. */
export function explainJsonError(request: DescMessage, text: string): DomainError | undefined {
  const { type, why } =
    /^cannot decode (?:field|message|enum) (?<type>\S+) from JSON: (?<why>.*)$/su.exec(text)?.groups ?? {};
  if (type === undefined || why === undefined) return undefined;
  const unknown = /^key "(?<name>.*)" is unknown$/su.exec(why)?.groups?.["name"];
  const [path, ...others] = [...places(request, [])].filter(({ of }) => of === type).map((place) => place.path);
  if (path === undefined || others.length > 0) return undefined;
  const field = [...path, ...(unknown === undefined ? [] : [unknown])].join(".");
  if (field === "") return undefined;
  const message = unknown === undefined ? why : "there is no such field";
  return new DomainError(ErrorReason.INVALID_ARGUMENT, text, { fields: [{ field, rule: "json", message }] });
}

type Place = { readonly path: readonly string[]; readonly of: string };

/** Every message, field and enum of a request, by the names that the library gives them. */
function* places(message: DescMessage, path: readonly string[]): Generator<Place> {
  yield { path, of: message.typeName };
  if (path.length > maxDepth) return;
  for (const field of message.fields) {
    const at = [...path, field.name];
    yield { path: at, of: `${message.typeName}.${field.name}` };
    if (field.enum !== undefined) yield { path: at, of: field.enum.typeName };
    if (field.message !== undefined) yield* places(field.message, at);
  }
}
