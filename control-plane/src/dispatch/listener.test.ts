import assert from "node:assert/strict";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import { once } from "node:events";
import http2 from "node:http2";
import { after, before, test } from "node:test";
import tls from "node:tls";
import "reflect-metadata"; // before @peculiar/x509, which needs it at import
import * as x509 from "@peculiar/x509";
import { create, toBinary } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { SessionRequestSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { Authority } from "../nodes/authority.ts";
import { createNodeClient, eventually, ScriptedAgent } from "./scripted-agent.ts";
import { createCertificateRequest, TestFleet, type NodeIdentity, type Replica } from "./test-fleet.ts";

let fleet: TestFleet;
let replica: Replica;

before(async () => {
  fleet = await TestFleet.start();
  replica = await fleet.startReplica();
});
after(() => fleet[Symbol.asyncDispose]());

function clientOf(identity: Pick<NodeIdentity, "certificatePem" | "privateKeyPem">, at: Replica = replica) {
  return createNodeClient(at.listener.port, identity, fleet.authority.certificatePem);
}

/** What comes of a handshake and one byte: the group that was agreed on, or the error. */
function handshake(options: tls.ConnectionOptions): Promise<{ group: string; protocol: string | null } | Error> {
  return new Promise((resolve) => {
    const socket = tls.connect({
      host: "localhost",
      port: replica.listener.port,
      ca: fleet.authority.certificatePem,
      ALPNProtocols: ["h2"],
      ...options,
    });
    // With TLS 1.3 a client believes in its certificate until the server answers: wait for the server's first frame.
    socket.once("data", () => {
      const key = socket.getEphemeralKeyInfo();
      resolve({ group: key !== null && "name" in key ? String(key.name) : "", protocol: socket.getProtocol() });
      socket.destroy();
    });
    socket.once("error", resolve);
    socket.once("close", () => resolve(new Error("closed without a word")));
  });
}

function credentialsOf(identity: Pick<NodeIdentity, "certificatePem" | "privateKeyPem">) {
  return { cert: identity.certificatePem, key: identity.privateKeyPem };
}

test("the handshake takes TLS 1.3 with X25519 and a node's certificate, and nothing less", async () => {
  const node = await fleet.enroll();
  const good = await handshake(credentialsOf(node));
  assert.deepEqual(good, { group: "X25519", protocol: "TLSv1.3" });
  const refused: Record<string, tls.ConnectionOptions> = {
    "TLS 1.2": { ...credentialsOf(node), maxVersion: "TLSv1.2" },
    "another group": { ...credentialsOf(node), ecdhCurve: "P-384" },
    "no certificate": {},
    "a certificate of another CA": credentialsOf(await foreignIdentity(node.nodeId)),
  };
  for (const [what, options] of Object.entries(refused)) {
    const outcome = await handshake(options);
    assert.ok(outcome instanceof Error, `${what} was accepted: ${JSON.stringify(outcome)}`);
  }
});

test("an address has as many connections as it may, and the next one when one of them has ended", async () => {
  const small = await fleet.startReplica({ maxConnectionsPerAddress: 1 });
  const node = await fleet.enroll();
  const { port } = small.listener;
  const ca = fleet.authority.certificatePem;
  const standing = tls.connect({ host: "localhost", port, ca, ALPNProtocols: ["h2"], ...credentialsOf(node) });
  await once(standing, "data");
  assert.ok((await handshake({ ...credentialsOf(node), port })) instanceof Error);
  assert.match(await small.registry.metrics(), /^clodei_node_connections_refused_total 1$/m);
  standing.destroy();
  await eventually("the connection's place is free", async () => {
    const outcome = await handshake({ ...credentialsOf(node), port });
    return !(outcome instanceof Error);
  });
});

test("a request that is canceled before it is looked at ends nothing but itself", async () => {
  const node = await fleet.enroll();
  const session = "/clodei.node.v1.NodeLinkService/Session";
  const requests = {
    "another protocol": { ":path": session, "content-type": "text/plain" },
    "no content type": { ":path": session },
    "an unknown path": { ":path": "/no.Such/Method", "content-type": "application/grpc" },
    "a known path": { ":path": session, "content-type": "application/grpc" },
  };
  // Node.js tells of a request later than it reads it. A reset that it reads meanwhile (which takes a busy connection and
  // luck) leaves the stream as this does.
  const canceled: string[] = [];
  const cancel = (message: unknown): void => {
    const { stream, headers } = message as { stream: http2.ServerHttp2Stream; headers: http2.IncomingHttpHeaders };
    if (headers["x-canceled"] === undefined) return;
    stream.close(http2.constants.NGHTTP2_CANCEL);
    stream.destroy();
    canceled.push(String(headers["x-canceled"]));
  };
  subscribe("http2.server.stream.created", cancel);
  try {
    for (const [what, headers] of Object.entries(requests)) {
      const url = `https://localhost:${replica.listener.port}`;
      const client = http2.connect(url, { ca: fleet.authority.certificatePem, ...credentialsOf(node) });
      const stream = client.request({ ":method": "POST", "x-canceled": what, ...headers }).on("error", () => undefined);
      await once(stream.resume(), "close");
      assert.equal(stream.rstCode, http2.constants.NGHTTP2_CANCEL, what);
      client.close();
    }
  } finally {
    unsubscribe("http2.server.stream.created", cancel);
  }
  assert.deepEqual(canceled, Object.keys(requests));
  // What throws at the listener would end the process, and fails this test.
  const { agent } = await ScriptedAgent.open(clientOf(node));
  agent.break();
});

test("a listener's certificate of our own CA is none of a node", async () => {
  const listener = await fleet.authority.issueListenerCertificate(["localhost"], new Date());
  const client = clientOf({ certificatePem: listener.certificateChainPem, privateKeyPem: listener.privateKeyPem });
  const error = await client
    .renewCertificate({ certificateRequest: new Uint8Array([1]) })
    .catch((reason: unknown) => reason);
  assert.ok(error instanceof Error, "answered");
});

test("the listener's certificate is renewed while it serves", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node));
  const serialOf = (): Promise<string> =>
    new Promise((resolve, reject) => {
      const options = { host: "localhost", port: replica.listener.port, ca: fleet.authority.certificatePem };
      const socket = tls.connect({ ...options, ...credentialsOf(node) }, () => {
        resolve(socket.getPeerCertificate().serialNumber);
        socket.destroy();
      });
      socket.once("error", reject);
    });
  const before = await serialOf();
  await replica.listener.renewCertificate();
  assert.notEqual(await serialOf(), before);
  agent.heartbeat(1n);
  await agent.next("ack");
  // The bounds of the protocol must not be lost with the old certificate.
  assert.ok((await handshake({ ...credentialsOf(node), maxVersion: "TLSv1.2" })) instanceof Error);
  assert.ok((await handshake({})) instanceof Error);
  agent.break();
});

test("a node renews its certificate; the old one is good until the new one is used, and then no more", async () => {
  const node = await fleet.enroll();
  const first = await ScriptedAgent.open(clientOf(node));
  const { request, privateKeyPem } = await createCertificateRequest();
  const renewed = await first.agent.client.renewCertificate({ certificateRequest: request });
  assert.equal(renewed.trustBundle.length, 1);
  first.agent.heartbeat(1n);
  await first.agent.next("ack");
  const next = {
    certificatePem: new x509.X509Certificate(new Uint8Array(renewed.certificate)).toString("pem"),
    privateKeyPem,
  };
  const second = await ScriptedAgent.open(clientOf(next), { sessionSecret: first.welcome.sessionSecret });
  assert.equal(
    (await first.agent.goodbye()).reason,
    ErrorReason.SESSION_REPLACED,
    "not: your certificate is superseded",
  );
  await new Promise((resolve) => setTimeout(resolve, 1_000));
  const old = new ScriptedAgent(clientOf(node));
  old.hello({ sessionSecret: second.welcome.sessionSecret });
  assert.equal((await old.goodbye()).reason, ErrorReason.CERTIFICATE_INVALID);
  const error = await clientOf(node)
    .renewCertificate({ certificateRequest: request })
    .catch((reason: unknown) => reason);
  assert.ok(error instanceof ConnectError, String(error));
  assert.equal(error.code, Code.Unauthenticated);
  assert.equal(error.findDetails(ErrorInfoSchema)[0]?.reason, "CERTIFICATE_INVALID");
  second.agent.break();
});

test("a certificate request that is none is refused by name", async () => {
  const node = await fleet.enroll();
  const error = await clientOf(node)
    .renewCertificate({ certificateRequest: new Uint8Array([1, 2, 3]) })
    .catch((reason: unknown) => reason);
  assert.ok(error instanceof ConnectError, String(error));
  assert.equal(error.findDetails(ErrorInfoSchema)[0]?.reason, "INVALID_ARGUMENT");
  const empty = await clientOf(node)
    .renewCertificate({})
    .catch((reason: unknown) => reason);
  assert.ok(empty instanceof ConnectError);
  assert.equal(empty.findDetails(ErrorInfoSchema)[0]?.reason, "PROTOCOL_VIOLATION");
});

test("an agent that does not read is dropped, and the others are not", async () => {
  const strict = await fleet.startReplica({ limits: { maxQueuedBytes: 2 * 1024 } });
  const node = await fleet.enroll();
  const neighbor = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(neighbor, strict));
  const deaf = await openDeafSession(strict, node);
  await eventually("the session stands", () => strict.listener.sessionCount() === 2);
  // Each is answered by an Ack, which nobody takes.
  for (let index = 0; index < 1_000; index += 1) {
    deaf.send({ case: "statusReport", value: { sequence: 9n, statuses: [gapStatus] } });
  }
  await eventually("the deaf agent was dropped", () => deaf.isClosed());
  agent.heartbeat(1n);
  await agent.next("ack");
  assert.match(await strict.registry.metrics(), /clodei_node_agents_dropped_total\{why="too_many_bytes"\} 1/);
  agent.break();
});

test("a drain tells every agent to come back later, ends its stream, and lets none of them in again", async () => {
  const draining = await fleet.startReplica({ drainMs: 600_000 });
  const node = await fleet.enroll();
  const { agent, welcome } = await ScriptedAgent.open(clientOf(node, draining));
  const instanceLess = fleet.streamLogs(draining, {
    instanceId: await fleet.createInstance(draining, { cpuMillis: 256_000 }),
    follow: true,
  });
  const reading = instanceLess[Symbol.asyncIterator]()
    .next()
    .catch((error: unknown) => error);
  await new Promise((resolve) => setTimeout(resolve, 100));
  const closed = draining.listener.close();
  const goodbye = await agent.goodbye();
  assert.equal(goodbye.reason, ErrorReason.UNAVAILABLE);
  assert.notEqual(goodbye.reconnectWithin, undefined);
  assert.match(String(await reading), /draining/);
  // Long before its deadline.
  await closed;
  const [row] = await fleet.rows<{ ended: boolean }>(
    "select end_time is not null as ended from node_sessions where node_id = $1",
    [node.nodeId],
  );
  assert.equal(row?.ended, true);
  const elsewhere = await ScriptedAgent.open(clientOf(node), { sessionSecret: welcome.sessionSecret });
  elsewhere.agent.break();
  const late = new ScriptedAgent(clientOf(node, draining));
  late.hello();
  await late.ended();
  assert.equal(late.count("welcome"), 0);
});

test("while a desired set is on its way, newer ones are overtaken by the newest", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node));
  await agent.desired();
  await Promise.all(
    Array.from({ length: 50 }, () =>
      fleet.db.database.system((tx) => replica.nodes.bumpDesiredGeneration(tx, node.nodeId)),
    ),
  );
  await agent.next("desiredSet", (set) => set.generation === 50n);
  assert.ok(agent.count("desiredSet") < 50, `${agent.count("desiredSet")} sets for 50 changes`);
  agent.break();
});

test("a hint that is lost costs a poll, and not the change", async () => {
  const node = await fleet.enroll();
  const { agent } = await ScriptedAgent.open(clientOf(node));
  await agent.desired();
  // Straight into the database: nobody is told.
  await fleet.rows("select bump_desired_generation($1)", [node.nodeId]);
  await agent.next("desiredSet", (set) => set.generation === 1n);
  agent.break();
});

async function foreignIdentity(
  nodeId: NodeIdentity["nodeId"],
): Promise<Pick<NodeIdentity, "certificatePem" | "privateKeyPem">> {
  const now = new Date();
  const { certificatePem, privateKeyPem } = await Authority.generate(now);
  const foreign = await Authority.fromPem(certificatePem, privateKeyPem, "clodei.test", now);
  const key = await createCertificateRequest();
  const publicKey = new Uint8Array(new x509.Pkcs10CertificateRequest(new Uint8Array(key.request)).publicKey.rawData);
  const issued = await foreign.issueNodeCertificate({
    nodeId,
    location: { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 },
    publicKey,
    lifetimeMs: 60_000,
    now,
  });
  return { certificatePem: new x509.X509Certificate(issued.der).toString("pem"), privateKeyPem: key.privateKeyPem };
}

const gapStatus = { sequence: 9n, instanceId: `ins_${"0".repeat(26)}`, attempt: 1, phase: 3 } as const;

/** A session on bare HTTP/2 that sends, and takes nothing: its receive window stays as small as the protocol allows. */
async function openDeafSession(at: Replica, node: NodeIdentity) {
  const session = http2.connect(`https://localhost:${at.listener.port}`, {
    ca: fleet.authority.certificatePem,
    ...credentialsOf(node),
    settings: { initialWindowSize: 1_024 },
  });
  session.on("error", () => undefined);
  const stream = session.request({
    ":method": "POST",
    ":path": "/clodei.node.v1.NodeLinkService/Session",
    "content-type": "application/grpc",
    te: "trailers",
  });
  stream.on("error", () => undefined);
  let closed = false;
  session.on("close", () => (closed = true));
  const send = (message: NonNullable<Parameters<typeof create<typeof SessionRequestSchema>>[1]>["message"]): void => {
    if (closed || stream.destroyed) return;
    const bytes = toBinary(
      SessionRequestSchema,
      create(SessionRequestSchema, message === undefined ? {} : { message }),
    );
    const frame = Buffer.alloc(5 + bytes.length);
    frame.writeUInt32BE(bytes.length, 1);
    frame.set(bytes, 5);
    stream.write(frame);
  };
  send({
    case: "hello",
    value: {
      protocolVersion: 1,
      bootId: "boot-1",
      journalId: "journal-1",
      inventory: { host: { hostname: "deaf", cpuCount: 1, memoryMib: 1 } },
    },
  });
  return { send, isClosed: () => closed };
}
