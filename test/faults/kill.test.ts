// The control plane, the agent and the Docker engine are killed again and again, at seeded random moments, while
// customers start, run and stop instances. Afterwards what is wanted and what there is agree, nothing was lost or
// doubled, and nothing ran twice.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { type ClodeiClient, InstanceEndedError, type InstanceHandle, InstanceReason, InstanceState } from "@clodei/sdk";
import { containerLabels } from "@clodei/proto/node-link";
import { listContainers, shimsOf } from "../harness/containers.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { randomFrom, testSeed } from "../harness/random.ts";
import { testImage, TestSystem } from "../harness/system.ts";
import { lostEnd, lostStart } from "./lost.ts";

const killsOfEach = 10;
const customers = 6;
/** Each customer has so many instances at least, however slow the machine is. */
const leastLives = 3;
/** Longest life of one instance under fire; a restart of everything takes seconds. */
const lifeTimeoutMs = 120_000;
const settleMs = 60_000;
/** What the agent's last process logged is shown with a failure, so far back. */
const agentLinesShown = 40;

/** What a customer did with an instance, and what must therefore be true of it in the end. */
interface Life {
  readonly instance: InstanceHandle;
  readonly kind: "job" | "stopped" | "restarted" | "left running";
  /** A start or an end of it was lost with the engine, and the customer left it there. */
  readonly lost: boolean;
}

describe("kills at random moments", { skip: engineUnavailable, timeout: 600_000 }, () => {
  const seed = testSeed();
  const random = randomFrom(seed);
  const engineKillsMs: number[] = [];
  let system: TestSystem;
  let client: ClodeiClient;
  before(async () => {
    console.log(`CLODEI_TEST_SEED=${seed}`);
    system = await TestSystem.start({ agents: [{ name: "mad-1", simulateGpus: "4xH100-SXM" }] });
    client = await system.patientClient();
  });
  after(async () => {
    await system?.[Symbol.asyncDispose]();
  });

  const victims = {
    "control plane": async () => {
      await system.controlPlane.kill();
      await sleep(random() * 300);
      await system.controlPlane.start();
    },
    agent: async () => {
      await system.agent("mad-1").kill();
      await sleep(random() * 300);
      system.agent("mad-1").launch();
    },
    engine: async () => {
      engineKillsMs.push(performance.now());
      await system.engine.kill();
      await sleep(random() * 300);
      await system.engine.startDaemon();
    },
  };

  /** One instance's life, as a customer makes it. */
  async function live(kind: Life["kind"]): Promise<Life> {
    const wait = { timeoutMs: lifeTimeoutMs };
    const script =
      kind === "job"
        ? "echo run >> /workspace/runs; sleep 0.2; exit 0"
        : "echo run >> /workspace/runs; trap 'exit 0' TERM; while :; do sleep 0.1; done";
    const instance = await client.instances.run(
      { image: testImage, command: ["sh", "-c", script], cpuMillis: 50, memoryMib: 16, stopGraceSeconds: 2 },
      wait,
    );
    const beginMs = performance.now();
    // Nothing but an engine's kill excuses it.
    const isLost = (message: string): boolean =>
      engineKillsMs.some((killMs) => killMs >= beginMs) && (lostStart.test(message) || lostEnd.test(message));
    try {
      await use(instance, kind);
    } catch (error) {
      if (!(error instanceof InstanceEndedError) || !isLost(error.instance.message)) throw error;
      return { instance, kind, lost: true };
    }
    return { instance, kind, lost: kind === "job" && isLost((await instance.refresh()).message) };
  }

  async function use(instance: InstanceHandle, kind: Life["kind"]): Promise<void> {
    const wait = { timeoutMs: lifeTimeoutMs };
    if (kind === "job") {
      await instance.waitUntilStopped(wait);
      return;
    }
    await instance.waitUntilRunning(wait);
    if (kind === "left running") return;
    await instance.stop(wait);
    await instance.waitUntilStopped(wait);
    if (kind === "stopped") return;
    await instance.start(wait);
    await instance.waitUntilRunning(wait);
  }

  /** How often the instance's script began, as it wrote itself into its workspace. */
  async function runs(instance: InstanceHandle): Promise<number> {
    const file = join(system.agent("mad-1").folder, "workspaces", instance.id, "runs");
    const text = await readFile(file, "utf8").catch(() => "");
    return text.split("\n").length - 1;
  }

  test(`each of them is killed ${killsOfEach} times, and the system comes to rest as it should be`, async () => {
    let killing = true;
    const lives: Life[] = [];
    const kinds: readonly Life["kind"][] = ["job", "stopped", "job", "restarted", "job", "left running"];
    const customer = async (number: number): Promise<void> => {
      for (let index = number; killing || index - number < leastLives; index++) {
        const kind = kinds[index % kinds.length] ?? "job";
        const life = await live(kind);
        lives.push(life);
        // So that containers do not pile up; one in four stays to be compared in the end.
        if (kind === "left running" && !life.lost && lives.length % 4 !== 0)
          await life.instance.delete({ timeoutMs: lifeTimeoutMs });
      }
    };
    const killer = async (): Promise<void> => {
      try {
        const queue = Object.values(victims).flatMap((kill) => Array.from({ length: killsOfEach }, () => kill));
        while (queue.length > 0) {
          const [kill] = queue.splice(Math.floor(random() * queue.length), 1);
          await sleep(200 + random() * 1500);
          await kill?.();
        }
      } finally {
        killing = false;
      }
    };
    const outcomes = await Promise.allSettled([killer(), ...Array.from({ length: customers }, (_, n) => customer(n))]);
    for (const outcome of outcomes) {
      if (outcome.status !== "rejected") continue;
      const said = system.agent("mad-1").program.output.split("\n").slice(-agentLinesShown).join("\n");
      throw new Error(`seed ${seed}: a life broke. The agent said last:\n${said}`, { cause: outcome.reason });
    }

    await eventually(settleMs, async () => {
      const node = await system.operator.nodes.get(system.agent("mad-1").nodeId);
      assert.ok(node.connected && node.acceptingWork, "the node is back");
    });
    await eventually(settleMs, () => assertAgreement(lives));
    let completed = 0;
    let lostOnes = 0;
    for (const { instance, kind, lost } of lives) {
      const { state, reason, message, attempt } = await instance.refresh();
      const count = await runs(instance);
      const what = `seed ${seed}: ${kind} ${instance.id} (${InstanceReason.COMPLETED === reason ? "completed" : message})`;
      if (lost) {
        lostOnes++;
        assert.equal(state, InstanceState.FAILED, what);
        assert.equal(reason, InstanceReason.NODE_ERROR, what);
        const least = lostEnd.test(message) ? attempt : attempt - 1;
        assert.ok(count >= least && count <= attempt, `${what} ran ${count} times in ${attempt} attempts`);
        continue;
      }
      if (kind === "job") {
        assert.equal(state, InstanceState.STOPPED, what);
        assert.equal(reason, InstanceReason.COMPLETED, what);
        assert.equal(count, 1, `${what} ran ${count} times`);
        completed++;
      }
      if (kind === "stopped") assert.equal(count, 1, `${what} ran ${count} times`);
      if (kind === "restarted") assert.equal(count, 2, `${what} ran ${count} times`);
    }
    assert.ok(completed >= customers, `only ${completed} jobs completed`);
    // An engine's kill costs the starts and ends of that moment, and they are few.
    assert.ok(lostOnes <= killsOfEach, `seed ${seed}: ${lostOnes} starts or ends were lost`);
    console.log(
      `${lives.length} lives, ${completed} of them completed jobs, ${lostOnes} lost starts or ends, under ${3 * killsOfEach} kills`,
    );
  });

  /** What the control plane wants and shows, and what the engine has, are the same. */
  async function assertAgreement(lives: readonly Life[]): Promise<void> {
    const containers = await listContainers(system.engine);
    const running = containers.filter((container) => container.State === "running");
    const wanted = new Map<string, string>();
    for (const { instance } of lives) {
      const { state, attempt } = await instance.refresh();
      if (state === InstanceState.RUNNING) wanted.set(instance.id, String(attempt));
    }
    const actual = new Map<string, string>(
      running.map(({ Labels }) => [Labels[containerLabels.instanceId] ?? "", Labels[containerLabels.attempt] ?? ""]),
    );
    assert.equal(actual.size, running.length, "an instance has two containers");
    assert.deepEqual(actual, wanted);
    // What the engine does not know of would run on for ever.
    const shims = (await shimsOf(system.engine)).toSorted();
    assert.deepEqual(shims, running.map(({ Id }) => Id).toSorted(), "what runs and what the engine knows differ");
  }
});
