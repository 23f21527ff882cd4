// Two control planes on one database, which tell each other nothing: what one of them was asked for, an agent of the
// other runs, because every reconciler looks for itself. Output is read at either, wherever the node's session is and goes.
// Then one of them drains under many streams.
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { type ClodeiClient, type Instance, InstanceState, type RunSpec } from "@clodei/sdk";
import { newId } from "@clodei/proto/ids";
import { listContainers } from "../harness/containers.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { assertEachLineOnce, followThrough, numberedOutput } from "../harness/numbered-output.ts";
import { madrid, patience, testImage, TestSystem } from "../harness/system.ts";
import { TcpProxy } from "../harness/tcp-proxy.ts";

const patienceMs = 60_000;
const watches = 200;
/** A connection carries at most 100 streams. */
const watchers = 4;
/** Of each stream. */
const lines = 3_000;
/** A shell script that writes them at once. */
const someLines = `i=0; while [ $i -lt ${lines} ]; do i=$((i+1)); echo "out $i"; echo "err $i" >&2; done`;

const sleeper: RunSpec = {
  image: testImage,
  command: ["sleep", "1000"],
  cpuMillis: 50,
  memoryMib: 16,
  stopGraceSeconds: 0,
};
/** Waits for as long as it is there: no node has such a GPU. */
const waiting: RunSpec = { ...sleeper, gpu: { model: "B200", count: 16 }, placementTimeoutSeconds: 3600 };

describe("two control planes on one database, without hints", { skip: engineUnavailable, timeout: 600_000 }, () => {
  let system: TestSystem;
  /** Of one organization: at the replica that holds the agent's session, and at the other. */
  let near: ClodeiClient;
  let far: ClodeiClient;
  before(async () => {
    system = await TestSystem.start({
      replicas: 2,
      controlPlaneEnv: { CLODEI_HINTS: "off" },
      agents: [{ name: "mad-1", replica: 1, simulateGpus: "4xH100-SXM" }],
    });
    const key = await system.createOrganization("umbrella");
    far = system.connect(key);
    near = system.connect(key, { endpoint: system.replica(1).listening.publicUrl });
  });
  after(async () => {
    near?.close();
    far?.close();
    await system?.[Symbol.asyncDispose]();
  });

  test("an instance lives its life on an agent of the other replica, and a watch of each sees all of it", async () => {
    const stop = new AbortController();
    const seen = [near, far].map((client) => follow(client, stop.signal));
    const instance = await far.instances.run(sleeper);
    await instance.waitUntilRunning({ timeoutMs: patienceMs });
    assert.equal((await near.instances.get(instance.id)).instance.state, InstanceState.RUNNING);
    await instance.stop();
    await instance.waitUntilStopped({ timeoutMs: patienceMs });
    await instance.start();
    await instance.waitUntilRunning({ timeoutMs: patienceMs });
    assert.equal((await listContainers(system.engine, instance.id)).length, 1);
    await instance.delete();
    await instance.waitUntilDeleted({ timeoutMs: patienceMs });
    const expected = [InstanceState.RUNNING, InstanceState.STOPPED, InstanceState.RUNNING, InstanceState.DELETED];
    const ends = new Set<InstanceState>(expected);
    for (const states of seen) {
      const ofIt = (): readonly InstanceState[] => states.changes.get(instance.id) ?? [];
      await eventually(patienceMs, () => assert.equal(ofIt().at(-1), InstanceState.DELETED));
      assert.deepEqual(
        ofIt().filter((state, index, all) => ends.has(state) && state !== all[index - 1]),
        expected,
      );
    }
    stop.abort();
    await Promise.all(seen.map(({ ended }) => ended));
  });

  test("both replicas place at once, and no GPU is given twice", async () => {
    const spec: RunSpec = { ...sleeper, gpu: { model: "H100-SXM", count: 1 } };
    const instances = await Promise.all(
      Array.from({ length: 8 }, (_, index) => (index % 2 === 0 ? near : far).instances.run(spec)),
    );
    const running = async () => {
      const all = await Promise.all(instances.map((instance) => instance.refresh()));
      return all.filter(({ state }) => state === InstanceState.RUNNING);
    };
    await eventually(patienceMs, async () => assert.equal((await running()).length, 4));
    const gpus = (await running()).flatMap((instance) => instance.gpus.map(({ uuid }) => uuid));
    assert.equal(new Set(gpus).size, 4);
    assert.equal((await listContainers(system.engine)).length, 4);
    await Promise.all(instances.map((instance) => instance.delete()));
    await Promise.all(instances.map((instance) => instance.waitUntilDeleted({ timeoutMs: patienceMs })));
  });

  test("a request that comes to both replicas with one idempotency key has one effect", async () => {
    const idempotencyKey = newId("ins");
    const [one, other] = await Promise.all(
      [near, far].map((client) => client.instances.run(waiting, { idempotencyKey })),
    );
    assert.equal(one?.id, other?.id);
    await one?.delete();
  });

  test("output is the same at both replicas, while it comes and when it is there", async () => {
    const instance = await near.instances.run({ ...sleeper, command: ["sh", "-c", someLines] });
    const expected = Array.from({ length: lines }, (_, index) => index + 1);
    const text = (word: string): string => expected.map((number) => `${word} ${number}\n`).join("");
    const followed = await Promise.all(
      [near, far].map(async (client) => {
        const found = { stdout: "", stderr: "" };
        const handle = (await client.instances.get(instance.id)).logs();
        for await (const { stream, data } of handle) found[stream] += Buffer.from(data).toString();
        return found;
      }),
    );
    assert.ok((await relayedBytes(0)) > 0, "the other replica was asked");
    const tails: string[][] = [];
    for (const client of [near, far]) {
      const handle = await client.instances.get(instance.id);
      const found = { stdout: "", stderr: "" };
      for await (const { stream, data } of handle.logs({ follow: false })) {
        found[stream] += Buffer.from(data).toString();
      }
      followed.push(found);
      const tail = (await handle.logs({ follow: false, tailLines: 10 }).text()).trim().split("\n");
      tails.push(tail.toSorted());
    }
    assert.equal(tails[0]?.length, 10);
    assert.deepEqual(tails[1], tails[0]);
    for (const found of followed) {
      assert.ok(found.stdout === text("out") && found.stderr === text("err"), "each byte came once");
    }
    const stranger = await system.createOrganization("stranger");
    for (const { listening } of system.controlPlanes) {
      using other = new DisposableStack();
      const client = other.adopt(system.connect(stranger, { endpoint: listening.publicUrl }), (it) => it.close());
      await assert.rejects(
        client.instances.get(instance.id).then((handle) => handle.logs().text()),
        { reason: "NOT_FOUND" },
      );
    }
    await instance.delete();
    await instance.waitUntilDeleted({ timeoutMs: patienceMs });
  });

  test("a follower goes with the session from replica to replica, one of which is killed, and misses no line", async () => {
    const nodes = system.controlPlanes.map(({ listening }) => listening.nodeEndpoint);
    await using balancer = await TcpProxy.start(...nodes);
    const location = { ...madrid, region: "wandering" };
    balancer.leadTo(1);
    const agent = await system.addAgent({ name: "wan-1", replica: 1, nodeEndpoint: balancer.endpoint, location });
    using clients = new DisposableStack();
    // One that does not try again: what it gets is the control plane's doing.
    const client = clients.adopt(
      system.connect(await system.createOrganization("wanderers"), { retry: { maxAttempts: 1 } }),
      (it) => it.close(),
    );
    const instance = await client.instances.run({
      ...sleeper,
      location: { country: "ES", region: location.region },
      command: ["sh", "-c", numberedOutput(100)],
    });
    // Replica 1 has the session of the other node as well.
    const sessionsWithIt = [1, 2];
    const moveTo = async (index: number): Promise<void> => {
      balancer.leadTo(index);
      balancer.cut();
      await eventually(patienceMs, async () => {
        assert.equal(await metricOf(index, "clodei_node_sessions"), sessionsWithIt[index]);
      });
    };
    const kill = async (): Promise<void> => {
      balancer.leadTo(0);
      await system.replica(1).kill();
    };
    const faults = [
      { atLine: 400, make: () => moveTo(0) },
      { atLine: 800, make: () => moveTo(1) },
      { atLine: 1200, make: kill },
    ];
    const workspace = agent.workspaceOf(instance);
    const before = await relayedBytes(0);
    await assertEachLineOnce(await followThrough(faults, instance, workspace), workspace);
    assert.ok((await relayedBytes(0)) > before);
    await system.replica(1).start();
    await instance.delete();
    await instance.waitUntilDeleted({ timeoutMs: patienceMs });
    await agent.kill();
  });

  async function metricOf(index: number, name: string): Promise<number> {
    const text = await (await fetch(`${system.replica(index).listening.operationsUrl}/metrics`)).text();
    return Number(new RegExp(`^${name} (\\S+)$`, "m").exec(text)?.[1]);
  }

  const relayedBytes = (index: number): Promise<number> => metricOf(index, "clodei_replica_log_bytes_total");

  test(`${watches} watches stand on a replica that drains: each goes on at the other, and misses nothing`, async () => {
    await using balancer = await TcpProxy.start(
      ...system.controlPlanes.map(({ listening }) => new URL(listening.publicUrl).host),
    );
    using clients = new DisposableStack();
    const key = await system.createOrganization("watchers");
    const connect = () =>
      clients.adopt(
        system.connect(key, {
          endpoint: `https://${balancer.endpoint}`,
          retry: patience,
        }),
        (client) => client.close(),
      );
    const client = connect();
    const stop = new AbortController();
    const earlier = await client.instances.run(waiting);
    const followed = Array.from({ length: watchers }, connect).flatMap((watcher) =>
      Array.from({ length: watches / watchers }, () => follow(watcher, stop.signal)),
    );
    await eventually(patienceMs, () => assert.ok(followed.every(({ live }) => live.value)));
    const stopping = system.replica(0).program.stop();
    const meanwhile = await client.instances.run(waiting);
    await stopping;
    const later = await client.instances.run(waiting);
    await Promise.all([earlier, meanwhile, later].map((instance) => instance.delete()));
    for (const { changes, resets } of followed) {
      await eventually(patienceMs, () => {
        for (const { id } of [earlier, meanwhile, later]) {
          assert.equal(changes.get(id)?.at(-1), InstanceState.DELETED, id);
        }
      });
      assert.equal(resets.length, 0, "it went on from its cursor");
      // Each change once: an instance that nobody touched has its creation and its removal to tell of.
      for (const { id } of [meanwhile, later]) {
        const states = changes.get(id) ?? [];
        assert.equal(states.filter((state) => state === InstanceState.DELETED).length, 1);
        assert.equal(states[0], InstanceState.PENDING);
      }
    }
    stop.abort();
    await Promise.all(followed.map(({ ended }) => ended));
    await system.replica(0).start();
  });
});

/** What a watch says, as it comes: the states of each instance after the snapshot, and whether it began anew. */
function follow(client: ClodeiClient, signal: AbortSignal) {
  const changes = new Map<string, InstanceState[]>();
  const resets: true[] = [];
  const live = { value: false };
  const note = ({ id, state }: Instance): void => {
    changes.set(id, [...(changes.get(id) ?? []), state]);
  };
  const read = async (): Promise<void> => {
    for await (const event of client.instances.watch({ signal })) {
      if (event.type === "reset") resets.push(true);
      if (event.type === "bookmark") live.value = true;
      if (event.type === "change") note(event.value);
    }
  };
  const ended = read().catch((error: unknown) => {
    if (!signal.aborted) throw error;
  });
  // Awaited in the end; a failure before is told then.
  ended.catch(() => undefined);
  return { changes, resets, live, ended };
}
