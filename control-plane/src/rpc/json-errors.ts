// A body of JSON that does not fit its message is refused by the library, which names a message's type and at most a
// field of it. Where that type stands in one place of the request, this tells the field's path, as for every other rule;
// where it stands in several, the message that they are all in, and which they are.
import type { DescMessage } from "@bufbuild/protobuf";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";

/** Deeper than any request of ours. */
const maxDepth = 8;

/** The two types that JSON writes as texts, in the words of who writes them. */
const allowedTexts: Readonly<Record<string, string>> = {
  "google.protobuf.Duration": 'must be a duration in seconds, such as "3.5s"',
  "google.protobuf.Timestamp": 'must be a time, such as "2026-01-31T12:00:00Z"',
};

/** The error with the field that it is about; undefined where the text is not of JSON, or about the whole request. */
export function explainJsonError(request: DescMessage, text: string): DomainError | undefined {
  const { type, why } =
    /^cannot decode (?:field|message|enum) (?<type>\S+) from JSON: (?<why>.*)$/su.exec(text)?.groups ?? {};
  if (type === undefined || why === undefined) return undefined;
  const unknown = /^key "(?<name>.*)" is unknown$/su.exec(why)?.groups?.["name"];
  const found = [...places(request, [])].filter(({ of }) => of === type).map((place) => place.path);
  const shared = sharedPath(found);
  const field = [...shared, ...(unknown === undefined || found.length > 1 ? [] : [unknown])].join(".");
  if (field === "") return undefined;
  const which = found.map((path) => path.slice(shared.length).join(".")).join(", ");
  const message = unknown === undefined ? toldOf(type, why) : "there is no such field";
  return told(found.length === 1 ? message : `in one of ${which}: ${message}`, field, text);
}

function told(message: string, field: string, text: string): DomainError {
  return new DomainError(ErrorReason.INVALID_ARGUMENT, text, { fields: [{ field, rule: "json", message }] });
}

function toldOf(type: string, why: string): string {
  const allowed = allowedTexts[type];
  if (allowed === undefined) return why;
  // Either a sentence, or the value.
  return /^(?:invalid|must) /u.test(why) ? `${allowed}: ${why}` : `${allowed}, not ${why}`;
}

/** The names that all of the paths begin with. */
function sharedPath(paths: readonly (readonly string[])[]): readonly string[] {
  const [first = [], ...others] = paths;
  const end = first.findIndex((name, index) => others.some((other) => other[index] !== name));
  return end === -1 ? first : first.slice(0, end);
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
