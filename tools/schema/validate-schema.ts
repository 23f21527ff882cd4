// Prints buf/validate/validate.proto from the descriptor inside @bufbuild/protovalidate, which ships no .proto file:
// linting and generating then need no network, and the rules are those of the library that enforces them.
// Options on the rules' own fields are left out: they are evaluated from the library, never from this print.
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import {
  type DescriptorProto,
  type EnumDescriptorProto,
  type FieldDescriptorProto,
  FieldDescriptorProto_Label as Label,
  FieldDescriptorProto_Type as Type,
} from "@bufbuild/protobuf/wkt";
import { file_buf_validate_validate as file } from "@bufbuild/protovalidate/gen/buf/validate/validate_pb.js";

const scalarNames: Partial<Record<Type, string>> = {
  [Type.DOUBLE]: "double",
  [Type.FLOAT]: "float",
  [Type.INT64]: "int64",
  [Type.UINT64]: "uint64",
  [Type.INT32]: "int32",
  [Type.FIXED64]: "fixed64",
  [Type.FIXED32]: "fixed32",
  [Type.BOOL]: "bool",
  [Type.STRING]: "string",
  [Type.BYTES]: "bytes",
  [Type.UINT32]: "uint32",
  [Type.SFIXED32]: "sfixed32",
  [Type.SFIXED64]: "sfixed64",
  [Type.SINT32]: "sint32",
  [Type.SINT64]: "sint64",
};

const labels: Record<Label, string> = {
  [Label.OPTIONAL]: "optional ",
  [Label.REQUIRED]: "required ",
  [Label.REPEATED]: "repeated ",
};

const indent = (lines: string[]): string[] => lines.map((line) => `  ${line}`);

function printField(field: FieldDescriptorProto, message: DescriptorProto | undefined): string {
  const inOneof = message !== undefined && Object.hasOwn(field, "oneofIndex");
  const mapEntry = message?.nestedType.find(
    (nested) => nested.options?.mapEntry === true && field.typeName.endsWith(`.${message.name}.${nested.name}`),
  );
  if (mapEntry !== undefined) {
    const [key, value] = mapEntry.field.map((entry) => scalarNames[entry.type] ?? entry.typeName);
    return `map<${key}, ${value}> ${field.name} = ${field.number};`;
  }
  const type = scalarNames[field.type] ?? field.typeName;
  const fallback = field.defaultValue === "" ? "" : ` [default = ${field.defaultValue}]`;
  return `${inOneof ? "" : labels[field.label]}${type} ${field.name} = ${field.number}${fallback};`;
}

function printEnum(descriptor: EnumDescriptorProto): string[] {
  const values = descriptor.value.map((value) => `${value.name} = ${value.number};`);
  return [`enum ${descriptor.name} {`, ...indent(values), "}"];
}

function printMessage(message: DescriptorProto): string[] {
  const body: string[] = [];
  for (const nested of message.enumType) body.push(...printEnum(nested));
  for (const nested of message.nestedType) {
    if (nested.options?.mapEntry !== true) body.push(...printMessage(nested));
  }
  for (const range of message.reservedRange) body.push(`reserved ${range.start} to ${range.end - 1};`);
  for (const name of message.reservedName) body.push(`reserved "${name}";`);
  for (const range of message.extensionRange) {
    body.push(`extensions ${range.start} to ${range.end > 500_000_000 ? "max" : range.end - 1};`);
  }
  for (const field of message.field) {
    if (!Object.hasOwn(field, "oneofIndex")) body.push(printField(field, message));
  }
  message.oneofDecl.forEach((oneof, index) => {
    const fields = message.field.filter((field) => Object.hasOwn(field, "oneofIndex") && field.oneofIndex === index);
    body.push(`oneof ${oneof.name} {`, ...indent(fields.map((field) => printField(field, message))), "}");
  });
  return [`message ${message.name} {`, ...indent(body), "}"];
}

function printFile(): string {
  const { proto } = file;
  // An absent syntax means proto2.
  if (proto.syntax !== "" && proto.syntax !== "proto2") {
    throw new Error(`validate.proto is now in ${proto.syntax}: teach this printer`);
  }
  const lines = [
    `syntax = "proto2";`,
    `package ${proto.package};`,
    ...proto.dependency.map((dependency) => `import "${dependency}";`),
    ...proto.enumType.flatMap(printEnum),
    ...proto.messageType.flatMap(printMessage),
    ...proto.extension.flatMap((field) => [`extend ${field.extendee} {`, `  ${printField(field, undefined)}`, "}"]),
  ];
  return `${lines.join("\n")}\n`;
}

/** Writes buf/validate/validate.proto below `folder`, unless it stands there as it should. */
export function writeValidateSchema(folder: string): void {
  const target = join(folder, file.proto.name);
  const text = printFile();
  if (existsSync(target) && readFileSync(target, "utf8") === text) return;
  mkdirSync(dirname(target), { recursive: true });
  // By renaming: another check may be reading it.
  const temporary = `${target}.${process.pid}`;
  writeFileSync(temporary, text);
  renameSync(temporary, target);
}
