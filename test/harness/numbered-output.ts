// A container's output that goes on until everything has happened that it shall survive, however slow the machine is:
// followed live, and every line looked for.
import assert from "node:assert/strict";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { InstanceHandle } from "@clodei/sdk";
import { eventually } from "./eventually.ts";

const patienceMs = 120_000;
/** Files in the instance's workspace: the output ends when the first is there, and its length is written to the other. */
const [enough, written] = ["enough", "written"];
/** Lines that come after the last of what happens. */
const linesAfter = 1000;
/** Far above what tests wait for: a flood that nobody ends would go on for as long as its container. */
const mostLines = 1_000_000;

export interface Fault {
  /** It happens once so many lines of stdout have come, and the fault before it is over. */
  readonly atLine: number;
  readonly make: () => Promise<void>;
}

export type FollowedOutput = Readonly<Record<"stdout" | "stderr", string[]>>;

/** A shell script that writes numbered lines to both streams, and rests for 0.2 s after so many, until it is ended. */
export function numberedOutput(restEvery: number): string {
  return (
    `i=0; until [ -e /workspace/${enough} ] || [ $i -ge ${mostLines} ]; do i=$((i+1)); echo "out $i"; echo "err $i" >&2; ` +
    `[ $((i % ${restEvery})) -ne 0 ] || sleep 0.2; done; echo $i > /workspace/${written}`
  );
}

/**
 * Follows numbered output through faults, one after the other, and ends it after them.
 *
 * @param workspace The instance's folder on its node.
 * @param atLeast So many lines of stdout come before the output is ended.
 * @throws What following threw, also when a fault failed because of it. No fault is made after that.
 */
export async function followThrough(
  faults: readonly Fault[],
  instance: InstanceHandle,
  workspace: string,
  atLeast = 0,
): Promise<FollowedOutput> {
  const lines: FollowedOutput = { stdout: [], stderr: [] };
  let isOver = false;
  const read = async (): Promise<void> => {
    try {
      for await (const { stream, text } of instance.logs({ follow: true }).lines()) lines[stream].push(text);
    } finally {
      isOver = true;
    }
  };
  const reached = async (line: number): Promise<void> => {
    await eventually(patienceMs, () => {
      assert.ok(isOver || lines.stdout.length >= line, `${lines.stdout.length} of ${line} lines came`);
    });
    assert.ok(!isOver, `the output was over after ${lines.stdout.length} lines`);
  };
  const makeFaults = async (): Promise<void> => {
    try {
      for (const { atLine, make } of faults) {
        await reached(atLine);
        await make();
      }
      await reached(Math.max(atLeast, lines.stdout.length + linesAfter));
    } finally {
      // Where following failed early, the instance may have no folder yet.
      await writeFile(join(workspace, enough), "").catch(() => undefined);
    }
  };
  const ends = await Promise.allSettled([read(), makeFaults()]);
  for (const end of ends) if (end.status === "rejected") throw end.reason;
  return lines;
}

/** Each line that was written came once, in order, on the stream that it was written to. */
export async function assertEachLineOnce(lines: FollowedOutput, workspace: string): Promise<void> {
  const count = Number(await readFile(join(workspace, written), "utf8"));
  for (const [stream, word] of [
    ["stdout", "out"],
    ["stderr", "err"],
  ] as const) {
    const came = lines[stream];
    const wrong = came.findIndex((line, index) => line !== `${word} ${index + 1}`);
    assert.equal(wrong, -1, `line ${wrong + 1} of ${stream} is "${came[wrong]}", before it "${came[wrong - 1]}"`);
    assert.equal(came.length, count, stream);
  }
}
