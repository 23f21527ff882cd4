import assert from "node:assert/strict";
import { test } from "node:test";
import { type PullBytes, PullProgressCounter } from "./pull-progress.ts";

type Line = readonly [status: string, current?: number, total?: number];

function counted(lines: readonly Line[]): PullBytes {
  const counter = new PullProgressCounter(() => {});
  for (const [status, current, total] of lines)
    counter.take({ id: "layer", status, progressDetail: { current, total } });
  return counter.bytes;
}

test("a layer that goes on after a broken connection is counted from where it was", () => {
  const cut = [["Downloading", 400, 1000], ["Retrying in 5 seconds"]] as const;
  // Docker counts what is left, of which nothing has come yet.
  assert.deepEqual(counted([...cut, ["Downloading", 0, 600]]), { bytesDone: 400, bytesTotal: 1000 });
  assert.deepEqual(counted([...cut, ["Downloading", 500, 600]]), { bytesDone: 900, bytesTotal: 1000 });
  // Cut a second time.
  const twice = [...cut, ["Downloading", 500, 600], ["Downloading", 50, 100]] as const;
  assert.deepEqual(counted(twice), { bytesDone: 950, bytesTotal: 1000 });
  // A registry that cannot go on in the middle: the layer begins anew, and what is told waits for it.
  assert.deepEqual(counted([...cut, ["Downloading", 100, 1000]]), { bytesDone: 400, bytesTotal: 1000 });
});
