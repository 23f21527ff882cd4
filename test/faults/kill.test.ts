// Two control planes on one database, two agents, the Docker engine, the database's connections and those of agents and
// customers are killed again and again, at seeded random moments, while customers start, run and stop instances. After
// each kill nothing is doubled; afterwards what is wanted and what there is agree, nothing was lost, nothing ran twice.
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
import { amount, randomFrom, testSeed } from "../harness/random.ts";
import { patience, testImage, TestSystem } from "../harness/system.ts";
import { TcpProxy } from "../harness/tcp-proxy.ts";
import { lostEnd, lostStart } from "./lost.ts";

/** Kills of each kind: 12 make the 60 of a long run. */
const killsOfEach = amount("CLODEI_TEST_KILLS", 3);
const customers = 6;
/** Each customer has so many instances at least, however slow the machine is: 34 make the 200 of a long run. */
const leastLives = amount("CLODEI_TEST_LIVES", 3);
const agents = ["mad-1", "mad-2"] as const;
const linesOfJob = 100;
/** Longest life of one instance under fire; a restart of everything takes seconds. */
const lifeTimeoutMs = 120_000;
const settleMs = 60_000;
/** What the agent's last process logged is shown with a failure, so far back. */
const agentLinesShown = 40;

/** Longer than any run: what is left running does not end by itself. */
const sleepSeconds = 100_000;

/** An instance in one of these has its GPUs. */
const liveStates = ["SCHEDULED", "PULLING", "CREATING", "RUNNING", "STOPPING"] as const;
/** One page holds all that two nodes have room for, so that the list is what was true at one moment. */
const liveInstances = { states: liveStates, pageSize: 500 } as const;

/** How often the script of an instance of each kind begins. */
const runsOf = { job: 1, stopped: 1, restarted: 2, "left running": 1 } as const;
const kinds = ["job", "stopped", "job", "restarted", "job", "left running"] as const;

/** What a customer did with an instance, and what must therefore be true of it in the end. */
interface Life {
  readonly instance: InstanceHandle;
  readonly kind: keyof typeof runsOf;
  /** Whether the customer deleted it in the end. */
  readonly deleted: boolean;
  /** A start or an end of it was lost with the engine, and the customer left it there. */
  readonly lost: boolean;
  /** Whether the engine was killed meanwhile: output that it had read and not written went with it. */
  readonly sawEngineKill: boolean;
}

describe("kills at random moments", { skip: engineUnavailable, timeout: 3_600_000 }, () => {
  const seed = testSeed();
  const random = randomFrom(seed);
  const engineKillsMs: number[] = [];
  let system: TestSystem;
  let client: ClodeiClient;
  /** One of each replica. */
  let readers: readonly ClodeiClient[] = [];
  let reads = 0;
  /** All that were ever acknowledged. */
  const instances: InstanceHandle[] = [];
  /** Between agents or customers and the control planes. */
  let proxies: readonly TcpProxy[] = [];
  before(async () => {
    console.log(`CLODEI_TEST_SEED=${seed}`);
    system = await TestSystem.start({ replicas: 2 });
    const listening = system.controlPlanes.map((controlPlane) => controlPlane.listening);
    const toNodes = await TcpProxy.start(...listening.map(({ nodeEndpoint }) => nodeEndpoint));
    const toPublic = await TcpProxy.start(...listening.map(({ publicUrl }) => new URL(publicUrl).host));
    proxies = [toNodes, toPublic];
    for (const name of agents) {
      await system.addAgent({ name, simulateGpus: "4xH100-SXM", nodeEndpoint: toNodes.endpoint });
    }
    const key = await system.createOrganization("patient");
    client = system.connect(key, { endpoint: `https://${toPublic.endpoint}`, retry: patience });
    readers = listening.map(({ publicUrl: endpoint }) => system.connect(key, { endpoint, timeoutMs: 2000 }));
  });
  after(async () => {
    for (const each of [client, ...readers]) each?.close();
    await system?.[Symbol.asyncDispose]();
    for (const proxy of proxies) await proxy[Symbol.asyncDispose]();
  });

  const victims = {
    "control plane": async () => {
      const controlPlane = pick(system.controlPlanes);
      await controlPlane.kill();
      await sleep(random() * 300);
      await controlPlane.start();
    },
    agent: async () => {
      const agent = system.agent(pick(agents));
      await agent.kill();
      await sleep(random() * 300);
      agent.launch();
    },
    "database backends": () => system.database.cutConnections(),
    connections: async () => {
      pick(proxies).cut();
    },
    engine: async () => {
      engineKillsMs.push(performance.now());
      await system.engine.kill();
      await sleep(random() * 300);
      await system.engine.startDaemon();
    },
  };

  function pick<T>(all: readonly T[]): T {
    return all[Math.floor(random() * all.length)] ?? assert.fail("there is one to pick");
  }

  /** One instance's life, as a customer makes it. */
  async function live(kind: Life["kind"], gpus: number): Promise<Life> {
    const wait = { timeoutMs: lifeTimeoutMs };
    const script =
      kind === "job"
        ? `echo run >> /workspace/runs; i=0; while [ $i -lt ${linesOfJob} ]; do i=$((i+1)); echo line $i; done; sleep 0.2`
        : `echo run >> /workspace/runs; trap 'exit 0' TERM; sleep ${sleepSeconds} & wait`;
    const instance = await client.instances.run(
      {
        image: testImage,
        command: ["sh", "-c", script],
        cpuMillis: 50,
        memoryMib: 16,
        stopGraceSeconds: 2,
        ...(gpus === 0 ? {} : { gpu: { model: "H100-SXM", count: gpus } }),
      },
      wait,
    );
    instances.push(instance);
    const beginMs = performance.now();
    const sawEngineKill = (): boolean => engineKillsMs.some((killMs) => killMs >= beginMs);
    // Nothing but an engine's kill excuses it.
    const isLost = (message: string): boolean => sawEngineKill() && (lostStart.test(message) || lostEnd.test(message));
    try {
      await use(instance, kind);
    } catch (error) {
      if (!(error instanceof InstanceEndedError) || !isLost(error.instance.message)) throw error;
      return { instance, kind, deleted: false, lost: true, sawEngineKill: true };
    }
    const lost = kind === "job" && isLost((await instance.refresh()).message);
    // So that containers do not pile up; one in four stays to be compared in the end.
    const deleted = (kind === "left running" || kind === "restarted") && instances.length % 4 !== 0;
    if (deleted) {
      // With the workspace goes what tells how often it ran.
      await eventually(settleMs, () => assertRuns(instance, kind));
      await instance.delete(wait);
    }
    return { instance, kind, deleted, lost, sawEngineKill: sawEngineKill() };
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

  async function assertRuns(instance: InstanceHandle, kind: Life["kind"]): Promise<void> {
    const count = await runs(instance);
    assert.equal(count, runsOf[kind], `seed ${seed}: ${kind} ${instance.id} ran ${count} times`);
  }

  /** How often the instance's script began, as it wrote itself into its workspace. */
  async function runs(instance: InstanceHandle): Promise<number> {
    const counts = agents.map(async (name) => {
      const file = join(system.agent(name).workspaceOf(instance), "runs");
      const text = await readFile(file, "utf8").catch(() => "");
      return text.split("\n").length - 1;
    });
    return (await Promise.all(counts)).reduce((sum, count) => sum + count);
  }

  /** What holds at every moment, whatever was just killed. */
  async function assertNothingDoubled(): Promise<void> {
    const containers = await eventually(settleMs, () => listContainers(system.engine));
    const running = containers.filter((container) => container.State === "running");
    const ids = running.map(({ Labels }) => Labels[containerLabels.instanceId] ?? "");
    assert.equal(new Set(ids).size, ids.length, `seed ${seed}: an instance runs twice`);
    const holding = await client.instances.list(liveInstances).toArray();
    const gpus = holding.flatMap(({ instance }) => instance.gpus.map(({ uuid }) => uuid));
    assert.equal(new Set(gpus).size, gpus.length, `seed ${seed}: a GPU was given twice`);
    await Promise.all(instances.map(assertNoMoreRunsThanAttempts));
  }

  async function assertNoMoreRunsThanAttempts(handle: InstanceHandle): Promise<void> {
    const count = await runs(handle);
    // An attempt's number never goes back: what was known before is enough, nearly always.
    if (count <= handle.instance.attempt) return;
    const { attempt } = await handle.refresh();
    assert.ok(count <= attempt, `seed ${seed}: ${handle.id} ran ${count} times in ${attempt} attempts`);
  }

  /** Each line once and in order; all of them where the engine was not killed, which loses what it has not written. */
  async function assertOutput({ instance, sawEngineKill }: Life): Promise<void> {
    const text = await outputOf(instance.id);
    const numbers = text.split("\n").flatMap((line) => (line === "" ? [] : [Number(/^line (\d+)$/.exec(line)?.[1])]));
    const what = `seed ${seed}: the output of ${instance.id} is ${JSON.stringify(text)}`;
    assert.ok(
      numbers.every((number, index) => number > (numbers[index - 1] ?? 0)),
      what,
    );
    if (!sawEngineKill) assert.equal(numbers.length, linesOfJob, what);
  }

  /** Asked of the replicas in turn: each has it, whichever of them holds the node's session. */
  async function outputOf(instanceId: string): Promise<string> {
    const reader = readers[reads++ % readers.length] ?? assert.fail("there are no replicas");
    return eventually(settleMs, async () => (await reader.instances.get(instanceId)).logs({ follow: false }).text());
  }

  /** What must be true of an instance once all came to rest, after what its customer did with it. */
  async function assertLife(life: Life): Promise<void> {
    const { instance, kind, deleted, lost } = life;
    const { state, reason, message, attempt } = await instance.refresh();
    const said = InstanceReason.COMPLETED === reason ? "completed" : message;
    const what = `seed ${seed}: ${kind} ${instance.id} (${said})`;
    if (lost) {
      const count = await runs(instance);
      assert.deepEqual([state, reason], [InstanceState.FAILED, InstanceReason.NODE_ERROR], what);
      const least = lostEnd.test(message) ? attempt : attempt - 1;
      assert.ok(count >= least && count <= attempt, `${what} ran ${count} times in ${attempt} attempts`);
      return;
    }
    if (deleted) {
      assert.equal(state, InstanceState.DELETED, what);
      return;
    }
    await assertRuns(instance, kind);
    if (kind === "job") {
      assert.deepEqual([state, reason], [InstanceState.STOPPED, InstanceReason.COMPLETED], what);
      await assertOutput(life);
    } else {
      assert.equal(state, kind === "stopped" ? InstanceState.STOPPED : InstanceState.RUNNING, what);
      assert.equal(attempt, runsOf[kind], what);
    }
  }

  test(`each of them is killed ${killsOfEach} times, and the system comes to rest as it should be`, async () => {
    const beginMs = performance.now();
    let killing = true;
    const lives: Life[] = [];
    const customer = async (number: number): Promise<void> => {
      for (let index = number; killing || index - number < leastLives; index++) {
        const kind = kinds[index % kinds.length] ?? "job";
        // What stays takes none of the eight.
        lives.push(await live(kind, kind === "job" && number % 2 === 0 ? 1 : 0));
      }
    };
    const killer = async (): Promise<void> => {
      try {
        const queue = Object.values(victims).flatMap((kill) => Array.from({ length: killsOfEach }, () => kill));
        while (queue.length > 0) {
          const [kill] = queue.splice(Math.floor(random() * queue.length), 1);
          await sleep(200 + random() * 1500);
          await kill?.();
          await assertNothingDoubled();
        }
      } finally {
        killing = false;
      }
    };
    const outcomes = await Promise.allSettled([killer(), ...Array.from({ length: customers }, (_, n) => customer(n))]);
    for (const outcome of outcomes) {
      if (outcome.status !== "rejected") continue;
      const said = agents.map((name) =>
        system.agent(name).program.output.split("\n").slice(-agentLinesShown).join("\n"),
      );
      throw new Error(`seed ${seed}: a life broke. The agents said last:\n${said.join("\n--\n")}`, {
        cause: outcome.reason,
      });
    }

    for (const name of agents) {
      await eventually(settleMs, async () => {
        const node = await system.operator.nodes.get(system.agent(name).nodeId);
        assert.ok(node.connected && node.acceptingWork, `${name} is back`);
      });
    }
    await eventually(settleMs, assertAgreement);
    const left = [...lives];
    const auditor = async (): Promise<void> => {
      for (let life = left.pop(); life !== undefined; life = left.pop()) await assertLife(life);
    };
    await Promise.all(Array.from({ length: customers }, auditor));
    const completed = lives.filter(({ kind, lost }) => kind === "job" && !lost).length;
    const lost = lives.filter((life) => life.lost).length;
    assert.ok(completed >= customers, `only ${completed} jobs completed`);
    // An engine's kill costs the starts and ends of that moment: on a slow machine many customers are at one, never most.
    assert.ok(lost <= (killsOfEach * customers) / 2, `seed ${seed}: ${lost} starts or ends were lost`);
    console.log(
      `${lives.length} lives, ${completed} of them completed jobs, ${lost} lost starts or ends, under ${Object.keys(victims).length * killsOfEach} kills, in ${Math.round((performance.now() - beginMs) / 1000)} s`,
    );
  });

  /** What the control plane wants and shows, and what the engine has, are the same. */
  async function assertAgreement(): Promise<void> {
    const containers = await listContainers(system.engine);
    const running = containers.filter((container) => container.State === "running");
    const holding = await client.instances.list(liveInstances).toArray();
    assert.ok(
      holding.every(({ state }) => state === "RUNNING"),
      "an instance is still on its way",
    );
    const wanted = new Map(holding.map(({ id, instance }) => [id, String(instance.attempt)]));
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
