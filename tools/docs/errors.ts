// docs/errors.md, generated from the comments of the enums ErrorReason and InstanceReason, and the table of status codes.
import { readFileSync } from "node:fs";
import { fromBinary } from "@bufbuild/protobuf";
import { type FileDescriptorProto, FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { codeName, codeOfReason } from "../../control-plane/src/rpc/errors.ts";

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

/** The values of an enum but the unspecified one, without its prefix, and their comments as cells of a table. */
function valuesOf(file: FileDescriptorProto | undefined, enumName: string, prefix: string): [string, string][] {
  const enumIndex = file?.enumType.findIndex(({ name }) => name === enumName) ?? -1;
  const values = file?.enumType[enumIndex]?.value;
  if (file === undefined || values === undefined) throw new Error(`the schema has no enum ${enumName}`);
  return values.flatMap(({ name, number }, index) => {
    if (number === 0) return [];
    const comment = commentAt(file, [enumTypeField, enumIndex, enumValueField, index]);
    return [[name.replace(prefix, ""), comment.replaceAll("|", String.raw`\|`)]];
  });
}

/** Empty for a reason that was not generated yet: then the types tell that the table lacks it. */
function codeOf(reason: string): string {
  const code = Object.entries(codeOfReason).find(([name]) => name === reason)?.[1];
  return code === undefined ? "" : codeName(code);
}

/** The text of docs/errors.md, from a descriptor set that was built with comments. */
export function errorsDocumentOf(imageFile: string): string {
  const { file: files } = fromBinary(FileDescriptorSetSchema, readFileSync(imageFile));
  const fileOf = (name: string) => files.find((candidate) => candidate.name === name);
  const errors = valuesOf(fileOf("clodei/v1/error.proto"), "ErrorReason", "ERROR_REASON_");
  const instances = valuesOf(fileOf("clodei/v1/instance.proto"), "InstanceReason", "INSTANCE_REASON_");
  return [
    "# Errors",
    "",
    "Every error carries a `google.rpc.ErrorInfo` with the domain `clodei.com` and one of the reasons below. Branch on the",
    "reason, never on the text of a message. `BadRequest` names fields, `RetryInfo` says when to try again. The code is that",
    "of gRPC and Connect; the SDK has it beside the reason.",
    "",
    "This file is generated from the comments in `proto/schema/clodei/v1/` and the codes in",
    "`control-plane/src/rpc/errors.ts` by `npm run generate`.",
    "",
    "| reason | code | meaning |",
    "|---|---|---|",
    ...errors.map(([name, comment]) => `| \`${name}\` | ${codeOf(name)} | ${comment} |`),
    "",
    "## Reasons of instances",
    "",
    "Why an instance is in its state, beside a message for a person: `reason` of an instance and of its events, and",
    "`instanceReason` of the SDK's `InstanceEndedError`.",
    "",
    "| reason | meaning |",
    "|---|---|",
    ...instances.map(([name, comment]) => `| \`${name}\` | ${comment} |`),
    "",
  ].join("\n");
}
