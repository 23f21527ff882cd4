// What an attack leaves behind in this process, in which the attacked part runs.
import assert from "node:assert/strict";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { eventually } from "../harness/eventually.ts";

/** Caches of bounded size, what is made on first use, and the collector's slack. */
const allowedGrowthBytes = 48 * 2 ** 20;
const patienceMs = 30_000;

/** Bytes of this process's heap and buffers that are in use, after a collection. */
export function memoryInUse(): number {
  setFlagsFromString("--expose-gc");
  (runInNewContext("gc") as () => void)();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}

/**
 * Waits until memory is back where it was before. Buffers are given back a while after the collection that found them
 * unused, and streams that were reset hold theirs until the other side's next word.
 */
export async function memoryComesBack(before: number): Promise<void> {
  await eventually(patienceMs, () => {
    const grown = memoryInUse() - before;
    assert.ok(grown < allowedGrowthBytes, `${Math.round(grown / 2 ** 20)} MiB stay behind`);
  });
}
