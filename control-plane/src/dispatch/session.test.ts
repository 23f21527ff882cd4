import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { GpuHealth } from "@clodei/proto/gen/clodei/v1/inventory";
import { createNodeClient, eventually, ScriptedAgent } from "./scripted-agent.ts";
import { certificateLifetimeMs, TestFleet, type NodeIdentity, type Replica } from "./test-fleet.ts";

let fleet: TestFleet;
let replica: Replica;
let other: Replica;
/** Where leases end soon. */
let hasty: Replica;

before(async () => {
  fleet = await TestFleet.start();
  replica = await fleet.startReplica();
  other = await fleet.startReplica();
  hasty = await fleet.startReplica({ leaseMs: 3_000 });
});
after(() => fleet[Symbol.asyncDispose]());

function clientOf(identity: NodeIdentity, at: Replica = replica) {
  return createNodeClient(at.listener.port, identity, fleet.authority.certificatePem);
}

async function nodeState(nodeId: string): Promise<string | undefined> {
  const [row] = await fleet.rows<{ state: string }>("select state from nodes where id = $1", [nodeId]);
  return row?.state;
}

test("Hello is answered by Welcome and the desired set, and the secret is stored as a hash", async () => {
  const node = await fleet.enroll();
  const { agent, welcome } = await ScriptedAgent.open(clientOf(node));
  assert.equal(welcome.sessionSecret.length, 32);
  assert.equal(welcome.acknowledgedSequence, 0n);
  assert.equal((await agent.desired()).instances.length, 0);
  const [row] = await fleet.rows<{ secret_hash: Buffer }>("select secret_hash from node_sessions where node_id = $1", [
    node.nodeId,
  ]);
  assert.deepEqual(row?.secret_hash, createHash("sha256").update(welcome.sessionSecret).digest());
  agent.break();
});

test("a reconnect with the secret replaces the older session at once, in this process and in another", async () => {
  const node = await fleet.enroll();
  const first = await ScriptedAgent.open(clientOf(node));
  first.agent.heartbeat(1n);
  await first.agent.next("ack");
  const second = await ScriptedAgent.open(clientOf(node), { sessionSecret: first.welcome.sessionSecret });
  assert.equal((await first.agent.goodbye()).reason, ErrorReason.SESSION_REPLACED);
  second.agent.heartbeat(1n);
  await second.agent.next("ack");
  const third = await ScriptedAgent.open(clientOf(node, other), { sessionSecret: second.welcome.sessionSecret });
  assert.equal((await second.agent.goodbye()).reason, ErrorReason.SESSION_REPLACED);
  assert.equal(first.agent.count("probe") + second.agent.count("probe"), 0, "nobody was asked");
  assert.equal(await nodeState(node.nodeId), "ready");
  third.agent.break();
});

test("an agent that died before it stored the new secret is no clone, until the new secret was in use", async () => {
  const node = await fleet.enroll();
  const first = await ScriptedAgent.open(clientOf(node));
  // Never stored: the agent shows nothing again, as at its very first Hello.
  const second = await ScriptedAgent.open(clientOf(node));
  assert.equal((await first.agent.goodbye()).reason, ErrorReason.SESSION_REPLACED);
  second.agent.heartbeat(1n);
  await second.agent.next("ack");
  // Stored this one, and not the next.
  const third = await ScriptedAgent.open(clientOf(node), { sessionSecret: second.welcome.sessionSecret });
  const fourth = await ScriptedAgent.open(clientOf(node), { sessionSecret: second.welcome.sessionSecret });
  assert.equal((await third.agent.goodbye()).reason, ErrorReason.SESSION_REPLACED);
  fourth.agent.heartbeat(1n);
  await fourth.agent.next("ack");
  const copy = new ScriptedAgent(clientOf(node));
  copy.hello({ sessionSecret: second.welcome.sessionSecret });
  assert.equal((await copy.goodbye()).reason, ErrorReason.NODE_QUARANTINED, "by now only a copy can show it");
  assert.equal((await fourth.agent.goodbye()).reason, ErrorReason.NODE_QUARANTINED);
});

for (const where of ["the same process", "another process"] as const) {
  test(`a second process without the secret quarantines the node, connected to ${where}`, async () => {
    const node = await fleet.enroll();
    const honest = await ScriptedAgent.open(clientOf(node));
    honest.agent.heartbeat(1n);
    await honest.agent.next("ack");
    const clone = new ScriptedAgent(clientOf(node, where === "another process" ? other : replica));
    clone.hello({ sessionSecret: new Uint8Array(32) });
    assert.equal((await clone.goodbye()).reason, ErrorReason.NODE_QUARANTINED);
    assert.equal((await honest.agent.goodbye()).reason, ErrorReason.NODE_QUARANTINED);
    assert.equal(await nodeState(node.nodeId), "quarantined");
    const again = new ScriptedAgent(clientOf(node));
    again.hello({ sessionSecret: honest.welcome.sessionSecret });
    assert.equal((await again.goodbye()).reason, ErrorReason.NODE_QUARANTINED, "until an operator enrolls it again");
  });

  test(`a session that does not answer is replaced without the secret, connected to ${where}`, async () => {
    const node = await fleet.enroll();
    const dead = await ScriptedAgent.open(clientOf(node));
    dead.agent.heartbeat(1n);
    await dead.agent.next("ack");
    dead.agent.answersProbes = false;
    const { agent } = await ScriptedAgent.open(clientOf(node, where === "another process" ? other : replica));
    assert.equal(dead.agent.count("probe"), 1);
    assert.equal((await dead.agent.goodbye()).reason, ErrorReason.SESSION_REPLACED);
    assert.equal(await nodeState(node.nodeId), "ready");
    agent.break();
  });
}

test("a late Hello whose connection is gone by the answer quarantines nobody", async () => {
  const node = await fleet.enroll();
  const honest = await ScriptedAgent.open(clientOf(node));
  honest.agent.heartbeat(1n);
  await honest.agent.next("ack");
  const late = new ScriptedAgent(clientOf(node));
  late.hello();
  await honest.agent.next("probe");
  late.break();
  honest.agent.heartbeat(2n);
  await honest.agent.next("ack", (ack) => ack.heartbeatSequence === 2n);
  await new Promise((resolve) => setTimeout(resolve, 400));
  assert.equal(await nodeState(node.nodeId), "ready");
  honest.agent.break();
});

test("revocation closes the stream, and the node may not come back", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node));
  await fleet.revoke(node.nodeId);
  assert.equal((await agent.goodbye()).reason, ErrorReason.NODE_REVOKED);
  const again = new ScriptedAgent(clientOf(node));
  again.hello();
  assert.equal((await again.goodbye()).reason, ErrorReason.NODE_REVOKED);
});

test("a session ends when its certificate does", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node));
  agent.heartbeat(1n);
  await agent.next("ack");
  fleet.clockOffsetMs = certificateLifetimeMs + 1_000;
  try {
    assert.equal((await agent.goodbye()).reason, ErrorReason.CERTIFICATE_INVALID);
  } finally {
    fleet.clockOffsetMs = 0;
  }
});

test("what breaks the protocol or the schema is a violation", async () => {
  const node = await fleet.enroll();
  const client = clientOf(node);
  const first = new ScriptedAgent(client);
  first.heartbeat(1n);
  assert.equal((await first.goodbye()).reason, ErrorReason.PROTOCOL_VIOLATION, "Hello comes first");
  const second = await ScriptedAgent.open(clientOf(node));
  second.agent.hello();
  assert.equal((await second.agent.goodbye()).reason, ErrorReason.PROTOCOL_VIOLATION, "Hello comes once");
  const third = await ScriptedAgent.open(clientOf(node));
  third.agent.send({ case: "statusReport", value: { sequence: 0n, statuses: [] } });
  const goodbye = await third.agent.goodbye();
  assert.equal(goodbye.reason, ErrorReason.PROTOCOL_VIOLATION);
  assert.match(goodbye.message, /statuses/);
  const fourth = new ScriptedAgent(clientOf(node));
  fourth.hello({ observedGeneration: 2n ** 63n });
  assert.equal((await fourth.goodbye()).reason, ErrorReason.PROTOCOL_VIOLATION, "no column can hold it");
  const fifth = new ScriptedAgent(clientOf(node));
  fifth.hello({ protocolVersion: 2 });
  assert.equal((await fifth.goodbye()).reason, ErrorReason.VERSION_NOT_SUPPORTED);
});

test("a NUL in a tool's words does not lock a node out", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node), { agentVersion: "1\0" });
  await agent.desired();
  agent.break();
});

test("a session whose agent leaves while it begins is ended once it has begun", async () => {
  const node = await fleet.enroll();
  const agent = new ScriptedAgent(clientOf(node));
  await fleet.db.database.system(async (tx) => {
    await tx.execute("lock table changes in exclusive mode");
    agent.hello();
    await eventually("the beginning waits", async () => {
      const waiting = await fleet.rows("select from pg_locks where relation = 'changes'::regclass and not granted");
      return waiting.length > 0;
    });
    agent.break();
    await sleep(200);
  });
  await eventually("the session is ended", async () => {
    const [row] = await fleet.rows<{ end_time: Date | null }>("select end_time from node_sessions where node_id = $1", [
      node.nodeId,
    ]);
    return row !== undefined && row.end_time !== null;
  });
});

test("heartbeats hold the lease and carry the health of GPUs; without them the node is unreachable", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node, hasty));
  agent.heartbeat(1n);
  assert.equal((await agent.next("ack")).heartbeatSequence, 1n);
  assert.equal(await nodeState(node.nodeId), "ready");
  agent.heartbeat(2n, GpuHealth.UNHEALTHY);
  await agent.next("ack", (ack) => ack.heartbeatSequence === 2n);
  await eventually("the GPU is unhealthy", async () => {
    const [stored] = await fleet.db.database.system((tx) => replica.nodes.nodes(tx, [node.nodeId]));
    return stored?.inventory?.gpus[0]?.health === GpuHealth.UNHEALTHY;
  });
  agent.break();
  await eventually("the node is unreachable", async () => (await nodeState(node.nodeId)) === "unreachable");
  const [row] = await fleet.rows<{ connected: boolean }>("select connected from nodes where id = $1", [node.nodeId]);
  assert.equal(row?.connected, false);
});

test("heartbeats are acknowledged before what they say is taken in, and the last one is the last word", async () => {
  const begin = async () => {
    const node = await fleet.enroll();
    const host = { hostname: "node", cpuCount: 64, memoryMib: 65_536 };
    // Without a GPU: that others report it as well is noted with the node, which has to wait, too, and its heartbeats then.
    const { agent } = await ScriptedAgent.open(clientOf(node), { inventory: { host } });
    const say = async (sequence: bigint, acceptingWorkMessage: string) => {
      agent.send({ case: "heartbeat", value: { sequence, acceptingWork: true, acceptingWorkMessage } });
      await agent.next("ack", (ack) => ack.heartbeatSequence === sequence);
    };
    const stored = async (wanted: string) => {
      const [read] = await fleet.db.database.system((tx) => replica.nodes.nodes(tx, [node.nodeId]));
      return read?.acceptingWorkMessage === wanted;
    };
    await say(1n, "first");
    await eventually("the first heartbeat is taken in", () => stored("first"));
    return { say, stored };
  };
  const [slow, wavering, last] = await Promise.all([begin(), begin(), begin()]);
  await fleet.db.database.system(async (tx) => {
    // Whatever changes has to wait, as it does where thousands of agents have news at once.
    await tx.execute("lock table changes in exclusive mode");
    await slow.say(2n, "news");
    await Promise.all([wavering.say(2n, "news"), last.say(2n, "news")]);
    await wavering.say(3n, "first");
    assert.ok(await slow.stored("first"));
  });
  for (const each of [slow, last]) await eventually("the news is taken in", () => each.stored("news"));
  assert.ok(await wavering.stored("first"), "an older heartbeat was the last word");
});

test("of heartbeats that are recorded together each is acknowledged", async () => {
  const identities = await Promise.all(Array.from({ length: 25 }, () => fleet.enroll()));
  const sessions = await Promise.all(identities.map((identity) => ScriptedAgent.open(clientOf(identity))));
  const agents = sessions.map(({ agent }) => agent);
  // The first of all may be recorded alone; the second round gathers meanwhile.
  for (const sequence of [1n, 2n]) {
    for (const agent of agents) agent.heartbeat(sequence);
    for (const agent of agents) await agent.next("ack", (ack) => ack.heartbeatSequence === sequence);
  }
  for (const agent of agents) agent.break();
});

test("a heartbeat that an inventory overtakes does not take its GPUs' health back", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node));
  const gpu = { uuid: "GPU-SIM-1", model: "H100-SXM", memoryMib: 81_559, simulated: true };
  const host = { hostname: "node", cpuCount: 64, memoryMib: 65_536 };
  const stored = async () =>
    (await fleet.db.database.system((tx) => replica.nodes.nodes(tx, [node.nodeId])))[0] ?? assert.fail();
  const health = async () => (await stored()).inventory?.gpus[0]?.health;
  for (let round = 1n; round <= 5n; round += 1n) {
    agent.heartbeat(3n * round - 2n, GpuHealth.HEALTHY);
    await eventually("the heartbeat is taken in", async () => (await health()) === GpuHealth.HEALTHY);
    agent.heartbeat(3n * round - 1n, GpuHealth.HEALTHY);
    agent.send({ case: "inventory", value: { host, gpus: [{ ...gpu, health: GpuHealth.UNHEALTHY }] } });
    await agent.next("ack", (ack) => ack.heartbeatSequence === 3n * round - 1n);
    await eventually("the inventory is recorded", async () => (await health()) === GpuHealth.UNHEALTHY);
    const acceptingWorkMessage = `round ${round}`;
    agent.send({ case: "heartbeat", value: { sequence: 3n * round, acceptingWork: true, acceptingWorkMessage } });
    await eventually(
      "the last heartbeat is taken in",
      async () => (await stored()).acceptingWorkMessage === acceptingWorkMessage,
    );
    assert.equal(await health(), GpuHealth.UNHEALTHY);
  }
});

test("an agent that says nothing for the lease loses its session", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node, hasty));
  assert.equal((await agent.goodbye()).reason, ErrorReason.UNAVAILABLE);
});
