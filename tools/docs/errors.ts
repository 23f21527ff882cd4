// docs/errors.md, generated from the comments of the enum ErrorReason.
import { readFileSync } from "node:fs";
import { fromBinary } from "@bufbuild/protobuf";
import { type FileDescriptorProto, FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";

/** The document, relative to the checkout. */
export const errorsDocument = "docs/errors.md";

/** Field numbers of FileDescriptorProto.enum_type and EnumDescriptorProto.value: the path of a value's comment. */
const enumTypeField = 5;
const enumValueField = 2;

function commentAt(file: FileDescriptorProto, path: readonly number[]): string {
  const key = path.join(".");
  const location = file.sourceCodeInfo?.location.find((candidate) => candidate.path.join(".") === key);
  return (location?.leadingComments ?? "").trim().replaceAll(/\s*\n\s*/gu, " ");
}

/** The text of docs/errors.md, from a descriptor set that was built with comments. */
export function errorsDocumentOf(imageFile: string): string {
  const { file: files } = fromBinary(FileDescriptorSetSchema, readFileSync(imageFile));
  const file = files.find((candidate) => candidate.name === "clodei/v1/error.proto");
  const enumIndex = file?.enumType.findIndex((candidate) => candidate.name === "ErrorReason") ?? -1;
  const reasons = file?.enumType[enumIndex];
  if (file === undefined || reasons === undefined) throw new Error("clodei/v1/error.proto has no enum ErrorReason");
  const rows = reasons.value.flatMap((value, index) => {
    if (value.number === 0) return [];
    const comment = commentAt(file, [enumTypeField, enumIndex, enumValueField, index]);
    const name = value.name.replace(/^ERROR_REASON_/u, "");
    return [`| \`${name}\` | ${comment.replaceAll("|", String.raw`\|`)} |`];
  });
  return [
    "# Errors",
    "",
    "Every error carries a `google.rpc.ErrorInfo` with the domain `clodei.com` and one of the reasons below. Branch on the",
    "reason, never on the text of a message. `BadRequest` names fields, `RetryInfo` says when to try again.",
    "",
    "This file is generated from the comments in `proto/schema/clodei/v1/error.proto` by `npm run generate`.",
    "",
    "| reason | meaning |",
    "|---|---|",
    ...rows,
    "",
  ].join("\n");
}
