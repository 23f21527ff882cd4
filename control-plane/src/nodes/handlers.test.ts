// The slice's services as their callers meet them: over TLS, with real credentials, behind every interceptor.
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { type Client, Code, ConnectError, createClient, type Transport } from "@connectrpc/connect";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { CredentialKind, IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { LocationSchema } from "@clodei/proto/gen/clodei/v1/location";
import { NodeService, NodeState, type WatchNodesResponse } from "@clodei/proto/gen/clodei/v1/node_service";
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import { BadRequestSchema, ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { parseEnrollmentToken } from "@clodei/proto/enrollment-token";
import { newId } from "@clodei/proto/ids";
import { madrid, startTestFleet, type TestFleet } from "./test-fleet.ts";
import { startTestListener, type TestListener } from "./test-listener.ts";
import { createNodeKey, signRenewal } from "./test-node.ts";

let fleet: TestFleet;
let listener: TestListener;
before(async () => {
  fleet = await startTestFleet();
  listener = await startTestListener(fleet);
});
after(async () => {
  await listener[Symbol.asyncDispose]();
  await fleet[Symbol.asyncDispose]();
});

const transport = (apiKey: string): Transport => listener.transport(apiKey);
const operator = (): Client<typeof NodeService> => createClient(NodeService, transport(listener.operator.apiKey));
const anonymous = (): Client<typeof EnrollmentService> => createClient(EnrollmentService, transport(""));
const location = create(LocationSchema, madrid);

/** Whether an error has a code and a reason. */
function refused(code: Code, reason: string) {
  return (error: unknown): boolean => {
    assert.ok(error instanceof ConnectError, String(error));
    assert.equal(Code[error.code], Code[code]);
    assert.equal(error.findDetails(ErrorInfoSchema)[0]?.reason, reason);
    return true;
  };
}

async function enrollNode() {
  const { token } = await operator().createEnrollmentToken({ location });
  const key = await createNodeKey();
  const identity = await anonymous().enroll({
    enrollmentToken: token,
    certificateRequest: key.certificateRequest,
    agentVersion: "1.0.0",
  });
  return { key, identity };
}

describe("WhoAmI", () => {
  const whoAmI = (apiKey: string) => createClient(IdentityService, transport(apiKey)).whoAmI({});

  test("tells a customer from an operator, and refuses whoever is neither", async () => {
    const customer = await whoAmI(listener.customerKey);
    assert.equal(customer.credential, CredentialKind.API_KEY);
    assert.equal(customer.organizationName, "Customer");
    assert.deepEqual(customer.roles, [Role.ADMIN]);
    assert.equal(customer.platformOperator, false);
    const platform = await whoAmI(listener.operator.apiKey);
    assert.equal(platform.callerId, listener.operator.id);
    assert.equal(platform.platformOperator, true);
    assert.equal(platform.organizationId, "");
    await assert.rejects(whoAmI(""), refused(Code.Unauthenticated, "CREDENTIALS_MISSING"));
    await assert.rejects(whoAmI("clodei_sk_nonsense"), refused(Code.Unauthenticated, "API_KEY_MALFORMED"));
  });
});

describe("NodeService", () => {
  test("is for platform operators: an organization's admin calls no method of it", async () => {
    const customer = createClient(NodeService, transport(listener.customerKey));
    const nodeId = newId("nod");
    for (const call of [
      () => customer.createEnrollmentToken({ location }),
      () => customer.listEnrollmentTokens({}),
      () => customer.revokeEnrollmentToken({ enrollmentTokenId: newId("ent") }),
      () => customer.listNodes({}),
      () => customer.getNode({ nodeId }),
      () => customer.cordonNode({ nodeId }),
      () => customer.uncordonNode({ nodeId }),
      () => customer.revokeNode({ nodeId }),
      () => customer.reenrollNode({ nodeId }),
      () => Array.fromAsync(customer.watchNodes({})),
    ]) {
      await assert.rejects(call(), refused(Code.PermissionDenied, "PERMISSION_DENIED"));
    }
  });

  test("shows an enrollment token once: the replay has the object, and says why it lacks the token", async () => {
    const request = { location, nodeName: "shown-once", idempotencyKey: "create-1" };
    const first = await operator().createEnrollmentToken(request);
    assert.ok(parseEnrollmentToken(first.token));
    assert.equal(first.enrollmentToken?.maxUses, 1);
    assert.equal(Number(first.enrollmentToken?.expireTime?.seconds), Math.floor(fleet.now().getTime() / 1000) + 3600);
    let reason: string | null = null;
    const replay = await operator().createEnrollmentToken(request, {
      onHeader: (headers) => {
        reason = headers.get("clodei-reason");
      },
    });
    assert.equal(replay.token, "");
    assert.equal(reason, "SECRET_ALREADY_SHOWN");
    assert.deepEqual(replay.enrollmentToken, first.enrollmentToken);
    await assert.rejects(
      operator().createEnrollmentToken({ ...request, maxUses: 1 }),
      refused(Code.FailedPrecondition, "IDEMPOTENCY_KEY_REUSED"),
    );
    const secret = parseEnrollmentToken(first.token)?.secret ?? "?";
    const records = await fleet.db.database.system((tx) =>
      tx.query<{ row: string }>("select encode(response, 'hex') as row from idempotency_records"),
    );
    assert.ok(records.length > 0 && records.every(({ row }) => !row.includes(Buffer.from(secret).toString("hex"))));
  });

  test("names what is wrong with a token's request", async () => {
    await assert.rejects(operator().createEnrollmentToken({ location: { ...location, country: "US" } }), (error) => {
      assert.ok(error instanceof ConnectError);
      assert.equal(error.findDetails(BadRequestSchema)[0]?.fieldViolations[0]?.field, "location.country");
      return refused(Code.FailedPrecondition, "LOCATION_NOT_ALLOWED")(error);
    });
    await assert.rejects(operator().createEnrollmentToken({}), refused(Code.InvalidArgument, "INVALID_ARGUMENT"));
    await assert.rejects(
      operator().createEnrollmentToken({ location, nodeName: "Not A Name" }),
      refused(Code.InvalidArgument, "INVALID_ARGUMENT"),
    );
  });

  test("lists tokens, the newest first, page by page, and revokes one", async () => {
    for (let index = 0; index < 5; index += 1) {
      fleet.advance(1); // ids of one millisecond stand in random order
      await operator().createEnrollmentToken({ location });
    }
    const all = await operator().listEnrollmentTokens({ pageSize: 500 });
    const ids = all.enrollmentTokens.map(({ id }) => id);
    assert.deepEqual(ids, ids.toSorted().toReversed());
    const paged: string[] = [];
    for (let pageToken = ""; ;) {
      const page = await operator().listEnrollmentTokens({ pageSize: 2, pageToken });
      paged.push(...page.enrollmentTokens.map(({ id }) => id));
      pageToken = page.nextPageToken;
      if (pageToken === "") break;
    }
    assert.deepEqual(paged, ids);
    const [id = ""] = ids;
    const { enrollmentToken } = await operator().revokeEnrollmentToken({ enrollmentTokenId: id });
    assert.ok(enrollmentToken?.revokeTime);
    const again = await operator().revokeEnrollmentToken({ enrollmentTokenId: id });
    assert.deepEqual(again.enrollmentToken?.revokeTime, enrollmentToken.revokeTime);
    const missing = operator().revokeEnrollmentToken({ enrollmentTokenId: newId("ent") });
    await assert.rejects(missing, refused(Code.NotFound, "NOT_FOUND"));
    const nonsense = operator().listEnrollmentTokens({ pageToken: "nonsense" });
    await assert.rejects(nonsense, refused(Code.InvalidArgument, "PAGE_TOKEN_INVALID"));
  });

  test("lists nodes by name, filtered, page by page, and gets one with its allocation", async () => {
    const { identity } = await enrollNode();
    await enrollNode();
    const { node } = await operator().getNode({ nodeId: identity.nodeId });
    assert.equal(node?.state, NodeState.ENROLLED);
    assert.equal(node.location?.datacenter, "kumo-1");
    assert.equal(node.allocation?.cpuMillis, 500);
    assert.ok(node.certificateExpireTime);
    const { nodes } = await operator().listNodes({ location: { country: "ES", region: "madrid" } });
    assert.deepEqual(
      nodes.map(({ name }) => name),
      nodes.map(({ name }) => name).toSorted(),
    );
    assert.ok(nodes.some(({ id }) => id === identity.nodeId));
    const none = await operator().listNodes({ location: { country: "FR" } });
    assert.deepEqual(none.nodes, []);
    const one = await operator().listNodes({ pageSize: 1 });
    const two = await operator().listNodes({ pageSize: 1, pageToken: one.nextPageToken });
    assert.notEqual(one.nodes[0]?.id, two.nodes[0]?.id);
    const otherFilter = operator().listNodes({ pageToken: one.nextPageToken, states: [NodeState.READY] });
    await assert.rejects(otherFilter, refused(Code.InvalidArgument, "PAGE_TOKEN_INVALID"));
    await operator().revokeNode({ nodeId: identity.nodeId, comment: "sold" });
    const left = await operator().listNodes({ pageSize: 500 });
    assert.ok(!left.nodes.some(({ id }) => id === identity.nodeId));
    const revoked = await operator().listNodes({ states: [NodeState.REVOKED] });
    assert.equal(revoked.nodes.find(({ id }) => id === identity.nodeId)?.message, "sold");
  });

  test("cordons, uncordons and re-enrolls, each once for its idempotency key", async () => {
    const { identity } = await enrollNode();
    const { nodeId } = identity;
    const cordoned = await operator().cordonNode({ nodeId, idempotencyKey: "k" });
    assert.ok(cordoned.node?.cordoned);
    await operator().uncordonNode({ nodeId, idempotencyKey: "k" });
    const replay = await operator().cordonNode({ nodeId, idempotencyKey: "k" });
    assert.ok(replay.node?.cordoned, "the first answer");
    assert.equal((await operator().getNode({ nodeId })).node?.cordoned, false, "and no second effect");
    const again = await operator().reenrollNode({ nodeId, idempotencyKey: "k" });
    assert.equal(again.enrollmentToken?.reenrollsNodeId, nodeId);
    const silent = await operator().reenrollNode({ nodeId, idempotencyKey: "k" });
    assert.equal(silent.token, "");
    const key = await createNodeKey();
    const back = await anonymous().enroll({
      enrollmentToken: again.token,
      certificateRequest: key.certificateRequest,
      agentVersion: "",
    });
    assert.equal(back.nodeId, nodeId);
    await assert.rejects(operator().cordonNode({ nodeId: newId("nod") }), refused(Code.NotFound, "NOT_FOUND"));
  });
});

describe("EnrollmentService", () => {
  test("enrolls over the wire, and renews after expiry against a signed challenge", async () => {
    const { key, identity } = await enrollNode();
    assert.equal(identity.nodeEndpoint, "node.example:8444");
    assert.deepEqual(Buffer.from(identity.trustBundle[0] ?? []), Buffer.from(fleet.authority.trustBundle[0] ?? []));
    const { nodeId } = identity;
    const { challenge } = await anonymous().createRenewalChallenge({ nodeId });
    const next = await createNodeKey();
    const signature = signRenewal(key.privateKeyPem, challenge, next.certificateRequest);
    const { certificateRequest } = next;
    const request = { nodeId, certificate: identity.certificate, challenge, certificateRequest, signature };
    const renewed = await anonymous().renewExpired(request);
    assert.equal(fleet.authority.issued(renewed.certificate)?.nodeId, nodeId);
    await assert.rejects(anonymous().renewExpired(request), refused(Code.Unauthenticated, "CHALLENGE_INVALID"));
    assert.equal((await anonymous().createRenewalChallenge({ nodeId: newId("nod") })).challenge.length, 32);
    await assert.rejects(
      anonymous().enroll({ enrollmentToken: "CLDT-1-x", certificateRequest, agentVersion: "" }),
      refused(Code.Unauthenticated, "ENROLLMENT_TOKEN_INVALID"),
    );
  });
});

describe("WatchNodes", () => {
  /** Reads a watch until a message fits. */
  async function read(
    stream: AsyncIterator<WatchNodesResponse>,
    fits: (message: WatchNodesResponse) => boolean,
  ): Promise<WatchNodesResponse[]> {
    const messages: WatchNodesResponse[] = [];
    for (;;) {
      const result = await stream.next();
      assert.ok(result.done !== true);
      messages.push(result.value);
      if (fits(result.value)) return messages;
    }
  }
  const isBookmark = ({ event }: WatchNodesResponse): boolean => event.case === "bookmark";
  const cordonedIs =
    (nodeId: string, cordoned: boolean) =>
    ({ event }: WatchNodesResponse): boolean =>
      event.case === "change" && event.value.id === nodeId && event.value.cordoned === cordoned;

  test("gives the fleet, a bookmark, and then each change; a cursor resumes without loss", async () => {
    const { identity } = await enrollNode();
    const { nodeId } = identity;
    const abort = new AbortController();
    const stream = operator().watchNodes({}, { signal: abort.signal })[Symbol.asyncIterator]();
    const snapshot = await read(stream, isBookmark);
    assert.ok(snapshot.slice(0, -1).every(({ event, cursor }) => event.case === "snapshot" && cursor === ""));
    assert.ok(snapshot.some(({ event }) => event.case === "snapshot" && event.value.id === nodeId));
    await operator().cordonNode({ nodeId });
    const changes = await read(stream, cordonedIs(nodeId, true));
    abort.abort();
    await operator().uncordonNode({ nodeId });
    const { identity: second } = await enrollNode();
    const cursor = changes.at(-1)?.cursor ?? "";
    const resumed = new AbortController();
    const later = operator().watchNodes({ cursor }, { signal: resumed.signal })[Symbol.asyncIterator]();
    const missed = await read(later, ({ event }) => event.case === "change" && event.value.id === second.nodeId);
    assert.ok(missed.some(cordonedIs(nodeId, false)), "what happened in between");
    assert.ok(!missed.some(cordonedIs(nodeId, true)), "and nothing twice");
    resumed.abort();
    const foreign = Array.fromAsync(operator().watchNodes({ cursor: "nonsense" }));
    await assert.rejects(foreign, refused(Code.InvalidArgument, "CURSOR_INVALID"));
  });

  test("tells of a desired set that a tenant's transaction moved on, and of a lease that ended", async () => {
    const { identity } = await enrollNode();
    const node = fleet.authority.issued(identity.certificate);
    assert.ok(node);
    const abort = new AbortController();
    const stream = operator().watchNodes({}, { signal: abort.signal })[Symbol.asyncIterator]();
    await read(stream, isBookmark);
    await fleet.db.database.tenant(newId("org"), (tx) => fleet.nodes.bumpDesiredGeneration(tx, node.nodeId));
    await read(stream, ({ event }) => event.case === "change" && event.value.desiredGeneration === 1n);
    await fleet.hello(node.nodeId);
    await read(stream, ({ event }) => event.case === "change" && event.value.state === NodeState.READY);
    await fleet.db.database.system((tx) =>
      tx.execute("update nodes set lease_expire_time = now() where id = $1", [node.nodeId]),
    );
    await fleet.db.database.system((tx) => fleet.nodes.expireLeases(tx));
    await read(stream, ({ event }) => event.case === "change" && event.value.state === NodeState.UNREACHABLE);
    abort.abort();
  });

  test("ends for an operator whose key is revoked", async () => {
    const other = await fleet.db.database.system((tx) => listener.identity.createOperator(tx, { name: "leaving" }));
    const stream = createClient(NodeService, transport(other.apiKey)).watchNodes({})[Symbol.asyncIterator]();
    await read(stream, isBookmark);
    await fleet.db.database.system((tx) => listener.identity.revokeApiKey(tx, other.id));
    await assert.rejects(stream.next(), refused(Code.PermissionDenied, "PERMISSION_DENIED"));
  });
});
