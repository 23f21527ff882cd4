// What `npm run generate` writes and `npm run check` compares: generated code and the descriptor image of our schemas.
import { createHash } from "node:crypto";
import { join } from "node:path";
import { packageProgram, runTool } from "../check/run-tool.ts";
import { writeValidateSchema } from "./validate-schema.ts";

/** The committed descriptor image that `buf breaking` compares with. */
export const imagePath = "proto/image.binpb";
/** Where validate.proto is printed to: buf.yaml names this folder as a module. */
export const printedSchemaFolder = ".cache/proto";

async function buf(root: string, parameters: readonly string[]): Promise<string> {
  const { ok, output } = await runTool(root, packageProgram(root, "buf"), parameters);
  if (!ok) throw new Error(`buf ${parameters[0] ?? ""} failed:\n${output}`);
  return output;
}

/** Makes ready what every use of buf needs: it reads validate.proto from a folder that git ignores. */
export function prepareSchema(root: string): void {
  writeValidateSchema(join(root, printedSchemaFolder));
}

/** Generates the code of all schemas below `folder` (which holds proto/gen afterwards). */
export async function generateCode(root: string, folder: string): Promise<void> {
  await buf(root, ["generate", "--output", folder]);
}

/** Builds the descriptor image without comments and positions: only what is on the wire and in options changes it. */
export async function buildImage(root: string, file: string): Promise<void> {
  await buf(root, ["build", "proto/schema", "--exclude-source-info", "--output", `${file}#format=binpb`]);
}

/** Builds a descriptor set with comments, for documents. */
export async function buildCommentedImage(root: string, file: string): Promise<void> {
  await buf(root, ["build", "proto/schema", "--output", `${file}#format=binpb`]);
}

/** Writes the schemas in buf's format. */
export async function formatSchema(root: string): Promise<void> {
  await buf(root, ["format", "--write", "proto/schema"]);
}

/** The sha256 of bytes, in hex. */
export function sha256Of(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}
