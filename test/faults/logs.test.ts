// Output is followed live through the SDK while agent and control plane are killed and the network between them breaks:
// every line comes, once, in order, on the stream that it was written to; and so does every report.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { type ClodeiClient, type InstanceHandle, InstanceReason, InstanceState } from "@clodei/sdk";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { randomFrom, testSeed } from "../harness/random.ts";
import { testImage, TestSystem } from "../harness/system.ts";
import { TcpProxy } from "../harness/tcp-proxy.ts";

const lineCount = 100_000;
const wait = { timeoutMs: 90_000 };

/** Writes numbered lines to both streams, with pauses, so that it goes on while things break. */
function numberedLines(count: number, pauseEvery: number): string {
  return (
    `i=0; while [ $i -lt ${count} ]; do i=$((i+1)); echo "out $i"; echo "err $i" >&2; ` +
    `[ $((i % ${pauseEvery})) -ne 0 ] || sleep 0.2; done`
  );
}

/** Follows to the end, with something done once so many lines have come. */
async function follow(
  instance: InstanceHandle,
  steps: readonly { readonly atLine: number; readonly do: () => Promise<void> }[],
): Promise<Record<"stdout" | "stderr", string[]>> {
  const lines = { stdout: [] as string[], stderr: [] as string[] };
  const left = [...steps];
  const done: Promise<void>[] = [];
  let busy = false;
  for await (const { stream, text } of instance.logs({ follow: true }).lines()) {
    lines[stream].push(text);
    if (busy || lines.stdout.length < (left[0]?.atLine ?? Number.POSITIVE_INFINITY)) continue;
    // While lines go on to come.
    const step = left.shift();
    if (step === undefined) continue;
    busy = true;
    done.push(step.do().finally(() => (busy = false)));
  }
  await Promise.all(done);
  assert.equal(left.length, 0, "the output was over before everything was broken");
  return lines;
}

function assertNumbered(lines: readonly string[], word: string, count: number): void {
  const wrong = lines.findIndex((line, index) => line !== `${word} ${index + 1}`);
  assert.equal(wrong, -1, `line ${wrong + 1} of ${word} is "${lines[wrong]}", before it "${lines[wrong - 1]}"`);
  assert.equal(lines.length, count);
}

describe("output and reports through faults", { skip: engineUnavailable, timeout: 300_000 }, () => {
  const seed = testSeed();
  const random = randomFrom(seed);
  let system: TestSystem;
  let client: ClodeiClient;
  let proxy: TcpProxy;
  before(async () => {
    console.log(`CLODEI_TEST_SEED=${seed}`);
    system = await TestSystem.start();
    proxy = await TcpProxy.start(system.controlPlane.listening.nodeEndpoint);
    await system.addAgent({ name: "mad-1", nodeEndpoint: proxy.endpoint });
    client = await system.patientClient();
  });
  after(async () => {
    await system?.[Symbol.asyncDispose]();
    await proxy?.[Symbol.asyncDispose]();
  });

  const run = (script: string, cpuMillis = 1000) =>
    client.instances.run(
      { image: testImage, command: ["sh", "-c", script], cpuMillis, memoryMib: 32, stopGraceSeconds: 2 },
      wait,
    );

  test(`${lineCount} lines a stream are followed across a kill of the agent and one of the control plane`, async () => {
    const instance = await run(numberedLines(lineCount, 5000));
    const lines = await follow(instance, [
      {
        atLine: lineCount * 0.15,
        do: async () => {
          await system.agent("mad-1").kill();
          await sleep(random() * 300);
          system.agent("mad-1").launch();
        },
      },
      {
        atLine: lineCount * 0.55,
        do: async () => {
          await system.controlPlane.kill();
          await sleep(random() * 300);
          await system.controlPlane.start();
        },
      },
    ]);
    assertNumbered(lines.stdout, "out", lineCount);
    assertNumbered(lines.stderr, "err", lineCount);
    const ended = await instance.waitUntilStopped(wait);
    assert.deepEqual([ended.state, ended.reason], [InstanceState.STOPPED, InstanceReason.COMPLETED]);
    await instance.delete(wait);
    await instance.waitUntilDeleted(wait);
  });

  test("a link that is cut and falls silent loses and doubles neither lines nor reports", async () => {
    const count = 20_000;
    const chatter = await run(numberedLines(count, 200));
    const jobs: InstanceHandle[] = [];
    const cut = async (): Promise<void> => {
      jobs.push(await run("echo run >> /workspace/runs", 50));
      await sleep(random() * 400);
      const { connections } = proxy;
      proxy.cut();
      await eventually(20_000, () => assert.ok(proxy.connections > connections, "the agent does not come back"));
    };
    const hang = async (): Promise<void> => {
      jobs.push(await run("echo run >> /workspace/runs", 50));
      await sleep(random() * 400);
      proxy.hang();
      // Longer than a lease: the node is unreachable in between.
      await sleep(4000);
      proxy.resume();
    };
    const lines = await follow(chatter, [
      { atLine: count * 0.05, do: cut },
      { atLine: count * 0.2, do: cut },
      { atLine: count * 0.35, do: hang },
      { atLine: count * 0.5, do: cut },
      { atLine: count * 0.6, do: cut },
    ]);
    assertNumbered(lines.stdout, "out", count);
    assertNumbered(lines.stderr, "err", count);
    for (const instance of [chatter, ...jobs]) {
      const { state, reason } = await instance.waitUntilStopped(wait);
      assert.deepEqual([state, reason], [InstanceState.STOPPED, InstanceReason.COMPLETED], `seed ${seed}`);
      await assertEachStateOnce(instance);
    }
    for (const { id } of jobs) {
      const file = join(system.agent("mad-1").folder, "workspaces", id, "runs");
      assert.equal(await readFile(file, "utf8"), "run\n", `seed ${seed}: ${id}`);
    }
    await eventually(20_000, async () => {
      const { connected } = await system.operator.nodes.get(system.agent("mad-1").nodeId);
      assert.ok(connected);
    });
  });

  /** The events of a job that ran once: each change of its state, in order, and none twice. */
  async function assertEachStateOnce(instance: InstanceHandle): Promise<void> {
    const states: InstanceState[] = [];
    let sequence = 0n;
    for await (const event of instance.events()) {
      assert.equal(event.sequence, (sequence += 1n), `seed ${seed}: events of ${instance.id} have a gap`);
      if (event.state !== states.at(-1)) states.push(event.state);
    }
    assert.equal(new Set(states).size, states.length, `seed ${seed}: ${instance.id} went through ${states.join(", ")}`);
    assert.deepEqual(
      states,
      states.toSorted((left, right) => left - right),
    );
  }
});
