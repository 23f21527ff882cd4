import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { GpuHealth } from "@clodei/proto/gen/clodei/v1/inventory";
import { newId, type NodeId } from "@clodei/proto/ids";
import { sqlStateOf } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import { type FleetNode, type NodeState, takesNewWork } from "./model.ts";
import { revokeNode, setCordoned } from "./operations.ts";
import type { HeartbeatFacts } from "./service.ts";
import { nodeToWire } from "./wire.ts";
import { leaseMs, startTestFleet, type TestFleet } from "./test-fleet.ts";

let fleet: TestFleet;
before(async () => {
  fleet = await startTestFleet();
});
after(() => fleet[Symbol.asyncDispose]());

const newNode = async (): Promise<NodeId> => (await fleet.enrollNode()).identity.node.nodeId;

const read = async (nodeId: NodeId): Promise<FleetNode> => {
  const [node] = await fleet.db.database.system((tx) => fleet.nodes.nodes(tx, [nodeId]));
  assert.ok(node);
  return node;
};

const beat = (facts: readonly HeartbeatFacts[]): Promise<HeartbeatFacts[]> =>
  fleet.db.database.system(async (tx) => {
    const news = await fleet.nodes.recordHeartbeats(tx, facts);
    await fleet.nodes.applyHeartbeats(tx, news);
    return news;
  });

const heartbeat = async (nodeId: NodeId, change: Partial<HeartbeatFacts> = {}): Promise<NodeState | undefined> => {
  const facts = {
    nodeId,
    gpus: [{ uuid: "GPU-SIM-1", health: GpuHealth.HEALTHY, healthMessage: "" }],
    acceptingWork: true,
    acceptingWorkMessage: "",
    observedGeneration: 0n,
    ...change,
  };
  await beat([facts]);
  return (await read(nodeId)).state;
};

/** Lets a node's lease be over, without waiting for it. */
const endLease = (nodeId: NodeId): Promise<unknown> =>
  fleet.db.database.system((tx) =>
    tx.execute("update nodes set lease_expire_time = clock_timestamp() - interval '1 ms' where id = $1", [nodeId]),
  );

/** Ends leases until none is left. */
async function expireLeases(): Promise<NodeId[]> {
  const all: NodeId[] = [];
  for (;;) {
    const some = await fleet.db.database.system((tx) => fleet.nodes.expireLeases(tx));
    all.push(...some);
    if (some.length === 0) return all;
  }
}

function reason(wanted: ErrorReason) {
  return (error: unknown): boolean => error instanceof DomainError && error.reason === wanted;
}

describe("sessions", () => {
  test("a Hello makes a node ready, with its inventory, and its first heartbeat lets work onto it", async () => {
    const nodeId = await newNode();
    const enrolled = await read(nodeId);
    assert.deepEqual([enrolled.state, enrolled.connected, enrolled.inventory], ["enrolled", false, undefined]);
    assert.ok(!takesNewWork(enrolled));
    await fleet.hello(nodeId);
    const ready = await read(nodeId);
    assert.deepEqual([ready.state, ready.connected, ready.agentVersion], ["ready", true, "2.0.0"]);
    assert.equal(ready.inventory?.gpus[0]?.model, "H100-SXM");
    assert.ok(!takesNewWork(ready), "an agent whose engine is away would let work wait");
    await heartbeat(nodeId);
    assert.ok(takesNewWork(await read(nodeId)));
    // Another Hello asks again, also where the next heartbeat says what the last one did.
    await fleet.hello(nodeId);
    assert.ok(!takesNewWork(await read(nodeId)));
    await heartbeat(nodeId);
    assert.ok(takesNewWork(await read(nodeId)));
  });

  test("a node that is not heard for the lease is unreachable, and ready with its next heartbeat", async () => {
    const [quiet, heard] = [await newNode(), await newNode()];
    await fleet.hello(quiet);
    await fleet.hello(heard);
    await endLease(quiet);
    await endLease(heard);
    await heartbeat(heard);
    const expired = await expireLeases();
    assert.ok(expired.includes(quiet));
    assert.ok(!expired.includes(heard), "its heartbeat extended the lease");
    const lost = await read(quiet);
    assert.equal(lost.state, "unreachable");
    assert.equal(lost.connected, false);
    assert.ok(!takesNewWork(lost));
    await heartbeat(quiet);
    assert.equal((await read(quiet)).state, "ready");
    assert.deepEqual(await expireLeases(), [], "and its lease runs again");
  });

  test("a lease is as long as it was said to be, by the database's clock", async () => {
    const nodeId = await newNode();
    await fleet.hello(nodeId);
    const [row] = await fleet.db.database.system((tx) =>
      tx.query<{ seconds: number }>(
        "select extract(epoch from lease_expire_time - heartbeat_time)::float8 as seconds from nodes where id = $1",
        [nodeId],
      ),
    );
    assert.ok(Math.abs((row?.seconds ?? 0) * 1000 - leaseMs) < 100);
  });

  test("a heartbeat changes the node only where it says something new", async () => {
    const nodeId = await newNode();
    await fleet.hello(nodeId);
    await heartbeat(nodeId);
    const before = await read(nodeId);
    await heartbeat(nodeId);
    const same = await read(nodeId);
    assert.equal(same.version, before.version);
    assert.ok((same.heartbeatTime ?? 0) > (before.heartbeatTime ?? 0));
    const ill = { uuid: "GPU-SIM-1", health: GpuHealth.UNHEALTHY, healthMessage: "ERR!" };
    await heartbeat(nodeId, { gpus: [ill], observedGeneration: 7n });
    const changed = await read(nodeId);
    assert.equal(changed.version, before.version + 1n);
    assert.equal(changed.inventory?.gpus[0]?.health, GpuHealth.UNHEALTHY);
    assert.equal(changed.inventory?.gpus[0]?.healthMessage, "ERR!");
    assert.equal(changed.observedGeneration, 7n);
    await heartbeat(nodeId, { gpus: [], acceptingWork: false, acceptingWorkMessage: "the disk is full" });
    const full = await read(nodeId);
    assert.equal(full.inventory?.gpus[0]?.health, GpuHealth.UNHEALTHY, "no news of a GPU is not good news");
    assert.equal(full.acceptingWorkMessage, "the disk is full");
    assert.ok(!takesNewWork(full));
  });

  test("many heartbeats at once are taken in one go, and one of an unknown node harms nobody", async () => {
    const nodeIds = [await newNode(), await newNode(), await newNode()];
    const facts = (nodeId: NodeId): HeartbeatFacts => ({
      nodeId,
      gpus: [],
      acceptingWork: true,
      acceptingWorkMessage: "",
      observedGeneration: 1n,
    });
    const unknown = newId("nod");
    const news = await beat([...nodeIds, unknown].map(facts));
    assert.deepEqual(
      news.map(({ nodeId }) => nodeId),
      nodeIds,
    );
    for (const nodeId of nodeIds) assert.equal((await read(nodeId)).state, "ready");
    assert.deepEqual(await beat(nodeIds.map(facts)), [], "the same again is no news");
  });

  test("a session that ended leaves the node ready until its lease ends, and without new work", async () => {
    const nodeId = await newNode();
    await fleet.hello(nodeId);
    await heartbeat(nodeId);
    await fleet.db.database.system((tx) => fleet.nodes.recordDisconnect(tx, nodeId));
    const node = await read(nodeId);
    assert.equal(node.state, "ready");
    assert.equal(node.connected, false);
    assert.ok(!takesNewWork(node));
    assert.ok(!(await expireLeases()).includes(nodeId));
    await endLease(nodeId);
    assert.ok((await expireLeases()).includes(nodeId));
  });
});

describe("decisions", () => {
  test("quarantine takes a node out of work, counts once, and neither Hello nor heartbeat undoes it", async () => {
    const nodeId = await newNode();
    await fleet.hello(nodeId);
    const quarantine = (): Promise<boolean> =>
      fleet.db.database.system((tx) => fleet.nodes.quarantine(tx, nodeId, "two processes use its identity"));
    const count = async (): Promise<number> => {
      const metric = await fleet.registry.getSingleMetric("clodei_node_quarantines_total")?.get();
      return metric?.values[0]?.value ?? 0;
    };
    const before = await count();
    assert.equal(await quarantine(), true);
    assert.equal(await quarantine(), false);
    assert.equal(await count(), before + 1);
    await assert.rejects(fleet.hello(nodeId), reason(ErrorReason.NODE_QUARANTINED));
    assert.equal(await heartbeat(nodeId), "quarantined");
    const node = await read(nodeId);
    assert.equal(node.state, "quarantined");
    assert.equal(node.message, "two processes use its identity");
    assert.ok(!takesNewWork(node));
  });

  test("revocation is for good, ends the certificates, and repeats without effect", async () => {
    const { identity } = await fleet.enrollNode();
    const { nodeId } = identity.node;
    await fleet.hello(nodeId);
    const revoke = (comment: string) =>
      fleet.db.database.system((tx) => revokeNode(tx, nodeId, comment, fleet.now(), fleet.db.wakeups));
    const revoked = await revoke("stolen");
    assert.equal(revoked.state, "revoked");
    assert.equal(revoked.message, "stolen");
    assert.equal((await revoke("again")).version, revoked.version);
    const serial = fleet.authority.issued(identity.certificate)?.serial ?? "";
    const checks = await fleet.db.database.system((tx) => fleet.nodes.checkCertificates(tx, [serial, "00"]));
    assert.equal(checks.size, 1);
    const check = checks.get(serial);
    assert.equal(check?.state, "revoked");
    assert.equal(check?.fault, "ended");
    await assert.rejects(fleet.hello(nodeId), reason(ErrorReason.NODE_REVOKED));
    assert.equal(await heartbeat(nodeId), "revoked");
    assert.equal((await read(nodeId)).connected, false);
    const known = await fleet.db.database.system((tx) => fleet.nodes.fleet(tx));
    assert.ok(!known.some((node) => node.nodeId === nodeId));
  });

  test("of certificates that were good, those are named that are so no more", async () => {
    const enrolled = [await fleet.enrollNode(), await fleet.enrollNode(), await fleet.enrollNode()];
    const serials = enrolled.map(({ identity }) => fleet.authority.issued(identity.certificate)?.serial ?? "");
    const [good = "", quarantined = "", revoked = ""] = serials;
    const ended = async (asked: readonly string[]): Promise<Set<string>> =>
      new Set(await fleet.db.database.system((tx) => fleet.nodes.endedCertificates(tx, asked)));
    assert.deepEqual(await ended(serials), new Set());
    await fleet.db.database.system(async (tx) => {
      const [, second, third] = enrolled.map(({ identity }) => identity.node.nodeId);
      if (second !== undefined) await fleet.nodes.quarantine(tx, second, "twice");
      if (third !== undefined) await revokeNode(tx, third, "", fleet.now(), fleet.db.wakeups);
    });
    assert.deepEqual(await ended([...serials, "00"]), new Set([quarantined, revoked, "00"]));
    assert.deepEqual(await ended([good]), new Set());
  });

  test("hints follow the commit: who holds the session hears of a revocation at once", async () => {
    const nodeId = await newNode();
    const heard: string[] = [];
    using _node = fleet.db.wakeups.subscribe([`node:${nodeId}`], () => heard.push("node"));
    using _placement = fleet.db.wakeups.subscribe(["placement"], () => heard.push("placement"));
    await assert.rejects(
      fleet.db.database.system(async (tx) => {
        await revokeNode(tx, nodeId, "", fleet.now(), fleet.db.wakeups);
        throw new Error("rolled back");
      }),
    );
    assert.deepEqual(heard, []);
    await fleet.db.database.system((tx) => revokeNode(tx, nodeId, "", fleet.now(), fleet.db.wakeups));
    assert.deepEqual(new Set(heard), new Set(["node", "placement"]));
    assert.equal(heard.length, 2);
  });

  test("a cordoned node runs on and takes nothing new", async () => {
    const nodeId = await newNode();
    await fleet.hello(nodeId);
    const cordon = (cordoned: boolean) =>
      fleet.db.database.system((tx) => setCordoned(tx, nodeId, cordoned, fleet.db.wakeups));
    const cordoned = await cordon(true);
    assert.equal(cordoned.state, "ready");
    assert.ok(!takesNewWork(cordoned));
    assert.equal((await cordon(true)).version, cordoned.version);
    await fleet.hello(nodeId);
    assert.ok((await read(nodeId)).cordoned, "a reconnect does not uncordon");
    await heartbeat(nodeId);
    assert.ok(takesNewWork(await cordon(false)));
  });

  test("what is not there is not found, in words that help", async () => {
    const nodeId = newId("nod");
    await assert.rejects(
      fleet.db.database.system((tx) => fleet.nodes.quarantine(tx, nodeId, "")),
      (error) => reason(ErrorReason.NOT_FOUND)(error) && String(error).includes("ListNodes"),
    );
  });
});

describe("the desired set's generation", () => {
  test("moves on from a tenant's transaction and from the system's, one by one, also at once", async () => {
    const nodeId = await newNode();
    const organizationId = newId("org");
    await fleet.db.database.tenant(organizationId, (tx) => fleet.nodes.bumpDesiredGeneration(tx, nodeId));
    const generations = await Promise.all(
      Array.from({ length: 6 }, (_, index) =>
        index % 2 === 0
          ? fleet.db.database.tenant(organizationId, (tx) => fleet.nodes.bumpDesiredGeneration(tx, nodeId))
          : fleet.db.database.system((tx) => fleet.nodes.bumpDesiredGeneration(tx, nodeId)),
      ),
    );
    assert.deepEqual(new Set(generations), new Set([2n, 3n, 4n, 5n, 6n, 7n]));
    assert.equal((await read(nodeId)).desiredGeneration, 7n);
    await assert.rejects(fleet.db.database.system((tx) => fleet.nodes.bumpDesiredGeneration(tx, newId("nod"))));
  });
});

test("a node that tells of other GPUs each time fills no table", async () => {
  const nodeId = await newNode();
  await fleet.hello(nodeId);
  const { inventory } = await read(nodeId);
  const [gpu] = inventory?.gpus ?? [];
  assert.ok(inventory !== undefined && gpu !== undefined);
  for (let round = 0; round < 3; round += 1) {
    const gpus = Array.from({ length: 64 }, (_, index) => ({ ...gpu, uuid: `GPU-${round}-${index}` }));
    await fleet.db.database.system((tx) => fleet.nodes.recordInventory(tx, nodeId, { ...inventory, gpus }));
  }
  const [row] = await fleet.db.database.system((tx) =>
    tx.query<{ count: bigint }>("select count(*) as count from node_gpus where node_id = $1", [nodeId]),
  );
  assert.equal(row?.count, 128n);
});

describe("a GPU that two nodes report", () => {
  test("is told to the operator on both, until one of them no longer has it", async () => {
    const [one, other, third] = [await newNode(), await newNode(), await newNode()];
    const nodeIds = [one, other, third];
    const report = async (nodeId: NodeId, ...uuids: string[]): Promise<void> => {
      const { inventory } = await read(nodeId);
      assert.ok(inventory);
      const gpus = uuids.flatMap((uuid) => inventory.gpus.slice(0, 1).map((gpu) => ({ ...gpu, uuid })));
      await fleet.db.database.system((tx) => fleet.nodes.recordInventory(tx, nodeId, { ...inventory, gpus }));
    };
    const messages = async () => {
      await fleet.db.database.system((tx) => fleet.nodes.noteSharedGpus(tx));
      return Promise.all(nodeIds.map(async (nodeId) => nodeToWire(await read(nodeId), undefined).message ?? ""));
    };
    for (const nodeId of nodeIds) await fleet.hello(nodeId);
    await report(one, "GPU-SIM-a", "GPU-SIM-b");
    await report(other, "GPU-SIM-b", "GPU-SIM-c");
    // The same twice from one node is that node's own mistake.
    await report(third, "GPU-SIM-d", "GPU-SIM-d");
    const [first, second, none] = await messages();
    const name = async (nodeId: NodeId) => (await read(nodeId)).name;
    assert.match(first ?? "", new RegExp(`as well: GPU-SIM-b \\(by ${await name(other)}\\);`));
    assert.match(second ?? "", new RegExp(`as well: GPU-SIM-b \\(by ${await name(one)}\\);`));
    assert.equal(none, "");
    const { version } = await read(one);
    await messages();
    assert.equal((await read(one)).version, version, "what is known is not told again");
    await heartbeat(one);
    assert.equal((await messages())[0], first, "a heartbeat does not take it away");
    await report(third, "GPU-SIM-b");
    // In the order of ids, of which those of one millisecond are random.
    const names = await Promise.all([other, third].toSorted().map(name));
    assert.match((await messages())[0] ?? "", new RegExp(`\\(by ${names.join(", ")}\\)`));
    await report(third);
    await fleet.db.database.system((tx) => revokeNode(tx, other, "moved", new Date(), fleet.db.wakeups));
    assert.deepEqual((await messages()).slice(0, 1), [""]);
  });
});

describe("rights in the database", () => {
  const denied = (error: unknown): boolean => sqlStateOf(error) === "42501";

  test("the login that serves requests sees no table of the fleet", async () => {
    const tables = [
      "nodes",
      "enrollment_tokens",
      "enrollments",
      "node_certificates",
      "used_renewal_challenges",
      "node_gpus",
    ];
    for (const table of tables) {
      const read = fleet.db.database.tenant(newId("org"), (tx) => tx.query(`select 1 from ${table}`));
      await assert.rejects(read, denied, table);
    }
  });

  test("no login of ours moves a node elsewhere, deletes a record, or changes who enrolled", async () => {
    const statements = [
      "update nodes set country = 'US'",
      "delete from nodes",
      "update enrollment_tokens set secret_hash = sha256('x')",
      "delete from enrollments",
      "update enrollments set node_id = node_id",
      "update node_certificates set expire_time = 'infinity'",
      "truncate node_certificates",
      "update node_gpus set node_id = node_id",
    ];
    for (const statement of statements) {
      await assert.rejects(
        fleet.db.database.system((tx) => tx.execute(statement)),
        denied,
        statement,
      );
    }
  });
});
