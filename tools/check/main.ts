// `npm run check`: runs every kind and names every one that failed.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { watchParent } from "../setup/child.mjs";
import { prepareSchema } from "../schema/schema.ts";
import { codeKinds } from "./code-kinds.ts";
import { documentKinds } from "./document-kinds.ts";
import type { Kind, Outcome } from "./kind.ts";
import { schemaKinds } from "./schema-kinds.ts";

const kinds: readonly Kind[] = [...codeKinds, ...schemaKinds, ...documentKinds];
/** Kinds at once: most tools use more than one core for a moment, and two cores are what we count on. */
const kindsAtOnce = 3;

const help = `usage: npm run check [-- KIND ...]

Runs every kind of check, or those named, and names each that failed.

${kinds.map(({ name, what }) => `  ${name.padEnd(16)}${what}`).join("\n")}`;

async function runKind(root: string, kind: Kind): Promise<boolean> {
  const startMs = performance.now();
  const temporaryFolder = mkdtempSync(join(tmpdir(), "clodei-check-"));
  let outcome: Outcome;
  try {
    outcome = await kind.run({ root, temporaryFolder });
  } catch (error) {
    outcome = { ok: false, output: error instanceof Error ? error.message : String(error) };
  } finally {
    rmSync(temporaryFolder, { recursive: true, force: true });
  }
  const seconds = `${((performance.now() - startMs) / 1000).toFixed(1)} s`.padStart(7);
  if (outcome.ok) {
    console.log(`ok      ${kind.name.padEnd(16)}${seconds}${outcome.note === undefined ? "" : `  ${outcome.note}`}`);
  } else {
    console.log(`FAILED  ${kind.name.padEnd(16)}${seconds}\n${outcome.output.trim().replaceAll(/^/gmu, "        ")}`);
  }
  return outcome.ok;
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { help: { type: "boolean", short: "h" } },
  });
  if (values.help === true) {
    console.log(help);
    return 0;
  }
  const unknown = positionals.filter((name) => kinds.every((kind) => kind.name !== name));
  if (unknown.length > 0) {
    console.error(`no kind of check is called ${unknown.join(", ")}\n\n${help}`);
    return 2;
  }
  const root = dirname(dirname(import.meta.dirname));
  prepareSchema(root);
  const wanted = kinds.filter(({ name }) => positionals.length === 0 || positionals.includes(name));
  const waiting = [...wanted];
  const failed: string[] = [];
  const work = async (): Promise<void> => {
    for (let kind = waiting.shift(); kind !== undefined; kind = waiting.shift()) {
      if (!(await runKind(root, kind))) failed.push(kind.name);
    }
  };
  await Promise.all(Array.from({ length: kindsAtOnce }, work));
  const names = wanted.map(({ name }) => name).filter((name) => failed.includes(name));
  if (names.length === 0) console.log(`check: all ${wanted.length} kinds passed`);
  else console.log(`check: ${names.length} of ${wanted.length} kinds failed: ${names.join(", ")}`);
  return names.length === 0 ? 0 : 1;
}

watchParent(() => process.exit(1));
process.exitCode = await main();
