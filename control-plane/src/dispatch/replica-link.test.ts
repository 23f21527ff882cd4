// Output that is read at a replica which does not hold the node's session: over the real link, between two replicas of one
// process that share nothing but the database and the CA.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import http2 from "node:http2";
import { after, before, beforeEach, test } from "node:test";
import tls from "node:tls";
import { create, type Message, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { AttemptPhase, AttemptRefSchema, LogsRefusedReason } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { RelayLogsRequestSchema, ReplicaService } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { newId, type InstanceId } from "@clodei/proto/ids";
import { Registry } from "prom-client";
import { Authority } from "../nodes/authority.ts";
import { createLog } from "../platform/log.ts";
import { dispatchLimits } from "./limits.ts";
import { LogLinkBroken, type LogPiece } from "./log-relay.ts";
import { createDispatchMetrics } from "./metrics.ts";
import { ReplicaClient } from "./replica-client.ts";
import type { ReplicaAddress } from "./replica-connection.ts";
import { createNodeClient, eventually, ScriptedAgent } from "./scripted-agent.ts";
import { TestFleet, type NodeIdentity, type Replica } from "./test-fleet.ts";
import { assertReason, collect, type Piece, sendText } from "./test-log-reader.ts";

const minuteMs = 60_000;
const dayMs = 24 * 60 * minuteMs;
const limits = { maxLogStreamsPerNode: 4, logsOpenTimeoutMs: 60_000 };

let fleet: TestFleet;
/** Holds the node's session at first, and the other one. */
let near: Replica;
let far: Replica;
let node: NodeIdentity;
let agent: ScriptedAgent;
let secret: Uint8Array;
let instanceId: InstanceId;

before(async () => {
  fleet = await TestFleet.start();
  near = await fleet.startReplica({ leaseMs: 60_000, limits });
  far = await fleet.startReplica({ leaseMs: 60_000, limits });
});
after(() => fleet[Symbol.asyncDispose]());

beforeEach(async () => {
  if (node !== undefined) {
    await fleet.revoke(node.nodeId);
    agent.break();
  }
  await startAt(near);
});

/** A node with a running instance, whose agent is connected to this replica. */
async function startAt(replica: Replica): Promise<void> {
  node = await fleet.enroll();
  const opened = await ScriptedAgent.open(clientOf(replica));
  agent = opened.agent;
  secret = opened.welcome.sessionSecret;
  agent.heartbeat(1n);
  await agent.next("ack");
  instanceId = await fleet.createInstance(near);
  await agent.desired(1);
  agent.send({
    case: "statusReport",
    value: {
      sequence: 1n,
      statuses: [
        { sequence: 1n, instanceId, attempt: 1, phase: AttemptPhase.RUNNING, reason: InstanceReason.UNSPECIFIED },
      ],
    },
  });
  await agent.next("ack", (ack) => ack.sequence === 1n);
}

/** Opens the node's session at this replica, in place of the one that it has. */
async function moveTo(replica: Replica): Promise<void> {
  const { agent: moved, welcome } = await ScriptedAgent.open(clientOf(replica), {
    sessionSecret: secret,
    journalSequence: 1n,
    containers: [{ instanceId, attempt: 1 }],
  });
  agent = moved;
  secret = welcome.sessionSecret;
  // The secret before is good until this.
  agent.heartbeat(1n);
  await agent.next("ack");
}

function clientOf(replica: Replica) {
  return createNodeClient(replica.listener.port, node, fleet.authority.certificatePem);
}

async function metric(replica: Replica, line: string): Promise<number> {
  const found = (await replica.registry.metrics()).split("\n").find((text) => text.startsWith(`${line} `));
  return Number(found?.slice(line.length) ?? Number.NaN);
}

function endpointOf(replica: Replica): string {
  const { replicaEndpoint } = replica.listener;
  assert.ok(replicaEndpoint !== undefined);
  return replicaEndpoint;
}

test("what a reader asks for at the other replica reaches the agent, and its output the reader, to the end", async () => {
  const sinceTime = timestampFromMs(1_700_000_000_000);
  const reader = collect(fleet.streamLogs(far, { instanceId, follow: true, tailLines: 10, sinceTime }));
  const open = await agent.next("openLogs");
  assert.deepEqual(
    [open.attempt?.instanceId, open.attempt?.attempt, open.follow, open.tailLines, open.sinceTime?.seconds],
    [instanceId, 1, true, 10, 1_700_000_000n],
  );
  const upload = agent.upload(open);
  sendText(upload, 0, "out\n");
  sendText(upload, 0, "err\n", LogStream.STDERR);
  upload.send({ case: "gap", value: { attempt: 1, stream: LogStream.STDOUT, offset: 4n, lengthBytes: 6n } });
  await eventually("the pieces arrived while it goes on", () => reader.pieces.length === 3);
  assert.equal(await metric(far, 'clodei_replica_log_streams{side="asks"}'), 1);
  assert.equal(await metric(near, 'clodei_replica_log_streams{side="serves"}'), 1);
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(await upload.result, "ended");
  assert.deepEqual(
    reader.pieces.map(({ event }) => event?.case),
    ["chunk", "chunk", "gap", "end"],
  );
  const second = reader.pieces[1]?.event;
  assert.equal(second?.case === "chunk" ? second.value.stream : undefined, LogStream.STDERR);
  await eventually("no stream is left", async () => {
    return (await metric(near, 'clodei_replica_log_streams{side="serves"}')) === 0;
  });
  assert.equal(await metric(far, 'clodei_replica_log_streams{side="asks"}'), 0);
});

test("without follow the output ends, and goes on after the reader's positions", async () => {
  const positions = [{ stream: LogStream.STDOUT, offset: 4n }];
  const reader = collect(fleet.streamLogs(far, { instanceId, positions }));
  const open = await agent.next("openLogs");
  assert.deepEqual([open.follow, open.positions.map(({ offset }) => offset)], [false, [4n]]);
  const upload = agent.upload(open);
  sendText(upload, 0, "one\ntwo\n");
  upload.end(false);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "two\n");
  assert.equal(reader.pieces.at(-1)?.event?.case, "chunk", "the attempt goes on: no end");
});

test("what the agent refuses is the same at every replica", async () => {
  const refuse = async (reason: LogsRefusedReason): Promise<void> => {
    const { streamId } = await agent.next("openLogs");
    agent.send({ case: "logsRefused", value: { streamId, reason, message: "no" } });
  };
  const tooMany = collect(fleet.streamLogs(far, { instanceId }));
  await refuse(LogsRefusedReason.TOO_MANY);
  assertReason(await tooMany.done, ErrorReason.RATE_LIMITED);
  const nothingYet = collect(fleet.streamLogs(far, { instanceId }));
  await refuse(LogsRefusedReason.NOT_FOUND);
  assert.equal(await nothingYet.done, "ended");
});

test("streams of a node are counted where its session is, whichever replica is asked", async () => {
  const abort = new AbortController();
  const readers = [near, far].map((replica) =>
    collect(fleet.streamLogs(replica, { instanceId, follow: true }, { signal: abort.signal })),
  );
  await agent.next("openLogs");
  await agent.next("openLogs");
  for (const replica of [near, far]) {
    const error = assertReason(
      await collect(fleet.streamLogs(replica, { instanceId, follow: true })).done,
      ErrorReason.RATE_LIMITED,
    );
    assert.ok((error.retryAfterMs ?? 0) > 0);
  }
  abort.abort();
  await Promise.all(readers.map(({ done }) => done));
});

test("another organization's instance is not found at any replica, and no replica asks for it", async () => {
  const organizationId = newId("org");
  for (const replica of [near, far]) {
    const reader = collect(fleet.streamLogs(replica, { instanceId, follow: true }, { organizationId }));
    assertReason(await reader.done, ErrorReason.NOT_FOUND);
  }
  assert.equal(agent.count("openLogs"), 0);
});

test("a reader who leaves the other replica ends the agent's stream", async () => {
  const abort = new AbortController();
  const reader = collect(fleet.streamLogs(far, { instanceId, follow: true }, { signal: abort.signal }));
  const open = await agent.next("openLogs");
  const upload = agent.upload(open);
  sendText(upload, 0, "one\n");
  await eventually("the line arrived", () => reader.text() === "one\n");
  abort.abort();
  assert.equal((await agent.next("closeLogs")).streamId, open.streamId);
  assert.ok((await reader.done) instanceof Error);
  assert.equal(await upload.result, "ended", "the upload is answered, and not left open");
});

test("a reader who leaves before the agent opened its stream ends it, too", async () => {
  const abort = new AbortController();
  const reader = collect(fleet.streamLogs(far, { instanceId, follow: true }, { signal: abort.signal }));
  const { streamId } = await agent.next("openLogs");
  abort.abort();
  assert.equal((await agent.next("closeLogs")).streamId, streamId);
  assert.ok((await reader.done) instanceof Error);
});

test("while the reader at the other replica does not read, the agent is made to wait, and others are not", async () => {
  const read = async function* (): AsyncGenerator<Piece, void> {
    yield* fleet.streamLogs(far, { instanceId, follow: true });
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
    await new Promise((resolve) => setTimeout(resolve, 500));
    taken = upload.taken;
    return taken === before;
  });
  // The windows of two links instead of one, and a message or two of each.
  assert.ok(taken < 200, `${taken} of ${chunks} pieces were taken from the agent`);
  const other = collect(fleet.streamLogs(far, { instanceId }));
  const quick = agent.upload(await agent.next("openLogs"));
  sendText(quick, 0, chunk.repeat(8));
  quick.end(false);
  assert.equal(await other.done, "ended", "the connection is shared, and its window is not used up");
  assert.equal(other.text().length, 8 * chunk.length);
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

test("a follower goes with the session from replica to replica, and gets every byte once", async () => {
  const reader = collect(fleet.streamLogs(far, { instanceId, follow: true }));
  const first = agent.upload(await agent.next("openLogs"));
  sendText(first, 0, "one\ntwo\n");
  await eventually("the first lines arrived", () => reader.text() === "one\ntwo\n");
  // To the replica that is being read at.
  await moveTo(far);
  const open = await agent.next("openLogs");
  assert.deepEqual(
    open.positions.map(({ offset }) => offset),
    [8n],
  );
  const second = agent.upload(open);
  sendText(second, 4, "two\nthree\n");
  await eventually("the third line arrived", () => reader.text() === "one\ntwo\nthree\n");
  // And to a third one.
  const third = await fleet.startReplica({ leaseMs: 60_000, limits });
  await moveTo(third);
  const last = agent.upload(await agent.next("openLogs"));
  sendText(last, 8, "three\nfour\n");
  last.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "one\ntwo\nthree\nfour\n");
});

test("when the replica that holds the session drains, who follows waits and goes on, and others are told to retry", async () => {
  const draining = await fleet.startReplica({ leaseMs: 60_000, limits });
  await moveTo(draining);
  const follower = collect(fleet.streamLogs(far, { instanceId, follow: true }));
  const followed = agent.upload(await agent.next("openLogs"));
  sendText(followed, 0, "one\n");
  const reader = collect(fleet.streamLogs(far, { instanceId }));
  const read = agent.upload(await agent.next("openLogs"));
  sendText(read, 0, "one\n");
  await eventually("both have the line", () => follower.text() === "one\n" && reader.text() === "one\n");
  await draining.listener.close();
  const error = assertReason(await reader.done, ErrorReason.NODE_UNREACHABLE);
  assert.ok((error.retryAfterMs ?? 0) > 0);
  await moveTo(near);
  const open = await agent.next("openLogs");
  assert.deepEqual(
    open.positions.map(({ offset }) => offset),
    [4n],
  );
  const upload = agent.upload(open);
  sendText(upload, 4, "two\n");
  upload.end(true);
  assert.equal(await follower.done, "ended");
  assert.equal(follower.text(), "one\ntwo\n");
});

test("where the database names a replica that is gone, a follower waits, and who does not follow is told to retry", async () => {
  // As a killed process leaves it: the session's row stands, and nobody listens there.
  await fleet.rows(
    `update node_sessions set session_id = $2, replica_id = $2, replica_endpoint = '127.0.0.1:1' where node_id = $1`,
    [node.nodeId, randomUUID()],
  );
  agent.break();
  assertReason(await collect(fleet.streamLogs(far, { instanceId })).done, ErrorReason.NODE_UNREACHABLE);
  assert.ok((await metric(far, "clodei_replica_connections_failed_total")) >= 1);
  const follower = collect(fleet.streamLogs(far, { instanceId, follow: true }));
  await moveTo(near);
  const upload = agent.upload(await agent.next("openLogs"));
  sendText(upload, 0, "late\n");
  upload.end(true);
  assert.equal(await follower.done, "ended");
  assert.equal(follower.text(), "late\n");
});

test("who answers at an endpoint must be the replica that the database names, and not just any", async () => {
  const third = await fleet.startReplica({ leaseMs: 60_000, limits });
  const [row] = await fleet.rows<{ replica_endpoint: string }>(
    "select replica_endpoint from node_sessions where node_id = $1",
    [node.nodeId],
  );
  assert.equal(row?.replica_endpoint, endpointOf(near));
  // The address went to another replica, and to a node listener, whose certificate is of the same CA.
  for (const endpoint of [endpointOf(third), `127.0.0.1:${third.listener.port}`]) {
    const asks = await fleet.startReplica({ leaseMs: 60_000, limits });
    await fleet.rows("update node_sessions set replica_endpoint = $2 where node_id = $1", [node.nodeId, endpoint]);
    assertReason(await collect(fleet.streamLogs(asks, { instanceId })).done, ErrorReason.NODE_UNREACHABLE);
    assert.equal(await metric(asks, "clodei_replica_connections_failed_total"), 1);
  }
  assert.equal(agent.count("openLogs"), 0);
});

test("where the other replica listens for none, the log says what to set, and the customer that the node is away", async () => {
  const lines: string[] = [];
  const log = createLog("warn", { write: (line) => void lines.push(line) });
  const silent = await fleet.startReplica({ leaseMs: 60_000, limits, replicas: undefined });
  const asks = await fleet.startReplica({ leaseMs: 60_000, limits }, log);
  assert.equal(silent.listener.replicaEndpoint, undefined);
  await moveTo(silent);
  for (const follow of [false, true]) {
    const error = assertReason(
      await collect(fleet.streamLogs(asks, { instanceId, follow })).done,
      ErrorReason.NODE_UNREACHABLE,
    );
    assert.doesNotMatch(error.message, /CLODEI_/);
  }
  assert.equal(lines.filter((line) => line.includes("set CLODEI_REPLICA_HOST")).length, 1, lines.join(""));
  // It is asked by none, and asks others.
  await moveTo(near);
  const reader = collect(fleet.streamLogs(silent, { instanceId }));
  const upload = agent.upload(await agent.next("openLogs"));
  sendText(upload, 0, "one\n");
  upload.end(true);
  assert.equal(await reader.done, "ended");
  assert.equal(reader.text(), "one\n");
});

test("a connection serves all streams, goes when nobody needs it, and is another with the next certificate", async () => {
  const asks = await fleet.startReplica({ leaseMs: 60_000, limits: { ...limits, replicaIdleMs: 50 } });
  const connections = (): Promise<number> => metric(asks, "clodei_replica_connections");
  const reader = collect(fleet.streamLogs(asks, { instanceId, follow: true }));
  const upload = agent.upload(await agent.next("openLogs"));
  sendText(upload, 0, "one\n");
  const other = collect(fleet.streamLogs(asks, { instanceId }));
  agent.upload(await agent.next("openLogs")).end(true);
  assert.equal(await other.done, "ended");
  assert.equal(await connections(), 1);
  await asks.listener.renewCertificate();
  await near.listener.renewCertificate();
  const later = collect(fleet.streamLogs(asks, { instanceId }));
  agent.upload(await agent.next("openLogs")).end(true);
  assert.equal(await later.done, "ended");
  sendText(upload, 4, "two\n");
  upload.end(true);
  assert.equal(await reader.done, "ended", "it went on, on the connection that it was opened on");
  assert.equal(reader.text(), "one\ntwo\n");
  await eventually("no connection is left", async () => (await connections()) === 0);
});

// --- who may ask

type Identity = { readonly certificateChainPem: string; readonly privateKeyPem: string };

/** A client of the replica listener that looks at nothing. */
function rawClient(replica: Replica, identity: Identity | undefined): Client<typeof ReplicaService> {
  return createClient(
    ReplicaService,
    createGrpcTransport({
      baseUrl: `https://${endpointOf(replica)}`,
      nodeOptions: {
        ca: fleet.authority.certificatePem,
        checkServerIdentity: () => undefined,
        ...(identity === undefined ? {} : { cert: identity.certificateChainPem, key: identity.privateKeyPem }),
      },
    }),
  );
}

type RelayRequest = Exclude<MessageInitShape<typeof RelayLogsRequestSchema>, Message>;

/** Asks for the test's output; returns the error. */
async function refusalOf(
  client: Client<typeof ReplicaService>,
  request: RelayRequest = {},
): Promise<{ error: ConnectError; reason: string | undefined }> {
  try {
    const answers = client.relayLogs({
      nodeId: node.nodeId,
      organizationId: fleet.organizationId,
      attempt: { instanceId, attempt: 1 },
      ...request,
    });
    for await (const _piece of answers);
  } catch (error) {
    assert.ok(error instanceof ConnectError, String(error));
    return { error, reason: error.findDetails(ErrorInfoSchema)[0]?.reason };
  }
  return assert.fail("it was answered");
}

test("the replica listener takes a replica's certificate of its own CA, and nothing less", async () => {
  const { authority } = fleet;
  const now = new Date();
  const foreignPem = await Authority.generate(now);
  const foreign = await Authority.fromPem(foreignPem.certificatePem, foreignPem.privateKeyPem, "clodei.test", now);
  // The handshake refuses these.
  const unwelcome: Record<string, Identity | undefined> = {
    "no certificate": undefined,
    "a listener's certificate": await authority.issueListenerCertificate(["localhost"], now),
    "a replica's certificate of another CA": await foreign.issueReplicaCertificate(randomUUID(), now),
    "an expired certificate": await authority.issueReplicaCertificate(
      randomUUID(),
      new Date(now.getTime() - 2 * dayMs),
    ),
  };
  for (const [what, identity] of Object.entries(unwelcome)) {
    const { reason } = await refusalOf(rawClient(near, identity));
    assert.equal(reason, undefined, `${what} came past the handshake`);
  }
  const ofNode = { certificateChainPem: node.certificatePem, privateKeyPem: node.privateKeyPem };
  assert.equal((await refusalOf(rawClient(near, ofNode))).reason, "CERTIFICATE_INVALID");
  const ofReplica = await authority.issueReplicaCertificate(randomUUID(), now);
  // And no replica passes for a node.
  const agentLike = createNodeClient(
    near.listener.port,
    { certificatePem: ofReplica.certificateChainPem, privateKeyPem: ofReplica.privateKeyPem },
    authority.certificatePem,
  );
  const refused = await agentLike
    .renewCertificate({ certificateRequest: new Uint8Array([1]) })
    .catch((error: unknown) => error);
  assert.ok(refused instanceof ConnectError);
  assert.equal(refused.findDetails(ErrorInfoSchema)[0]?.reason, "CERTIFICATE_INVALID");
  assert.equal(agent.count("openLogs"), 0);
  // TLS 1.2 is none of ours.
  const [host = "", port = ""] = endpointOf(near).split(":");
  const old = tls.connect({
    host,
    port: Number(port),
    ca: authority.certificatePem,
    cert: ofReplica.certificateChainPem,
    key: ofReplica.privateKeyPem,
    checkServerIdentity: () => undefined,
    maxVersion: "TLSv1.2",
  });
  const error: unknown = await new Promise((resolve) => old.once("error", resolve));
  assert.ok(error instanceof Error);
});

test("a replica is given what is the organization's and on the node, whatever it asks for", async () => {
  const client = rawClient(near, await fleet.authority.issueReplicaCertificate(randomUUID(), new Date()));
  const other = newId("org");
  const theirs = await fleet.createInstance(near, {}, other);
  await agent.desired(2);
  const cases: Record<string, [RelayRequest, string]> = {
    "another organization's instance": [{ organizationId: other }, "PERMISSION_DENIED"],
    "an instance of another organization": [{ attempt: { instanceId: theirs, attempt: 1 } }, "PERMISSION_DENIED"],
    "an unknown instance": [{ attempt: { instanceId: newId("ins"), attempt: 1 } }, "PERMISSION_DENIED"],
    "an attempt that never was": [{ attempt: { instanceId, attempt: 2 } }, "PERMISSION_DENIED"],
    "another node": [{ nodeId: (await fleet.enroll()).nodeId }, "PERMISSION_DENIED"],
    "an id that is none": [{ nodeId: "nod_1" }, "PROTOCOL_VIOLATION"],
    "no attempt": [{ attempt: create(AttemptRefSchema) }, "PROTOCOL_VIOLATION"],
  };
  for (const [what, [request, expected]] of Object.entries(cases)) {
    assert.equal((await refusalOf(client, request)).reason, expected, what);
  }
  assert.equal(agent.count("openLogs"), 0, "the agent was not asked");
  const good = collectPieces(client);
  agent.upload(await agent.next("openLogs")).end(true);
  assert.deepEqual(await good, ["end"]);
});

test("a request that is refused behind its first message is not served as well", async () => {
  const identity = await fleet.authority.issueReplicaCertificate(randomUUID(), new Date());
  const client = http2.connect(`https://${endpointOf(near)}`, {
    ca: fleet.authority.certificatePem,
    cert: identity.certificateChainPem,
    key: identity.privateKeyPem,
    checkServerIdentity: () => undefined,
  });
  // Before that, Node.js sends what is written as one piece, which would be refused before it is looked at.
  await once(client, "remoteSettings");
  const attempt = { instanceId, attempt: 1 };
  const request = { nodeId: node.nodeId, organizationId: fleet.organizationId, attempt, follow: true };
  const message = toBinary(RelayLogsRequestSchema, create(RelayLogsRequestSchema, request));
  const stream = client.request({
    ":method": "POST",
    ":path": `/${ReplicaService.typeName}/${ReplicaService.method.relayLogs.name}`,
    "content-type": "application/grpc",
    te: "trailers",
  });
  stream.write(Buffer.concat([Buffer.from([0, 0, 0, 0, message.length]), message]));
  // More than any message may have.
  stream.end(Buffer.from([0, 0x7f, 0xff, 0xff, 0xff]));
  const [headers] = (await once(stream, "response")) as [http2.IncomingHttpHeaders];
  assert.equal(Number(headers["grpc-status"]), Code.ResourceExhausted);
  client.close();
  // What is served afterwards shows that this was not.
  const good = collectPieces(rawClient(near, identity));
  agent.upload(await agent.next("openLogs")).end(true);
  assert.deepEqual(await good, ["end"]);
  assert.equal(agent.count("openLogs"), 1);
  await eventually("no stream is left", async () => {
    return (await metric(near, 'clodei_replica_log_streams{side="serves"}')) === 0;
  });
});

// --- certificates that end

/** The side that asks, alone: with a certificate and a clock of the test's. */
function startClient(tlsMaterial: Identity, clock = fleet.clock): ReplicaClient {
  const { authority, db } = fleet;
  const metrics = createDispatchMetrics(new Registry());
  return new ReplicaClient({
    authority,
    tls: tlsMaterial,
    limits: { ...dispatchLimits, replicaRetryMs: 0 },
    metrics,
    clock,
    log: db.log,
  });
}

async function holderAddress(): Promise<ReplicaAddress> {
  const [row] = await fleet.rows<{ replica_id: string; replica_endpoint: string }>(
    "select replica_id, replica_endpoint from node_sessions where node_id = $1",
    [node.nodeId],
  );
  assert.ok(row !== undefined);
  return { replicaId: row.replica_id, endpoint: row.replica_endpoint };
}

/** Reads as the replica would whose client this is. */
async function read(client: ReplicaClient): Promise<AsyncGenerator<LogPiece, void>> {
  const query = { attempt: { instanceId, attempt: 1 }, follow: true };
  return client.readLogs(await holderAddress(), node.nodeId, fleet.organizationId, query, new AbortController().signal);
}

async function pieceOf(next: Promise<IteratorResult<LogPiece, void>>): Promise<LogPiece | undefined> {
  const result = await next;
  return result.done === true ? undefined : result.value;
}

async function textOf(next: Promise<IteratorResult<LogPiece, void>>): Promise<string | undefined> {
  const piece = await pieceOf(next);
  return piece?.case === "chunk" ? Buffer.from(piece.value.data).toString() : undefined;
}

test("who is asked judges the certificate again for every piece, and takes the next one", async () => {
  // Issued so that it ends in four minutes; the next one is good from five minutes before it is made.
  const aged = await fleet.authority.issueReplicaCertificate(randomUUID(), new Date(Date.now() - dayMs + 4 * minuteMs));
  using client = startClient(aged);
  const first = await read(client);
  const one = textOf(first.next());
  const upload = agent.upload(await agent.next("openLogs"));
  sendText(upload, 0, "one\n");
  assert.equal(await one, "one\n");
  fleet.clockOffsetMs = 4.5 * minuteMs;
  try {
    sendText(upload, 4, "two\n");
    await assert.rejects(first.next(), LogLinkBroken);
    await agent.next("closeLogs");
    // A new stream on the connection that stands.
    await assert.rejects((await read(client)).next(), LogLinkBroken);
    assert.equal(agent.count("openLogs"), 1);
    client.renew(await fleet.authority.issueReplicaCertificate(randomUUID(), fleet.clock()));
    const again = textOf((await read(client)).next());
    sendText(agent.upload(await agent.next("openLogs")), 4, "two\n");
    assert.equal(await again, "two\n");
  } finally {
    fleet.clockOffsetMs = 0;
  }
});

test("who asks takes no answer behind a certificate that has ended, on a connection that stands neither", async () => {
  let offsetMs = 0;
  const identity = await fleet.authority.issueReplicaCertificate(randomUUID(), new Date());
  using client = startClient(identity, () => new Date(Date.now() + offsetMs));
  const good = async (): Promise<void> => {
    const stream = await read(client);
    const first = stream.next();
    agent.upload(await agent.next("openLogs")).end(true);
    assert.equal((await pieceOf(first))?.case, "end");
    await stream.next();
  };
  await good();
  offsetMs = 2 * dayMs;
  await assert.rejects((await read(client)).next(), { name: "LogLinkBroken", message: /has expired/ });
  assert.equal(agent.count("openLogs"), 1);
  offsetMs = 0;
  await good();
});

async function collectPieces(client: Client<typeof ReplicaService>): Promise<(string | undefined)[]> {
  const cases: (string | undefined)[] = [];
  const request = {
    nodeId: node.nodeId,
    organizationId: fleet.organizationId,
    attempt: { instanceId, attempt: 1 },
  };
  for await (const { message } of client.relayLogs(request)) cases.push(message.case);
  return cases;
}
