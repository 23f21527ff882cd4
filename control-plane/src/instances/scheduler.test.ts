import assert from "node:assert/strict";
import { after, before, beforeEach, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { AttemptPhase, DesiredState } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { Availability } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { InstanceReason, InstanceState, RestartPolicy, type InstanceSpec } from "@clodei/proto/gen/clodei/v1/instance";
import { GpuHealth } from "@clodei/proto/gen/clodei/v1/inventory";
import { newId, type NodeId } from "@clodei/proto/ids";
import pg from "pg";
import { startScheduler } from "./scheduler.ts";
import { addNode, createCustomer, type Fixture, readDesiredSet, reportPhase, startFixture } from "./test-fixture.ts";

let fixture: Fixture;
before(async () => {
  fixture = await startFixture();
});
after(() => fixture[Symbol.asyncDispose]());
// Each test has a fleet and a queue of its own.
beforeEach(async () => {
  await administer(
    "update nodes set state = 'revoked', connected = false, revoke_time = now() where state <> 'revoked'",
  );
  await fixture.scheduler.followNodes(signal);
  await administer(
    `update instances set state = 'FAILED', reason = 'NODE_LOST', queue_time = null, placement_deadline = null
     where state = 'PENDING'`,
  );
});

const signal = new AbortController().signal;
const image = "library/busybox";
type SpecInit = Partial<Pick<InstanceSpec, "cpuMillis" | "memoryMib" | "restartPolicy">> & {
  gpu?: { model?: string; count: number; minMemoryMib?: number };
  location?: { country: string };
  placementTimeout?: { seconds: bigint };
};

async function administer(text: string, values: unknown[] = []): Promise<void> {
  const client = new pg.Client(fixture.db.administrator);
  await client.connect();
  try {
    await client.query(text, values);
  } finally {
    await client.end();
  }
}

const customer = createCustomer();
const client = () => fixture.client(customer);

async function create(spec: SpecInit = {}): Promise<string> {
  fixture.now = new Date(fixture.now.getTime() + 1);
  const { instance } = await client().createInstance({ spec: { image, ...spec } });
  assert.ok(instance);
  return instance.id;
}

async function get(instanceId: string) {
  const { instance } = await client().getInstance({ instanceId });
  assert.ok(instance);
  return instance;
}

async function placeAll(): Promise<void> {
  await fixture.scheduler.placePending(signal);
}

/** Creates an instance and reports that it runs. */
async function run(nodeId: NodeId, spec: SpecInit = {}): Promise<string> {
  const id = await create(spec);
  await placeAll();
  await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.RUNNING);
  assert.equal((await get(id)).state, InstanceState.RUNNING);
  return id;
}

async function wishFor(nodeId: NodeId, instanceId: string) {
  const { instances } = await readDesiredSet(fixture, nodeId);
  return instances.find((each) => each.instanceId === instanceId);
}

const h100 = (count: number) => ({ model: "H100-SXM", count });

describe("the queue", () => {
  it("is first come, first served among requests for one GPU model, and lets others pass", async () => {
    const nodeId = await addNode(fixture, { gpus: 4 });
    const first = await run(nodeId, { gpu: h100(3) });
    const large = await create({ gpu: h100(2) });
    const small = await create({ gpu: h100(1) });
    const cpuOnly = await create();
    await placeAll();
    assert.equal((await get(large)).state, InstanceState.PENDING);
    assert.equal((await get(small)).state, InstanceState.PENDING, "it came after the large one");
    assert.equal((await get(cpuOnly)).state, InstanceState.SCHEDULED);
    await reportPhase(fixture, nodeId, { id: first, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 0 });
    await placeAll();
    assert.equal((await get(large)).state, InstanceState.SCHEDULED);
    assert.equal((await get(small)).state, InstanceState.SCHEDULED);
  });

  it("is not held up by a request that no node could ever take", async () => {
    await addNode(fixture, { gpus: 4 });
    const impossible = await create({ gpu: h100(16) });
    const small = await create({ gpu: h100(1) });
    await placeAll();
    assert.equal((await get(small)).state, InstanceState.SCHEDULED);
    const waiting = await get(impossible);
    assert.equal(waiting.reason, InstanceReason.WAITING_FOR_CAPACITY);
    assert.match(waiting.message, /^16 x H100-SXM asked for; .*the largest has 4 x H100-SXM/);
    assert.ok(waiting.placementDeadline);
  });

  it("says why an instance waits once, and not again while nothing changes", async () => {
    const id = await create({ gpu: { model: "L40S", count: 1 } });
    await placeAll();
    const { version } = await get(id);
    assert.equal(version, 2n);
    await placeAll();
    assert.equal((await get(id)).version, version);
  });

  it("tells of a wait by one event, however often what would fit changes, and by a message that follows", async () => {
    const nodeId = await addNode(fixture, { gpus: 2, country: "FR" });
    await run(nodeId, { gpu: h100(2) });
    const id = await create({ gpu: h100(2), location: { country: "FR" } });
    const begin = fixture.now;
    for (let second = 1; second <= 60; second += 1) {
      await administer("update nodes set cordoned = $2 where id = $1", [nodeId, second % 2 === 0]);
      fixture.now = new Date(begin.getTime() + second * 1_000);
      await placeAll();
    }
    const waiting = await get(id);
    const { events } = await fixture.client(customer).listInstanceEvents({ instanceId: id });
    assert.deepEqual(
      events.map(({ reason }) => reason),
      [InstanceReason.UNSPECIFIED, InstanceReason.WAITING_FOR_CAPACITY],
    );
    assert.ok(waiting.version <= 8n, `the row was written ${waiting.version} times in a minute`);
    fixture.now = new Date(begin.getTime() + 71_000);
    await placeAll();
    assert.match((await get(id)).message, /what would fit in FR takes no new instances now \(1 under maintenance\)/);
    fixture.now = begin;
  });

  it("gives up at the deadline of an instance with PLACEMENT_TIMED_OUT", async () => {
    const id = await create({ gpu: h100(1), placementTimeout: { seconds: 5n } });
    await placeAll();
    fixture.now = new Date(fixture.now.getTime() + 5_000);
    await placeAll();
    const failed = await get(id);
    assert.equal(failed.state, InstanceState.FAILED);
    assert.equal(failed.reason, InstanceReason.PLACEMENT_TIMED_OUT);
    assert.match(failed.message, /H100-SXM asked for/);
  });

  it("places by country, and never where a node is cordoned or its agent left, though the lease goes on", async () => {
    await addNode(fixture, { gpus: 1, country: "FR" });
    const spanish = await addNode(fixture, { gpus: 1, country: "ES" });
    await administer("update nodes set cordoned = true where id = $1", [spanish]);
    const id = await create({ gpu: h100(1), location: { country: "ES" } });
    await placeAll();
    assert.match((await get(id)).message, /what would fit in ES takes no new instances now \(1 under maintenance\)/);
    await administer("update nodes set cordoned = false, connected = false where id = $1", [spanish]);
    const later = await create({ gpu: h100(1), location: { country: "ES" } });
    await placeAll();
    assert.match((await get(later)).message, /what would fit in ES takes no new instances now \(1 not answering\)/);
    await administer("update nodes set connected = true where id = $1", [spanish]);
    await placeAll();
    assert.equal((await get(id)).location?.country, "ES");
  });

  it("gives each GPU once, however many replicas place at the same time", async () => {
    await addNode(fixture, { gpus: 8 });
    await addNode(fixture, { gpus: 8 });
    const ids: string[] = [];
    for (let count = 0; count < 24; count += 1) ids.push(await create({ gpu: h100(1) }));
    await Promise.all([placeAll(), placeAll(), placeAll(), placeAll()]);
    const instances = await Promise.all(ids.map(get));
    const uuids = instances.flatMap(({ gpus }) => gpus.map(({ uuid }) => uuid));
    assert.equal(uuids.length, 16);
    assert.equal(new Set(uuids).size, 16);
    assert.deepEqual(
      instances.map(({ state }) => state === InstanceState.SCHEDULED),
      ids.map((_, index) => index < 16),
      "the first sixteen got them",
    );
  });
});

describe("the desired set", () => {
  it("says what shall run with its GPUs, what shall be stopped, and moves on with each change", async () => {
    const nodeId = await addNode(fixture, { gpus: 2 });
    const id = await create({ gpu: h100(2) });
    await placeAll();
    const set = () => readDesiredSet(fixture, nodeId);
    const first = await set();
    const [wish] = first.instances;
    assert.equal(wish?.state, DesiredState.RUNNING);
    assert.equal(wish.container?.gpuUuids.length, 2);
    assert.equal(wish.container.image, "docker.io/library/busybox:latest");
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.RUNNING);
    assert.equal((await set()).generation, first.generation, "what the node reports is no new wish");
    await client().stopInstance({ instanceId: id });
    const second = await set();
    assert.ok(second.generation > first.generation);
    assert.equal(second.instances[0]?.state, DesiredState.STOPPED);
    assert.equal(second.instances[0].container, undefined);
  });

  it("keeps naming the attempt that the node knows while a new one waits", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const id = await run(nodeId, { gpu: h100(1) });
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 0 });
    const rival = await create({ gpu: h100(1) });
    await placeAll();
    assert.equal((await get(rival)).state, InstanceState.SCHEDULED);
    await client().startInstance({ instanceId: id });
    await placeAll();
    assert.match((await get(id)).message, /the node that holds its workspace has not that much free now/);
    const wish = await wishFor(nodeId, id);
    assert.equal(wish?.attempt, 1);
    assert.equal(wish.state, DesiredState.STOPPED);
  });
});

describe("reports", () => {
  it("that come again change nothing", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const id = await run(nodeId, { gpu: h100(1) });
    const { version } = await get(id);
    for (const phase of [AttemptPhase.PULLING, AttemptPhase.CREATING, AttemptPhase.RUNNING]) {
      await reportPhase(fixture, nodeId, { id, attempt: 1 }, phase);
    }
    assert.equal((await get(id)).version, version);
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 0 });
    const ended = await get(id);
    assert.equal(ended.reason, InstanceReason.COMPLETED);
    assert.equal(ended.exitCode, 0);
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 0 });
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.RUNNING);
    assert.equal((await get(id)).version, ended.version);
  });

  it("of another node's instances are left out and counted", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const stranger = await addNode(fixture);
    const id = await run(nodeId, { gpu: h100(1) });
    const { foreign } = await reportPhase(fixture, stranger, { id, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 1 });
    assert.equal(foreign, 1);
    assert.equal((await get(id)).state, InstanceState.RUNNING);
  });
});

describe("the restart policy", () => {
  it("starts the next attempt on the same GPUs, which nobody else gets meanwhile", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const id = await run(nodeId, { gpu: h100(1), restartPolicy: RestartPolicy.ON_FAILURE });
    const { gpus } = await get(id);
    const rival = await create({ gpu: h100(1) });
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 1 });
    await placeAll();
    const waiting = await get(id);
    assert.equal(waiting.reason, InstanceReason.RESTART_BACKOFF);
    assert.equal(waiting.attempt, 2);
    assert.equal(waiting.restartCount, 1);
    assert.deepEqual(waiting.gpus, gpus);
    assert.equal((await get(rival)).state, InstanceState.PENDING);
    const wish = await wishFor(nodeId, id);
    assert.equal(wish?.notBeforeTime?.seconds, BigInt(Math.floor((fixture.now.getTime() + 1000) / 1000)));
    await client().stopInstance({ instanceId: id });
    await reportPhase(fixture, nodeId, { id, attempt: 2 }, AttemptPhase.ENDED);
    assert.equal((await get(id)).reason, InstanceReason.STOPPED_BY_REQUEST);
    await placeAll();
    assert.equal((await get(rival)).state, InstanceState.SCHEDULED);
  });
});

describe("a node", () => {
  it("that falls silent and comes back is shown on its instances, which keep their state", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const id = await run(nodeId, { gpu: h100(1) });
    await administer("update nodes set state = 'unreachable', connected = false where id = $1", [nodeId]);
    await fixture.scheduler.followNodes(signal);
    const silent = await get(id);
    assert.equal(silent.nodeReachable, false);
    assert.equal(silent.state, InstanceState.RUNNING);
    await fixture.scheduler.followNodes(signal);
    assert.equal((await get(id)).version, silent.version);
    await administer("update nodes set state = 'ready', connected = true where id = $1", [nodeId]);
    await fixture.scheduler.followNodes(signal);
    assert.equal((await get(id)).nodeReachable, true);
  });

  it("whose GPU falls ill tells its instance so, and gives the GPU to nobody, until it is well", async () => {
    const nodeId = await addNode(fixture, { gpus: 2 });
    const ids = [await run(nodeId, { gpu: h100(1) }), await run(nodeId, { gpu: h100(1) })] as const;
    const [own] = (await get(ids[0])).gpus;
    assert.ok(own);
    const tell = async (healthMessage: string): Promise<void> => {
      const [node] = await fixture.db.database.system((tx) => fixture.nodes.nodes(tx, [nodeId]));
      assert.ok(node?.inventory);
      const health = healthMessage === "" ? GpuHealth.HEALTHY : GpuHealth.UNHEALTHY;
      const gpus = node.inventory.gpus.map((gpu) => (gpu.uuid === own.uuid ? { ...gpu, health, healthMessage } : gpu));
      const inventory = { ...node.inventory, gpus };
      await fixture.db.database.system((tx) => fixture.nodes.recordInventory(tx, nodeId, inventory));
      await fixture.scheduler.followNodes(signal);
    };
    const shown = async () =>
      Promise.all(
        ids.map(async (id) => (await get(id)).gpus.map(({ health, healthMessage }) => [health, healthMessage])),
      );
    const events = async () =>
      (await fixture.client(customer).listInstanceEvents({ instanceId: ids[0] })).events.map(({ reason }) => reason);
    const before = (await events()).length;

    await tell("GPU is lost");
    assert.deepEqual(await shown(), [[[GpuHealth.UNHEALTHY, "GPU is lost"]], [[GpuHealth.HEALTHY, ""]]]);
    assert.equal((await get(ids[0])).state, InstanceState.RUNNING);
    const { version } = await get(ids[0]);
    await fixture.scheduler.followNodes(signal);
    assert.equal((await get(ids[0])).version, version, "what is known is not told again");
    await tell("GPU requires reset");
    assert.deepEqual((await events()).slice(before), [InstanceReason.GPU_UNHEALTHY]);
    assert.equal((await get(ids[0])).gpus[0]?.healthMessage, "GPU requires reset");

    // Its sibling is free then, and the ill one is not.
    for (const id of ids) await client().stopInstance({ instanceId: id });
    for (const id of ids) await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.ENDED);
    const [lucky, waiting] = [await create({ gpu: h100(1) }), await create({ gpu: h100(1) })];
    await placeAll();
    assert.equal((await get(lucky)).state, InstanceState.SCHEDULED);
    assert.notEqual((await get(lucky)).gpus[0]?.uuid, own.uuid);
    assert.match((await get(waiting)).message, /has 2 x H100-SXM in all, 1 of them unhealthy/);
    await tell("");
    await placeAll();
    assert.equal((await get(waiting)).gpus[0]?.uuid, own.uuid);
  });

  it("that no longer tells of a GPU at all tells its instance so, and that it is back", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const id = await run(nodeId, { gpu: h100(1) });
    const [node] = await fixture.db.database.system((tx) => fixture.nodes.nodes(tx, [nodeId]));
    const { inventory } = node ?? {};
    assert.ok(inventory);
    for (const [gpus, words] of [
      [inventory.gpus, ""],
      [[], "its node no longer tells of it"],
      [inventory.gpus, ""],
    ] as const) {
      await fixture.db.database.system((tx) =>
        fixture.nodes.recordInventory(tx, nodeId, { ...inventory, gpus: [...gpus] }),
      );
      await fixture.scheduler.followNodes(signal);
      assert.equal((await get(id)).gpus[0]?.healthMessage, words);
    }
    const { events } = await fixture.client(customer).listInstanceEvents({ instanceId: id });
    assert.deepEqual(
      events.slice(-2).map(({ reason }) => reason),
      [InstanceReason.GPU_UNHEALTHY, InstanceReason.GPU_RECOVERED],
    );
  });

  it("that is revoked fails its instances with NODE_LOST and frees what they had", async () => {
    const nodeId = await addNode(fixture, { gpus: 1 });
    const id = await run(nodeId, { gpu: h100(1) });
    const deleting = await run(nodeId);
    await client().deleteInstance({ instanceId: deleting });
    await administer("update nodes set state = 'revoked', connected = false, revoke_time = now() where id = $1", [
      nodeId,
    ]);
    await fixture.scheduler.followNodes(signal);
    const lost = await get(id);
    assert.equal(lost.reason, InstanceReason.NODE_LOST);
    assert.deepEqual(lost.gpus, []);
    assert.equal((await get(deleting)).state, InstanceState.DELETED);
    const other = await addNode(fixture, { gpus: 1 });
    await client().startInstance({ instanceId: id });
    await placeAll();
    assert.ok(await wishFor(other, id));
    assert.equal(await wishFor(nodeId, id), undefined);
  });

  it("that comes back without a container has lost it, and keeps those that it has", async () => {
    const nodeId = await addNode(fixture);
    const kept = await run(nodeId);
    const gone = await run(nodeId);
    const containers = [{ $typeName: "clodei.node.v1.AttemptRef" as const, instanceId: kept, attempt: 1 }];
    await fixture.db.database.system((tx) => fixture.instances.reconcileHello(tx, nodeId, true, containers));
    assert.equal((await get(kept)).state, InstanceState.RUNNING);
    assert.equal((await get(gone)).reason, InstanceReason.NODE_LOST);
  });
});

describe("an organization", () => {
  it("has at most its share of the queue", async () => {
    const greedy = createCustomer();
    const { instance } = await fixture.client(greedy).createInstance({ spec: { image } });
    assert.ok(instance);
    const columns = `organization_id, spec, labels, gpu_model, created_by, create_time, update_time, version,
      event_count, attempt, restart_count, state, reason, message, queue_time, placement_deadline`;
    const ids = Array.from({ length: 999 }, () => newId("ins"));
    await administer(
      `insert into instances (id, ${columns})
       select new.id, ${columns} from instances, unnest($1::text[]) as new (id) where instances.id = $2`,
      [ids, instance.id],
    );
    await assert.rejects(fixture.client(greedy).createInstance({ spec: { image } }), /at most 1000 instances/);
    assert.ok(await create(), "the others go on");
    await fixture.client(greedy).deleteInstance({ instanceId: instance.id });
    assert.ok(await fixture.client(greedy).createInstance({ spec: { image } }));
  });
});

describe("a GPU that two nodes report", () => {
  it("is offered and given once: by the node that takes work, and of two by the older one", async () => {
    const older = await addNode(fixture, { gpus: 1, model: "B200" });
    // Ids of one millisecond do not tell which is older.
    await sleep(2);
    const newer = await addNode(fixture, { gpus: 1, model: "B200" });
    await administer("update nodes set inventory = (select inventory from nodes where id = $1) where id = $2", [
      older,
      newer,
    ]);
    const b200 = async () => {
      const fleet = await fixture.db.database.system((tx) => fixture.placement.readFleet(tx));
      return fleet.flatMap(({ id, gpus }) => gpus.flatMap((gpu) => (gpu.model === "B200" && gpu.usable ? [id] : [])));
    };
    assert.deepEqual(await b200(), [older]);
    const ids = [
      await create({ gpu: { model: "B200", count: 1 } }),
      await create({ gpu: { model: "B200", count: 1 } }),
    ];
    await placeAll();
    const states = await Promise.all(ids.map(async (id) => (await get(id)).state));
    assert.deepEqual(states, [InstanceState.SCHEDULED, InstanceState.PENDING]);
    // The card was moved: its new node has it once the old one is gone.
    await administer("update nodes set state = 'unreachable', connected = false where id = $1", [older]);
    assert.deepEqual(await b200(), [newer]);
  });
});

describe("offers", () => {
  it("follow what is allocated, for a caller of any organization", async () => {
    const nodeId = await addNode(fixture, { gpus: 2 });
    const availability = async () => {
      const { offers } = await fixture.catalog(createCustomer()).listOffers({ gpuModel: "H100-SXM" });
      return offers.map((offer) => offer.availability);
    };
    assert.deepEqual(await availability(), [Availability.AVAILABLE]);
    const id = await run(nodeId, { gpu: h100(2) });
    assert.deepEqual(await availability(), [Availability.NONE]);
    await reportPhase(fixture, nodeId, { id, attempt: 1 }, AttemptPhase.ENDED, { exitCode: 0 });
    assert.deepEqual(await availability(), [Availability.AVAILABLE]);
  });
});

describe("the running scheduler", () => {
  it("places within milliseconds of the commit that asks for it", async () => {
    await addNode(fixture, { gpus: 8, cpuCount: 64 });
    await using _running = startScheduler({ ...fixture.schedulerOptions, pollIntervalMs: 60_000 });
    const started = performance.now();
    const id = await create({ gpu: h100(1) });
    while ((await get(id)).state === InstanceState.PENDING) {
      assert.ok(performance.now() - started < 5_000, "the poll is a minute away: the hint must do it");
    }
  });
});

describe("what is written", () => {
  it("shows no rows without a tenant, and events can be changed by nobody", async () => {
    const id = await create();
    const { database } = fixture.db;
    for (const table of ["instances", "instance_events"]) {
      assert.deepEqual(await database.anonymous((tx) => tx.query(`select * from ${table}`)), []);
    }
    await assert.rejects(
      database.tenant(customer.organizationId, (tx) => tx.query("select * from gpu_allocations")),
      /permission denied/,
    );
    for (const text of [
      "update instance_events set message = 'x'",
      "delete from instance_events",
      "truncate instance_events",
    ]) {
      await assert.rejects(
        database.tenant(customer.organizationId, (tx) => tx.execute(text)),
        /permission denied/,
      );
      await assert.rejects(
        database.system((tx) => tx.execute(text)),
        /permission denied/,
      );
      await assert.rejects(administer(text), /never changed/);
    }
    const spec = database.tenant(customer.organizationId, (tx) =>
      tx.execute("update instances set gpus = '[]' where id = $1", [id]),
    );
    await assert.rejects(spec, /permission denied/);
  });

  it("is purged with its events 30 days after the deletion, and not before", async () => {
    const id = await create();
    await client().deleteInstance({ instanceId: id });
    await fixture.scheduler.purge(signal);
    assert.equal((await get(id)).state, InstanceState.DELETED);
    await administer("update instances set delete_time = now() - interval '29 days' where id = $1", [id]);
    await fixture.scheduler.purge(signal);
    assert.ok(await get(id));
    await administer("update instances set delete_time = now() - interval '31 days' where id = $1", [id]);
    await fixture.scheduler.purge(signal);
    await assert.rejects(get(id), /there is no such instance/);
    const events = await fixture.db.database.system((tx) =>
      tx.query("select 1 from instance_events where instance_id = $1", [id]),
    );
    assert.deepEqual(events, []);
  });
});
