import assert from "node:assert/strict";
import { test } from "node:test";
import { OutgoingQueue, type Overflow } from "./outgoing-queue.ts";

function createQueue(limits: { maxQueuedBytes: number; maxQueuedMs: number }) {
  const waiting: (() => void)[] = [];
  const overflows: Overflow[] = [];
  const queue = new OutgoingQueue(
    (_bytes, flushed) => waiting.push(flushed),
    limits,
    (why) => overflows.push(why),
  );
  return { queue, waiting, overflows };
}

test("bytes are counted until they left, and the agent is dropped once past the bound", () => {
  const { queue, waiting, overflows } = createQueue({ maxQueuedBytes: 100, maxQueuedMs: 60_000 });
  queue.send(Buffer.alloc(55));
  queue.send(Buffer.alloc(35));
  assert.equal(queue.queuedBytes, 100);
  waiting.shift()?.();
  assert.equal(queue.queuedBytes, 40);
  queue.send(Buffer.alloc(55));
  assert.deepEqual(overflows, []);
  queue.send(Buffer.alloc(1));
  queue.send(Buffer.alloc(1));
  assert.deepEqual(overflows, ["too_many_bytes"], "once");
  assert.equal(waiting.length, 2, "nothing is written after it");
});

test("one message may pass the bound alone", () => {
  const { queue, waiting, overflows } = createQueue({ maxQueuedBytes: 100, maxQueuedMs: 60_000 });
  queue.send(Buffer.alloc(5_000));
  assert.deepEqual([overflows.length, waiting.length], [0, 1]);
});

test("a message that is not read in time drops the agent", async () => {
  const { queue, waiting, overflows } = createQueue({ maxQueuedBytes: 100, maxQueuedMs: 20 });
  queue.send(Buffer.alloc(1));
  waiting.shift()?.();
  await new Promise((resolve) => setTimeout(resolve, 40));
  queue.checkAge();
  assert.deepEqual(overflows, [], "it was read");
  queue.send(Buffer.alloc(1));
  await new Promise((resolve) => setTimeout(resolve, 40));
  queue.checkAge();
  assert.deepEqual(overflows, ["not_read_in_time"]);
});
