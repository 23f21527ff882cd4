// How every fuzz test runs: from a seed that is told and can be given, for a time that can be given.
import { monitorEventLoopDelay } from "node:perf_hooks";
import type { TestContext } from "node:test";
import fc from "fast-check";
import { testSeed } from "../harness/random.ts";

/** Values that are tried in one go. fast-check looks at small ones first in each. */
const runsPerRound = 20;

/** What is fuzzed. */
export type Fuzzing<T> = {
  readonly values: fc.Arbitrary<T>;
  /** Rejects where a value shows a fault. Runs one after the other. */
  readonly run: (value: T) => Promise<void>;
  readonly describe: (value: T) => string;
  /** How long to go on, unless CLODEI_TEST_FUZZ_SECONDS says it. */
  readonly seconds: number;
  /** So many values are tried before `warmed` is called: what is made on first use is there then. */
  readonly warmUp?: { readonly runs: number; readonly warmed: () => void };
};

/** How long a test that would take so long is to take. */
export function fuzzSeconds(seconds: number): number {
  return Number(process.env["CLODEI_TEST_FUZZ_SECONDS"] ?? seconds);
}

/** Tries values until the time is over, each seed in the same order. The first that shows a fault is made smaller. */
export async function fuzz<T>(t: TestContext, fuzzing: Fuzzing<T>): Promise<void> {
  const { values, run, describe, warmUp } = fuzzing;
  const seed = testSeed();
  const replay = `CLODEI_TEST_SEED=${seed} plays it again, CLODEI_TEST_FUZZ_SECONDS=600 goes on for longer`;
  t.diagnostic(`seed ${seed}: ${replay}`);
  if (warmUp !== undefined) {
    for (const value of fc.sample(values, { numRuns: warmUp.runs, seed: seed - 1 })) await run(value);
    warmUp.warmed();
  }
  using stalls = monitorEventLoopDelay({ resolution: 20 });
  stalls.enable();
  const deadlineMs = performance.now() + fuzzSeconds(fuzzing.seconds) * 1_000;
  for (let round = 0; round === 0 || performance.now() < deadlineMs; round += 1) {
    const result = await fc.check(fc.asyncProperty(values, run), { seed: seed + round, numRuns: runsPerRound });
    if (!result.failed) continue;
    const [value] = result.counterexample ?? [];
    const what = value === undefined ? "" : describe(value);
    throw new Error(`seed ${seed}, round ${round}: ${what}`, { cause: result.errorInstance });
  }
  t.diagnostic(`the longest stall of the event loop took ${Math.round(stalls.max / 1e6)} ms`);
}
