import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import pg from "pg";
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  AttemptPhase,
  DesiredState,
  type AttemptStatusSchema,
  type UsageIntervalSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import type { InstanceId } from "@clodei/proto/ids";
import { createNodeClient, eventually, ScriptedAgent } from "./scripted-agent.ts";
import { TestFleet, type NodeIdentity, type Replica } from "./test-fleet.ts";

let fleet: TestFleet;
let replica: Replica;

before(async () => {
  fleet = await TestFleet.start();
  replica = await fleet.startReplica();
});
after(() => fleet[Symbol.asyncDispose]());

type Status = Partial<Exclude<MessageInitShape<typeof AttemptStatusSchema>, { $typeName: string }>>;
type Interval = Partial<Exclude<MessageInitShape<typeof UsageIntervalSchema>, { $typeName: string }>>;

function clientOf(identity: NodeIdentity) {
  return createNodeClient(replica.listener.port, identity, fleet.authority.certificatePem);
}

function sendStatuses(agent: ScriptedAgent, instanceId: string, statuses: readonly [bigint, Status][]): void {
  agent.send({
    case: "statusReport",
    value: {
      sequence: statuses.at(-1)?.[0] ?? 0n,
      statuses: statuses.map(([sequence, status]) => ({ sequence, instanceId, attempt: 1, ...status })),
    },
  });
}

function sendUsage(agent: ScriptedAgent, instanceId: string, intervals: readonly [bigint, Interval][]): void {
  agent.send({
    case: "usageReport",
    value: {
      sequence: intervals.at(-1)?.[0] ?? 0n,
      intervals: intervals.map(([sequence, interval]) => ({
        sequence,
        instanceId,
        attempt: 1,
        bootId: "boot-1",
        beginMonotonicMs: 1_000n,
        endMonotonicMs: 2_000n,
        ...interval,
      })),
    },
  });
}

async function stateOf(instanceId: InstanceId): Promise<string | undefined> {
  const [row] = await fleet.rows<{ state: string }>("select state from instances where id = $1", [instanceId]);
  return row?.state;
}

async function intervalsOf(nodeId: string): Promise<bigint[]> {
  const rows = await fleet.rows<{ sequence: bigint }>(
    "select sequence from usage_intervals where node_id = $1 order by sequence",
    [nodeId],
  );
  return rows.map(({ sequence }) => sequence);
}

/** A node with one instance on it, that its agent was told of. */
async function nodeWithInstance(): Promise<{
  node: NodeIdentity;
  agent: ScriptedAgent;
  secret: Uint8Array;
  instanceId: InstanceId;
}> {
  const node = await fleet.enroll();
  const { agent, welcome } = await ScriptedAgent.open(clientOf(node));
  agent.heartbeat(1n);
  await agent.next("ack");
  const instanceId = await fleet.createInstance(replica);
  const { instances } = await agent.desired(1);
  assert.equal(instances[0]?.instanceId, instanceId);
  assert.equal(instances[0].state, DesiredState.RUNNING);
  return { node, agent, secret: welcome.sessionSecret, instanceId };
}

/** Ends a node's part in the test, so that the next instance is placed on another. */
async function retire(node: NodeIdentity, agent: ScriptedAgent): Promise<void> {
  await fleet.revoke(node.nodeId);
  agent.break();
}

test("a new instance reaches its node at once, and its statuses are acknowledged after the commit", async () => {
  const { node, agent, instanceId } = await nodeWithInstance();
  sendStatuses(agent, instanceId, [
    [1n, { phase: AttemptPhase.PULLING }],
    [2n, { phase: AttemptPhase.RUNNING }],
  ]);
  assert.equal((await agent.next("ack")).sequence, 2n);
  assert.equal(await stateOf(instanceId), "RUNNING", "by the time of the acknowledgement it is committed");
  await retire(node, agent);
});

test("a gap is left out and asked for again; a replay changes nothing", async () => {
  const { node, agent, secret, instanceId } = await nodeWithInstance();
  sendUsage(agent, instanceId, [
    [1n, {}],
    [2n, {}],
  ]);
  assert.equal((await agent.next("ack")).sequence, 2n);
  sendUsage(agent, instanceId, [[4n, {}]]);
  assert.equal((await agent.next("ack")).sequence, 2n, "the acknowledgement says where the hole begins");
  sendUsage(agent, instanceId, [
    [3n, {}],
    [5n, {}],
  ]);
  assert.equal((await agent.next("ack")).sequence, 3n, "what stands before the hole is taken");
  assert.deepEqual(await intervalsOf(node.nodeId), [1n, 2n, 3n]);
  const again = await ScriptedAgent.open(clientOf(node), { sessionSecret: secret, journalSequence: 5n });
  assert.equal(again.welcome.acknowledgedSequence, 3n);
  sendUsage(again.agent, instanceId, [
    [1n, { endMonotonicMs: 9_000n }],
    [2n, {}],
    [3n, {}],
    [4n, {}],
    [5n, {}],
  ]);
  assert.equal((await again.agent.next("ack")).sequence, 5n);
  assert.deepEqual(await intervalsOf(node.nodeId), [1n, 2n, 3n, 4n, 5n]);
  const [first] = await fleet.rows<{ end_monotonic_ms: bigint; organization_id: string }>(
    "select end_monotonic_ms, organization_id from usage_intervals where node_id = $1 and sequence = 1",
    [node.nodeId],
  );
  assert.deepEqual(first, { end_monotonic_ms: 2_000n, organization_id: fleet.organizationId }, "the first word stands");
  await retire(node, again.agent);
});

test("a new journal begins at 1, beside the old one", async () => {
  const { node, agent, secret, instanceId } = await nodeWithInstance();
  sendUsage(agent, instanceId, [[1n, {}]]);
  await agent.next("ack");
  const { agent: next, welcome } = await ScriptedAgent.open(clientOf(node), {
    sessionSecret: secret,
    journalId: "journal-2",
  });
  assert.equal(welcome.acknowledgedSequence, 0n);
  sendUsage(next, instanceId, [[1n, {}]]);
  assert.equal((await next.next("ack")).sequence, 1n);
  assert.deepEqual(await intervalsOf(node.nodeId), [1n, 1n]);
  await retire(node, next);
});

test("a node cannot report about an instance of another node", async () => {
  const { node, agent, instanceId } = await nodeWithInstance();
  const stranger = await fleet.enroll();
  const { agent: other } = await ScriptedAgent.open(clientOf(stranger));
  sendStatuses(other, instanceId, [
    [1n, { phase: AttemptPhase.ENDED, reason: InstanceReason.EXITED_NONZERO, exitCode: 1 }],
  ]);
  assert.equal((await other.next("ack")).sequence, 1n, "it would never become its own: past it");
  sendUsage(other, instanceId, [[2n, {}]]);
  assert.equal((await other.next("ack")).sequence, 2n);
  assert.equal(await stateOf(instanceId), "SCHEDULED");
  assert.deepEqual(await intervalsOf(stranger.nodeId), []);
  const metrics = await replica.registry.metrics();
  assert.match(metrics, /clodei_node_foreign_reports_total\{kind="status"\} 1/);
  assert.match(metrics, /clodei_node_foreign_reports_total\{kind="usage"\} 1/);
  await retire(node, agent);
  await retire(stranger, other);
});

test("an interval of an attempt that never was, or that ends before it begins, is left out", async () => {
  const { node, agent, instanceId } = await nodeWithInstance();
  sendUsage(agent, instanceId, [
    [1n, { attempt: 2 }],
    [2n, { beginMonotonicMs: 5_000n }],
    [3n, {}],
  ]);
  assert.equal((await agent.next("ack")).sequence, 3n);
  assert.deepEqual(await intervalsOf(node.nodeId), [3n]);
  await retire(node, agent);
});

test("what the journal holds comes before what Hello says: a job that ended during an outage is not lost", async () => {
  const { node, agent, secret, instanceId } = await nodeWithInstance();
  sendStatuses(agent, instanceId, [[1n, { phase: AttemptPhase.RUNNING }]]);
  await agent.next("ack");
  const seen = agent.count("desiredSet");
  assert.ok(seen > 0);
  // It ended, and its container was removed, while the link was down; the report waits in the journal.
  const { agent: back } = await ScriptedAgent.open(clientOf(node), { sessionSecret: secret, journalSequence: 2n });
  await new Promise((resolve) => setTimeout(resolve, 700));
  assert.equal(await stateOf(instanceId), "RUNNING");
  assert.equal(back.count("desiredSet"), 0, "nothing is asked of a node whose news are not in");
  sendStatuses(back, instanceId, [[2n, { phase: AttemptPhase.ENDED, reason: InstanceReason.COMPLETED, exitCode: 0 }]]);
  await back.desired();
  const [row] = await fleet.rows<{ state: string; reason: string }>(
    "select state, reason from instances where id = $1",
    [instanceId],
  );
  assert.deepEqual(row, { state: "STOPPED", reason: "COMPLETED" });
  await retire(node, back);
});

test("a container that ran and is not in Hello, with nothing in the journal, is lost", async () => {
  const { node, agent, secret, instanceId } = await nodeWithInstance();
  sendStatuses(agent, instanceId, [[1n, { phase: AttemptPhase.RUNNING }]]);
  await agent.next("ack");
  const { agent: back } = await ScriptedAgent.open(clientOf(node), { sessionSecret: secret, journalSequence: 1n });
  await eventually("the instance failed", async () => (await stateOf(instanceId)) === "FAILED");
  await retire(node, back);
});

test("while the database goes away again and again, the session stands and no report is lost or doubled", async () => {
  const { node, agent, instanceId } = await nodeWithInstance();
  const administrator = new pg.Client(fleet.db.administrator);
  await administrator.connect();
  try {
    for (let sequence = 1n; sequence <= 60n; sequence += 1n) {
      sendUsage(agent, instanceId, [[sequence, {}]]);
      if (sequence % 10n !== 0n) continue;
      await administrator.query(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name in ('clodei-app', 'clodei-system')",
      );
    }
  } finally {
    await administrator.end();
  }
  await agent.next("ack", (ack) => ack.sequence === 60n);
  assert.equal(agent.end, undefined);
  const expected = Array.from({ length: 60 }, (_, index) => BigInt(index) + 1n);
  assert.deepEqual(await intervalsOf(node.nodeId), expected);
  await retire(node, agent);
});

test("usage intervals cannot be changed or removed, by any login and by the owner", async () => {
  const { node, agent, instanceId } = await nodeWithInstance();
  sendUsage(agent, instanceId, [[1n, {}]]);
  await agent.next("ack");
  const statements = [
    "update usage_intervals set end_monotonic_ms = 9",
    "delete from usage_intervals",
    "truncate usage_intervals",
  ];
  const administrator = new pg.Client(fleet.db.administrator);
  await administrator.connect();
  try {
    for (const replication of ["origin", "replica"]) {
      await administrator.query(`set session_replication_role = ${replication}`);
      for (const statement of statements) {
        await assert.rejects(administrator.query(statement), /never changed/, `${statement} as ${replication}`);
      }
    }
  } finally {
    await administrator.end();
  }
  for (const statement of statements) {
    await assert.rejects(
      fleet.db.database.system((tx) => tx.execute(statement)),
      /permission denied/,
    );
    await assert.rejects(
      fleet.db.database.tenant(fleet.organizationId, (tx) => tx.execute(statement)),
      /permission denied/,
    );
  }
  const seen = await fleet.db.database.tenant(fleet.organizationId, (tx) => tx.query("select 1 from usage_intervals"));
  assert.ok(seen.length > 0);
  const unseen = await fleet.db.database.anonymous((tx) => tx.query("select 1 from usage_intervals"));
  assert.equal(unseen.length, 0);
  await retire(node, agent);
});
