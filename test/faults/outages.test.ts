// What is away for long, and comes back: the control plane for longer than the lease and longer than a certificate, and
// a node whose clock is wrong. What runs goes on, what ended meanwhile is told, and no time that was used is lost.
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { type InstanceHandle, InstanceReason, InstanceState, NodeState, type RunSpec } from "@clodei/sdk";
import { listContainers } from "../harness/containers.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { testImage, TestSystem } from "../harness/system.ts";

const patienceMs = 60_000;
const certificateLifetimeMs = 15_000;
/** The lease of tests is 3 s. */
const longerThanLeaseMs = 6_000;
/**
 * From the return of the control plane until everything it shows of a node is right. No interval that a test shortens
 * is in it: agents wait as production's do.
 */
const returnGoalMs = 5_000;
/** What leaves time in it for the connection and what is said on it. */
const longestWaitMs = 3_000;
/** A machine that does much else may miss the goal now and then. */
const returnTries = 3;

const fakeClock = ["x86_64", "aarch64"]
  .map((machine) => `/usr/lib/${machine}-linux-gnu/faketime/libfaketime.so.1`)
  .find((path) => existsSync(path));

const untilTold = "until [ -e /workspace/end ]; do sleep 0.1; done";

const shell = (script: string): RunSpec => ({
  image: testImage,
  command: ["sh", "-c", script],
  cpuMillis: 100,
  memoryMib: 32,
  stopGraceSeconds: 1,
});

describe("long outages", { skip: engineUnavailable, timeout: 600_000 }, () => {
  let system: TestSystem;
  before(async () => {
    system = await TestSystem.start({
      replicas: 1,
      controlPlaneEnv: { CLODEI_NODE_CERTIFICATE_LIFETIME_MS: String(certificateLifetimeMs) },
      agents: [{ name: "mad-1", env: { CLODEI_USAGE_INTERVAL_MS: "500" } }],
    });
  });
  after(async () => {
    await system?.[Symbol.asyncDispose]();
  });

  async function running(script: string): Promise<InstanceHandle> {
    const instance = await system.client.instances.run(shell(script));
    await instance.waitUntilRunning({ timeoutMs: patienceMs });
    return instance;
  }

  /**
   * What is there when the control plane is back after so long: a life that went on, and one that ended meanwhile.
   * @returns How long it took until what it shows was right, in milliseconds.
   */
  async function surviveOutage(lengthMs: number): Promise<number> {
    const lasting = await running("sleep 1000");
    const ending = await running(`${untilTold}; echo done; exit 7`);
    const before = (await listContainers(system.engine, lasting.id)).map(({ Id }) => Id);
    const runsUntilMs = Date.now() + lengthMs;
    await system.controlPlane.kill();
    await writeFile(join(system.agent("mad-1").workspaceOf(ending), "end"), "");
    await sleep(lengthMs);
    const [container] = await listContainers(system.engine, lasting.id);
    assert.deepEqual([container?.Id, container?.State], [before[0], "running"], "nothing stops on the node");
    await system.controlPlane.start();
    const readyMs = performance.now();
    const ended = await eventually(patienceMs, async () => {
      const { connected, state } = await system.operator.nodes.get(system.agent("mad-1").nodeId);
      assert.deepEqual([connected, state], [true, NodeState.READY]);
      const now = await ending.refresh();
      assert.equal(now.state, InstanceState.FAILED);
      const { nodeReachable } = await lasting.refresh();
      assert.ok(nodeReachable);
      return now;
    });
    const returnedMs = performance.now() - readyMs;
    console.log(`right again ${Math.round(returnedMs)} ms after the return from an outage of ${lengthMs} ms`);
    assert.deepEqual([ended.reason, ended.exitCode], [InstanceReason.EXITED_NONZERO, 7]);
    assert.equal(await ending.logs({ follow: false }).text(), "done\n");
    const { state, attempt } = await lasting.refresh();
    assert.deepEqual([state, attempt], [InstanceState.RUNNING, 1]);
    // The journal kept all: its intervals join, and reach past the outage.
    const meteredMs = await eventually(patienceMs, () => meteredMsOf(lasting.id, runsUntilMs));
    assert.ok(meteredMs >= lengthMs, `${meteredMs} ms were metered of ${lengthMs}`);
    for (const instance of [lasting, ending]) {
      await instance.delete();
      await instance.waitUntilDeleted({ timeoutMs: patienceMs });
    }
    return returnedMs;
  }

  /** How long the agent has waited between two connections, as it said itself. */
  function waitsMs(): number[] {
    const waits = system.agent("mad-1").program.output.matchAll(/"waitMs":(\d+)/g);
    return [...waits].map(([, ms]) => Number(ms));
  }

  /** The time that an instance was metered, once that reaches so far. */
  async function meteredMsOf(instanceId: string, untilMs: number): Promise<number> {
    const rows = await system.database.query<{ begin: string; end: string; begin_time: Date }>(
      `select begin_monotonic_ms::text as begin, end_monotonic_ms::text as end, begin_time
       from usage_intervals where instance_id = $1 order by sequence`,
      [instanceId],
    );
    const [first, last] = [rows[0], rows.at(-1)];
    assert.ok(first !== undefined && last !== undefined);
    for (const [index, row] of rows.entries()) {
      if (index > 0) assert.equal(row.begin, rows[index - 1]?.end, "an interval is missing");
    }
    const meteredMs = Number(last.end) - Number(first.begin);
    assert.ok(first.begin_time.getTime() + meteredMs >= untilMs, "not told yet");
    return meteredMs;
  }

  test("a control plane that is away for longer than the lease stops nothing, and learns all within 5 s of its return", async () => {
    for (let tries = 1; (await surviveOutage(longerThanLeaseMs)) > returnGoalMs; tries++) {
      assert.ok(tries < returnTries, `more than ${returnGoalMs} ms in each of ${returnTries} tries`);
    }
  });

  test("a certificate that expires in the outage is renewed with the node's key, and no operator is needed", async () => {
    await surviveOutage(certificateLifetimeMs + 5_000);
    const waits = waitsMs();
    assert.ok(waits.length > 5 && waits.every((ms) => ms <= longestWaitMs), `it waited ${waits.join(", ")} ms`);
  });
});

describe("a node's wrong clock", { skip: engineUnavailable, timeout: 300_000 }, () => {
  let system: TestSystem;
  before(async () => {
    system = await TestSystem.start({ replicas: 1 });
  });
  after(async () => {
    await system?.[Symbol.asyncDispose]();
  });

  for (const offset of ["+1h", "-1h"]) {
    test(
      `${offset}: it runs, meters and ends instances as any other`,
      { skip: fakeClock === undefined ? "needs libfaketime (Debian's faketime)" : false },
      async () => {
        const name = offset === "+1h" ? "early-1" : "late-1";
        const agent = await system.addAgent({
          name,
          simulateGpus: "1xL40S",
          env: {
            CLODEI_USAGE_INTERVAL_MS: "500",
            LD_PRELOAD: fakeClock ?? "",
            FAKETIME: offset,
            FAKETIME_DONT_FAKE_MONOTONIC: "1",
          },
        });
        const instance = await system.client.instances.run({
          ...shell(`echo hello; ${untilTold}`),
          gpu: { model: "L40S", count: 1 },
        });
        const beginMs = performance.now();
        const { startTime } = await instance.waitUntilRunning({ timeoutMs: patienceMs });
        assert.ok(startTime !== undefined);
        const ranMs = 4_000;
        await sleep(ranMs);
        await writeFile(join(agent.workspaceOf(instance), "end"), "");
        const ended = await instance.waitUntilStopped({ timeoutMs: patienceMs });
        assert.deepEqual([ended.state, ended.reason], [InstanceState.STOPPED, InstanceReason.COMPLETED]);
        assert.equal(await instance.logs({ follow: false }).text(), "hello\n");
        const [row] = await system.database.query<{ ms: string }>(
          "select sum(end_monotonic_ms - begin_monotonic_ms)::text as ms from usage_intervals where instance_id = $1",
          [instance.id],
        );
        const meteredMs = Number(row?.ms);
        // As far as it was seen to run: the engine's clock is right here, so what it says of the end is another hour's.
        assert.ok(
          meteredMs >= ranMs / 2 && meteredMs <= performance.now() - beginMs + 5_000,
          `${meteredMs} ms were metered`,
        );
        await instance.delete();
        await instance.waitUntilDeleted({ timeoutMs: patienceMs });
        await agent[Symbol.asyncDispose]();
      },
    );
  }
});
