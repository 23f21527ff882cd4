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
import { assertEachLineOnce, followThrough, numberedOutput } from "../harness/numbered-output.ts";
import { randomFrom, testSeed } from "../harness/random.ts";
import { testImage, TestSystem } from "../harness/system.ts";
import { TcpProxy } from "../harness/tcp-proxy.ts";

const wait = { timeoutMs: 90_000 };

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

  const workspaceOf = (instance: InstanceHandle) => system.agent("mad-1").workspaceOf(instance);

  test("100,000 lines a stream are followed across a kill of the agent and one of the control plane", async () => {
    const instance = await run(numberedOutput(5000));
    const killAgent = async (): Promise<void> => {
      await system.agent("mad-1").kill();
      await sleep(random() * 300);
      system.agent("mad-1").launch();
    };
    const killControlPlane = async (): Promise<void> => {
      await system.controlPlane.kill();
      await sleep(random() * 300);
      await system.controlPlane.start();
    };
    const faults = [
      { atLine: 15_000, make: killAgent },
      { atLine: 55_000, make: killControlPlane },
    ];
    const lines = await followThrough(faults, instance, workspaceOf(instance), 100_000);
    await assertEachLineOnce(lines, workspaceOf(instance));
    const ended = await instance.waitUntilStopped(wait);
    assert.deepEqual([ended.state, ended.reason], [InstanceState.STOPPED, InstanceReason.COMPLETED]);
    await instance.delete(wait);
    await instance.waitUntilDeleted(wait);
  });

  test("a link that is cut and falls silent loses and doubles neither lines nor reports", async () => {
    const chatter = await run(numberedOutput(200));
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
    const faults = [
      { atLine: 1000, make: cut },
      { atLine: 4000, make: cut },
      { atLine: 7000, make: hang },
      { atLine: 10_000, make: cut },
      { atLine: 12_000, make: cut },
    ];
    const lines = await followThrough(faults, chatter, workspaceOf(chatter));
    await assertEachLineOnce(lines, workspaceOf(chatter));
    for (const instance of [chatter, ...jobs]) {
      const { state, reason } = await instance.waitUntilStopped(wait);
      assert.deepEqual([state, reason], [InstanceState.STOPPED, InstanceReason.COMPLETED], `seed ${seed}`);
      await assertEachStateOnce(instance);
    }
    for (const job of jobs) {
      assert.equal(await readFile(join(workspaceOf(job), "runs"), "utf8"), "run\n", `seed ${seed}: ${job.id}`);
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
