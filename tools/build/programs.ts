// The programs in the form that production runs: JavaScript, with the flags of Node that it is run with.
import { chmodSync, cpSync, mkdirSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { packageProgram, runTool } from "../check/run-tool.ts";

/** Where the build stands, in the checkout. */
export const buildFolder = "dist";

/** Tells how a built program is run. */
export type BuiltProgram = {
  /** The script in `dist/bin` that runs it. */
  readonly name: string;
  /** Its JavaScript, in `dist`. */
  readonly main: string;
  readonly nodeFlags: readonly string[];
};

/**
 * The programs of production. What dies young is collected from a nursery of some MiB instead of Node's 16, of which it
 * keeps three: at rest that is what most of the memory was. Smaller ones cost CPU, above all where logs pass:
 * docs/benchmarks.md has the figures.
 */
export const builtPrograms = {
  agent: {
    name: "clodei-agent",
    main: "agent/src/main.js",
    // A node's memory and cores are its tenants'.
    nodeFlags: ["--max-semi-space-size=4", "--optimize-for-size", "--v8-pool-size=1"],
  },
  controlPlane: {
    name: "clodei-control-plane",
    main: "control-plane/src/main.js",
    // With thousands of agents --optimize-for-size takes half as much CPU again: its heap may grow a little instead.
    nodeFlags: ["--max-semi-space-size=8", "--heap-growing-percent=25"],
  },
} as const satisfies Readonly<Record<string, BuiltProgram>>;

/** What Node is given to run a built program. */
export function nodeArguments(root: string, program: BuiltProgram): string[] {
  return [...program.nodeFlags, join(root, buildFolder, program.main)];
}

/** Builds everything anew into `dist`; what was there stays until that is done. Throws with the compiler's words. */
export async function buildPrograms(root: string): Promise<void> {
  const built = join(root, `${buildFolder}.new`);
  rmSync(built, { recursive: true, force: true });
  const parameters = ["--project", "tsconfig.build.json", "--outDir", built];
  const { ok, output } = await runTool(root, packageProgram(root, "tsc"), parameters);
  if (!ok) throw new Error(output);
  linkProto(root, built);
  // The control plane reads them beside its source.
  cpSync(join(root, "control-plane/migrations"), join(built, "control-plane/migrations"), { recursive: true });
  for (const program of Object.values(builtPrograms)) writeScript(built, program);
  rmSync(join(root, buildFolder), { recursive: true, force: true });
  renameSync(built, join(root, buildFolder));
}

/** Programs import the contract by its package's name: here that leads to what was built of it. */
function linkProto(root: string, built: string): void {
  const text = readFileSync(join(root, "proto/package.json"), "utf8");
  writeFileSync(join(built, "proto/package.json"), text.replaceAll('.ts"', '.js"'));
  const scope = join(built, "node_modules/@clodei");
  mkdirSync(scope, { recursive: true });
  symlinkSync("../../proto", join(scope, "proto"));
}

/** Runs under the Node that stands in the checkout, or under the one in the PATH. */
function writeScript(built: string, { name, main, nodeFlags }: BuiltProgram): void {
  const folder = join(built, "bin");
  mkdirSync(folder, { recursive: true });
  const path = join(folder, name);
  const command = ["node", ...nodeFlags, `"$built/${main}"`, '"$@"'].join(" ");
  writeFileSync(
    path,
    `#!/bin/sh
# Written by \`npm run build\`.
built=$(dirname "$(dirname "$(readlink -f "$0")")")
PATH="$built/../node_modules/.bin:$PATH"
exec ${command}
`,
  );
  chmodSync(path, 0o755);
}
