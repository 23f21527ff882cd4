// Kinds about the schema: its format, its lint, its compatibility, and that what is generated from it is fresh.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { newestSchemaRecord } from "../schema/decisions.ts";
import { buildImage, generateCode, imagePath, sha256Of } from "../schema/schema.ts";
import type { CheckContext, Kind, Outcome } from "./kind.ts";
import { packageProgram, runTool } from "./run-tool.ts";

/** How an addition to the schema is accepted; docs/adding-an-rpc.md tells it too. */
export const acceptCommand = `npm run generate -- --accept-schema "WHY"`;

async function runBuf(context: CheckContext, parameters: readonly string[]): Promise<Outcome> {
  const result = await runTool(context.root, packageProgram(context.root, "buf"), parameters);
  return result.ok ? { ok: true } : { ok: false, output: result.output };
}

/** Why the committed image cannot be trusted as what was decided, if so. */
function imageProblem(root: string): string | undefined {
  if (!existsSync(join(root, imagePath))) return `${imagePath} is missing: ${acceptCommand}`;
  const record = newestSchemaRecord(root);
  if (record === undefined) return `no decision record about the schema: ${acceptCommand}`;
  if (record.digest === undefined) return `${record.file} has no line "Image: sha256 ..."`;
  const digest = sha256Of(readFileSync(join(root, imagePath)));
  if (digest === record.digest) return undefined;
  return `${imagePath} has the sha256 ${digest}, but ${record.file} accepted ${record.digest}`;
}

async function checkBreaking(context: CheckContext): Promise<Outcome> {
  const problem = imageProblem(context.root);
  if (problem !== undefined) return { ok: false, output: problem };
  const breaking = await runBuf(context, ["breaking", "proto/schema", "--against", imagePath]);
  if (!breaking.ok) {
    return { ok: false, output: `${breaking.output}\nA breaking change needs a new package version (clodei.v2).` };
  }
  const current = join(context.temporaryFolder, "image.binpb");
  await buildImage(context.root, current);
  if (readFileSync(current).equals(readFileSync(join(context.root, imagePath)))) return { ok: true };
  return { ok: false, output: `the schema has additions that ${imagePath} lacks; accept them: ${acceptCommand}` };
}

function filesBelow(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(folder.length + 1))
    .sort();
}

async function checkGenerated(context: CheckContext): Promise<Outcome> {
  await generateCode(context.root, context.temporaryFolder);
  const [fresh, committed] = [join(context.temporaryFolder, "proto/gen"), join(context.root, "proto/gen")];
  const names = { fresh: filesBelow(fresh), committed: existsSync(committed) ? filesBelow(committed) : [] };
  const stale = [
    ...names.fresh.filter((name) => !names.committed.includes(name)).map((name) => `proto/gen/${name} is missing`),
    ...names.committed.filter((name) => !names.fresh.includes(name)).map((name) => `proto/gen/${name} has no schema`),
    ...names.fresh
      .filter((name) => names.committed.includes(name))
      .filter((name) => !readFileSync(join(fresh, name)).equals(readFileSync(join(committed, name))))
      .map((name) => `proto/gen/${name} is stale`),
  ];
  if (stale.length === 0) return { ok: true, note: `${names.fresh.length} files` };
  return { ok: false, output: `${stale.join("\n")}\nrun: npm run generate` };
}

/** The kinds about the schema, in the order in which they are printed. */
export const schemaKinds: readonly Kind[] = [
  {
    name: "schema-format",
    what: "schemas stand in buf's format",
    run: (context) => runBuf(context, ["format", "--diff", "--exit-code", "proto/schema"]),
  },
  {
    name: "schema-lint",
    what: "schemas follow buf's STANDARD and COMMENTS rules",
    run: (context) => runBuf(context, ["lint"]),
  },
  {
    name: "schema-breaking",
    what: "schemas break nothing, and the newest decision record names the image they are compared with",
    run: checkBreaking,
  },
  { name: "generated", what: "proto/gen is what the schemas generate", run: checkGenerated },
];
