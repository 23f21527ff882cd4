// `npm test`: every test file of every package, each in a process of its own.
import { availableParallelism } from "node:os";
import { dirname } from "node:path";
import { parseArgs } from "node:util";
import { watchParent } from "../setup/child.mjs";
import { findTestFiles } from "./files.ts";
import type { FileResult } from "./result.ts";
import { endGroup, runFile } from "./run-file.ts";

/** Light files at once: a PostgreSQL and a Docker engine beside each must still fit. */
const maxFilesAtOnce = 2;
const lightTimeoutMs = 10 * 60_000;
const heavyTimeoutMs = 20 * 60_000;
/** How often a long file says that it still runs. */
const stillRunningMs = 60_000;

const help = `usage: npm test [-- PATTERN ...] [--name PATTERN] [--verbose]

Runs the test files whose path matches a PATTERN (a regular expression), or all.
The last line says how many tests passed and failed.

  --name PATTERN   only tests whose name matches
  --verbose        also prints what passing files print`;

function indent(text: string, by: string): string {
  return text.trimEnd().replaceAll(/^/gmu, by);
}

function printResult(result: FileResult, verbose: boolean): void {
  const { file, passed, failures, skipped, printed, durationMs } = result;
  const counts = [
    `${passed} passed`,
    ...(failures.length > 0 ? [`${failures.length} FAILED`] : []),
    ...(skipped.length > 0 ? [`${skipped.length} skipped`] : []),
  ].join(", ");
  console.log(`${failures.length > 0 ? "FAILED" : "ok    "} ${file}  ${counts}  ${(durationMs / 1000).toFixed(1)} s`);
  for (const failure of failures) {
    console.log(`       ${failure.name}\n         at ${failure.place ?? file}\n${indent(failure.text, "         ")}`);
  }
  if (printed.trim() !== "" && (failures.length > 0 || verbose)) {
    console.log(`       ${file} printed (its end):\n${indent(printed, "       | ")}`);
  }
}

function printSummary(results: readonly FileResult[]): { passed: number; failed: number; skipped: number } {
  const skipped = results.flatMap((result) => result.skipped.map((test) => ({ ...test, file: result.file })));
  const reasons = Map.groupBy(skipped, ({ reason }) => reason);
  for (const [reason, tests] of reasons) {
    console.log(`\nskipped: ${reason}`);
    for (const { file, name } of tests) console.log(`  ${file}: ${name}`);
  }
  const failures = results.flatMap((result) => result.failures.map((failure) => ({ ...failure, file: result.file })));
  if (failures.length > 0) console.log("\nfailed:");
  for (const { file, name, place } of failures) console.log(`  ${place ?? file}: ${name}`);
  const passed = results.reduce((sum, result) => sum + result.passed, 0);
  return { passed, failed: failures.length, skipped: skipped.length };
}

async function runAll(root: string, patterns: readonly string[], name: string | undefined, verbose: boolean) {
  const files = findTestFiles(
    root,
    patterns.map((pattern) => new RegExp(pattern, "u")),
  );
  const light = files.filter(({ isHeavy }) => !isHeavy);
  const heavy = files.filter(({ isHeavy }) => isHeavy);
  const results: FileResult[] = [];
  const groups = new Set<number>();
  const stopping = new AbortController();
  const stop = (status: number): void => {
    if (stopping.signal.aborted) return;
    stopping.abort();
    void Promise.all([...groups].map(endGroup)).then(() => process.exit(status));
  };
  watchParent(() => stop(1));
  process.on("SIGINT", () => stop(130));
  process.on("SIGTERM", () => stop(143));
  const work = async (queue: typeof files): Promise<void> => {
    for (let next = queue.shift(); next !== undefined && !stopping.signal.aborted; next = queue.shift()) {
      const { path, isHeavy } = next;
      const startMs = performance.now();
      const reminder = setInterval(() => {
        console.log(`       ${path} runs for ${Math.round((performance.now() - startMs) / 1000)} s`);
      }, stillRunningMs);
      let group: number | undefined;
      const timeoutMs = isHeavy ? heavyTimeoutMs : lightTimeoutMs;
      const result = await runFile(path, { root, timeoutMs, namePattern: name }, (started) => {
        group = started;
        groups.add(started);
      });
      clearInterval(reminder);
      if (group !== undefined) groups.delete(group);
      results.push(result);
      if (name === undefined || result.passed + result.failures.length > 0) printResult(result, verbose);
    }
  };
  await Promise.all(Array.from({ length: Math.min(maxFilesAtOnce, availableParallelism()) }, () => work(light)));
  await work(heavy);
  return results;
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { help: { type: "boolean", short: "h" }, name: { type: "string" }, verbose: { type: "boolean" } },
  });
  if (values.help === true) {
    console.log(help);
    return 0;
  }
  const results = await runAll(
    dirname(dirname(import.meta.dirname)),
    positionals,
    values.name,
    values.verbose === true,
  );
  const { passed, failed, skipped } = printSummary(results);
  if (passed + failed + skipped === 0) console.log("no test ran");
  console.log(`${passed} passed, ${failed} failed${skipped === 0 ? "" : `, ${skipped} skipped`}`);
  return failed === 0 && passed > 0 ? 0 : 1;
}

process.exitCode = await main();
