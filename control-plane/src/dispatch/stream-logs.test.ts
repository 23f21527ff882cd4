import assert from "node:assert/strict";
import { after, before, beforeEach, test } from "node:test";
import { ConnectError } from "@connectrpc/connect";
import { AttemptPhase, LogsRefusedReason, type OpenLogs } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId, type InstanceId, type OrganizationId } from "@clodei/proto/ids";
import { DomainError } from "../platform/errors.ts";
import { createNodeClient, eventually, ScriptedAgent } from "./scripted-agent.ts";
import { TestFleet, type NodeIdentity, type Replica } from "./test-fleet.ts";
import { assertReason, collect, type Piece, sendText } from "./test-log-reader.ts";

let fleet: TestFleet;
let replica: Replica;
let node: NodeIdentity;
let agent: ScriptedAgent;
let secret: Uint8Array;
let instanceId: InstanceId;

before(async () => {
  fleet = await TestFleet.start();
  replica = await fleet.startReplica({
    leaseMs: 30_000,
    limits: { maxLogStreamsPerCaller: 3, maxLogStreamsPerNode: 4, logsOpenTimeoutMs: 60_000 },
  });
});
after(() => fleet[Symbol.asyncDispose]());

beforeEach(async () => {
  if (node !== undefined) {
    await fleet.revoke(node.nodeId);
    agent.break();
  }
  node = await fleet.enroll();
  const opened = await ScriptedAgent.open(clientOf());
  agent = opened.agent;
  secret = opened.welcome.sessionSecret;
  agent.heartbeat(1n);
  await agent.next("ack");
  instanceId = await fleet.createInstance(replica);
  await agent.desired(1);
  report(1n, AttemptPhase.RUNNING);
  await agent.next("ack");
});

function clientOf(at: Replica = replica) {
  return createNodeClient(at.listener.port, node, fleet.authority.certificatePem);
}

function report(sequence: bigint, phase: AttemptPhase): void {
  const reason = phase === AttemptPhase.ENDED ? InstanceReason.COMPLETED : InstanceReason.UNSPECIFIED;
  agent.send({
    case: "statusReport",
    value: { sequence, statuses: [{ sequence, instanceId, attempt: 1, phase, reason }] },
  });
}

function lastCase(pieces: readonly Piece[]): string | undefined {
  return pieces.at(-1)?.event?.case;
}

test("what the agent uploads reaches the reader, stdout and stderr apart, and ends with the attempt", async () => {
  const reader = collect(fleet.streamLogs(replica, { instanceId, follow: true, tailLines: 10 }));
  const open = await agent.next("openLogs");
  assert.deepEqual(
    [open.attempt?.instanceId, open.attempt?.attempt, open.follow, open.tailLines],
    [instanceId, 1, true, 10],
  );
  const upload = agent.upload(open);
  sendText(upload, 0, "out\n");
  sendText(upload, 0, "err\n", LogStream.STDERR);
  upload.send({ case: "gap", value: { attempt: 1, stream: LogStream.STDOUT, offset: 4n, lengthBytes: 6n } });
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(await upload.result, "ended");
  assert.deepEqual(
    reader.pieces.map(({ event }) => event?.case),
    ["chunk", "chunk", "gap", "end"],
  );
  const second = reader.pieces[1]?.event;
  assert.equal(second?.case === "chunk" ? second.value.stream : undefined, LogStream.STDERR);
});

test("another organization's instance, an unknown one and an attempt that is not yet are all not found", async () => {
  const stranger = newId("org");
  assertReason(
    await collect(fleet.streamLogs(replica, { instanceId, follow: true }, { organizationId: stranger })).done,
    ErrorReason.NOT_FOUND,
  );
  assertReason(await collect(fleet.streamLogs(replica, { instanceId: newId("ins") })).done, ErrorReason.NOT_FOUND);
  assertReason(
    await collect(fleet.streamLogs(replica, { instanceId, attempt: 2, follow: true })).done,
    ErrorReason.NOT_FOUND,
  );
  assert.equal(agent.count("openLogs"), 0, "the node was not asked");
});

test("after a broken link a follower gets the rest, without loss and without doubling", async () => {
  const reader = collect(fleet.streamLogs(replica, { instanceId, follow: true }));
  const first = agent.upload(await agent.next("openLogs"));
  sendText(first, 0, "one\ntwo\n");
  await eventually("the first lines arrived", () => reader.text() === "one\ntwo\n");
  // The upload alone breaks; the session stands.
  first.break();
  const open = await agent.next("openLogs");
  assert.deepEqual(
    open.positions.map(({ stream, offset }) => [stream, offset]),
    [[LogStream.STDOUT, 8n]],
  );
  const second = agent.upload(open);
  sendText(second, 4, "two\nthree\n");
  await eventually("the third line arrived", () => reader.text() === "one\ntwo\nthree\n");
  // Now the whole session breaks, and comes back.
  second.break();
  agent.break();
  agent = (
    await ScriptedAgent.open(clientOf(), {
      sessionSecret: secret,
      journalSequence: 1n,
      containers: [{ instanceId, attempt: 1 }],
    })
  ).agent;
  const third = agent.upload(await agent.next("openLogs"));
  sendText(third, 14, "four\n");
  third.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "one\ntwo\nthree\nfour\n");
  assert.equal(lastCase(reader.pieces), "end");
});

test("a reader's own positions are handed on, and what lies before them is not sent again", async () => {
  const positions = [{ stream: LogStream.STDOUT, offset: 4n }];
  const reader = collect(fleet.streamLogs(replica, { instanceId, positions }));
  const open = await agent.next("openLogs");
  assert.deepEqual(
    open.positions.map(({ offset }) => offset),
    [4n],
  );
  const upload = agent.upload(open);
  sendText(upload, 0, "one\ntwo\n");
  upload.end(false);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "two\n");
  assert.equal(lastCase(reader.pieces), "chunk", "the attempt goes on: no end");
});

test("a node that is away: whoever does not follow is told to come back, whoever follows waits", async () => {
  agent.break();
  await eventually("the session is over", () => replica.listener.sessionCount() === 0);
  const error = assertReason(
    await collect(fleet.streamLogs(replica, { instanceId })).done,
    ErrorReason.NODE_UNREACHABLE,
  );
  assert.ok((error.retryAfterMs ?? 0) > 0);
  const reader = collect(fleet.streamLogs(replica, { instanceId, follow: true }));
  agent = (
    await ScriptedAgent.open(clientOf(), {
      sessionSecret: secret,
      journalSequence: 1n,
      containers: [{ instanceId, attempt: 1 }],
    })
  ).agent;
  const upload = agent.upload(await agent.next("openLogs"));
  sendText(upload, 0, "late\n");
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "late\n");
});

test("an agent that does not open a stream in time is asked again for a follower", async () => {
  const hasty = await fleet.startReplica({ leaseMs: 30_000, limits: { logsOpenTimeoutMs: 1_500 } });
  const hello = { sessionSecret: secret, journalSequence: 1n, containers: [{ instanceId, attempt: 1 }] };
  ({ agent } = await ScriptedAgent.open(clientOf(hasty), hello));
  const reader = collect(fleet.streamLogs(hasty, { instanceId, follow: true }));
  const ignored = await agent.next("openLogs");
  const open = await agent.next("openLogs");
  assert.notEqual(open.streamId, ignored.streamId);
  const upload = agent.upload(open);
  sendText(upload, 0, "after all\n");
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "after all\n");
});

test("a reader who goes away ends the agent's stream", async () => {
  const abort = new AbortController();
  const reader = collect(fleet.streamLogs(replica, { instanceId, follow: true }, { signal: abort.signal }));
  const open = await agent.next("openLogs");
  const upload = agent.upload(open);
  sendText(upload, 0, "one\n");
  await eventually("the line arrived", () => reader.text() === "one\n");
  abort.abort();
  assert.equal((await agent.next("closeLogs")).streamId, open.streamId);
  assert.ok((await reader.done) instanceof Error);
  assert.equal(await upload.result, "ended", "the upload is answered, and not left open");
});

test("while the reader does not read, the agent is made to wait", async () => {
  const read = async function* (): AsyncGenerator<Piece, void> {
    yield* fleet.streamLogs(replica, { instanceId, follow: true });
  };
  const stream = read();
  const first = stream.next();
  const upload = agent.upload(await agent.next("openLogs"));
  const chunk = "x".repeat(16 * 1024);
  const chunks = 2_000;
  for (let index = 0; index < chunks; index += 1) sendText(upload, index * chunk.length, chunk);
  assert.equal((await first).done, false);
  let taken = -1;
  await eventually("the transport takes no more", async () => {
    const before = upload.taken;
    await new Promise((resolve) => setTimeout(resolve, 200));
    taken = upload.taken;
    return taken === before;
  });
  assert.ok(taken < 200, `${taken} of ${chunks} pieces were taken from the agent`);
  let bytes = chunk.length;
  while (bytes < chunks * chunk.length) {
    const next = await stream.next();
    assert.ok(next.done !== true);
    const { event } = next.value;
    bytes += event?.case === "chunk" ? (event.value.data?.length ?? 0) : 0;
  }
  upload.end(true);
  await stream.next();
});

test("what the agent refuses is told, and told apart", async () => {
  const refuse = (open: OpenLogs, reason: LogsRefusedReason): void =>
    agent.send({ case: "logsRefused", value: { streamId: open.streamId, reason, message: "no" } });
  const tooMany = collect(fleet.streamLogs(replica, { instanceId }));
  refuse(await agent.next("openLogs"), LogsRefusedReason.TOO_MANY);
  assertReason(await tooMany.done, ErrorReason.RATE_LIMITED);
  // It runs and has written nothing yet.
  const nothingYet = collect(fleet.streamLogs(replica, { instanceId }));
  refuse(await agent.next("openLogs"), LogsRefusedReason.NOT_FOUND);
  assert.equal(await nothingYet.done, "ended");
  report(2n, AttemptPhase.ENDED);
  await agent.next("ack");
  const gone = collect(fleet.streamLogs(replica, { instanceId }));
  refuse(await agent.next("openLogs"), LogsRefusedReason.NOT_FOUND);
  assertReason(await gone.done, ErrorReason.NOT_FOUND);
});

test("streams of one caller and of one node are limited", async () => {
  const abort = new AbortController();
  const options = { signal: abort.signal };
  const readers = [1, 2].map(() => collect(fleet.streamLogs(replica, { instanceId, follow: true }, options)));
  await agent.next("openLogs");
  await agent.next("openLogs");
  assertReason(await collect(fleet.streamLogs(replica, { instanceId, follow: true })).done, ErrorReason.RATE_LIMITED);
  const third = collect(
    fleet.streamLogs(replica, { instanceId: await fleet.createInstance(replica, hugeSpec), follow: true }, options),
  );
  await eventually("the third waits for its instance", async () => {
    return /^clodei_log_streams 3$/m.test(await replica.registry.metrics());
  });
  assertReason(await collect(fleet.streamLogs(replica, { instanceId })).done, ErrorReason.RATE_LIMITED);
  abort.abort();
  await Promise.all([...readers, third].map(({ done }) => done));
  const again = collect(fleet.streamLogs(replica, { instanceId }));
  agent.upload(await agent.next("openLogs")).end(true);
  assert.equal(await again.done, "ended", "what was released can be taken again");
});

test("an organization leaves streams of a node to others, however many keys it has", async () => {
  const abort = new AbortController();
  const follow = (organizationId: OrganizationId, id: InstanceId) =>
    collect(
      fleet.streamLogs(
        replica,
        { instanceId: id, follow: true },
        { organizationId, callerId: newId("key"), signal: abort.signal },
      ),
    );
  const readers = [1, 2].map(() => follow(fleet.organizationId, instanceId));
  await agent.next("openLogs");
  await agent.next("openLogs");
  assertReason(await follow(fleet.organizationId, instanceId).done, ErrorReason.RATE_LIMITED);
  const other = newId("org");
  const theirs = await fleet.createInstance(replica, {}, other);
  await agent.desired(2);
  readers.push(follow(other, theirs));
  assert.equal((await agent.next("openLogs")).attempt?.instanceId, theirs);
  abort.abort();
  await Promise.all(readers.map(({ done }) => done));
});

/** More than the test's node has: it waits in PENDING. */
const hugeSpec = { cpuMillis: 200_000 };

test("a follower of an instance that waits for capacity waits with it; others see nothing", async () => {
  const pending = await fleet.createInstance(replica, { cpuMillis: 64_000 });
  assert.equal(await collect(fleet.streamLogs(replica, { instanceId: pending })).done, "ended");
  const reader = collect(fleet.streamLogs(replica, { instanceId: pending, follow: true }));
  await new Promise((resolve) => setTimeout(resolve, 100));
  assert.equal(agent.count("openLogs"), 0);
  // Room comes: the first instance ends.
  report(2n, AttemptPhase.ENDED);
  const upload = agent.upload(await agent.next("openLogs", (open) => open.attempt?.instanceId === pending));
  sendText(upload, 0, "begun\n");
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "begun\n");
});

test("the output of a deleted instance is gone", async () => {
  await fleet.db.database.tenant(fleet.organizationId, (tx) =>
    replica.instances.command(tx, "delete", instanceId, newId("key")),
  );
  agent.send({
    case: "statusReport",
    value: {
      sequence: 3n,
      statuses: [
        { sequence: 2n, instanceId, attempt: 1, phase: AttemptPhase.ENDED },
        { sequence: 3n, instanceId, attempt: 1, phase: AttemptPhase.REMOVED },
      ],
    },
  });
  await agent.next("ack", (ack) => ack.sequence === 3n);
  assertReason(await collect(fleet.streamLogs(replica, { instanceId })).done, ErrorReason.LOGS_GONE);
});

test("a node cannot upload to a stream that it was not asked for", async () => {
  const stranger = await fleet.enroll();
  const client = createNodeClient(replica.listener.port, stranger, fleet.authority.certificatePem);
  const { agent: other } = await ScriptedAgent.open(client);
  const reader = collect(fleet.streamLogs(replica, { instanceId, follow: true }));
  const open = await agent.next("openLogs");
  const forged = other.upload(open);
  sendText(forged, 0, "forged\n");
  const error = await forged.result;
  assert.ok(error instanceof ConnectError, String(error));
  assert.match(error.message, /nobody waits for this stream/);
  other.send({ case: "logsRefused", value: { streamId: open.streamId, reason: LogsRefusedReason.NOT_FOUND } });
  const upload = agent.upload(open);
  sendText(upload, 0, "true\n");
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "true\n");
  await fleet.revoke(stranger.nodeId);
});

test("the output of a node that was lost is gone, and not an empty one", async () => {
  await fleet.revoke(node.nodeId);
  let last: unknown;
  await eventually("the instance is lost", async () => {
    last = await collect(fleet.streamLogs(replica, { instanceId })).done;
    return last instanceof DomainError && last.reason === ErrorReason.LOGS_GONE;
  });
  assert.match(String(last), /node is lost/);
});
