import assert from "node:assert/strict";
import { createPrivateKey, X509Certificate } from "node:crypto";
import { after, before, describe, test } from "node:test";
import { parseEnrollmentToken } from "@clodei/proto/enrollment-token";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { newId, type NodeId } from "@clodei/proto/ids";
import { DomainError } from "../platform/errors.ts";
import { reasonName } from "../rpc/errors.ts";
import { Authority } from "./authority.ts";
import { Enrollment, type Identity } from "./enrollment.ts";
import { takesNewWork } from "./model.ts";
import { endIdentity, revokeNode } from "./operations.ts";
import { certificateLifetimeMs, madrid, startTestFleet, type TestFleet } from "./test-fleet.ts";
import { createNodeKey, type NodeKey, signRenewal } from "./test-node.ts";

let fleet: TestFleet;
before(async () => {
  fleet = await startTestFleet();
});
after(() => fleet[Symbol.asyncDispose]());

const dayMs = 24 * 60 * 60 * 1000;

const enroll = (token: string, key: NodeKey): Promise<Identity> =>
  fleet.enrollment.enroll({
    enrollmentToken: token,
    certificateRequest: key.certificateRequest,
    agentVersion: "1.0.0",
  });

/** Whether an error has a reason, and a text that neither shows a secret nor leaves the reader alone. */
function reasoned(reason: ErrorReason, ...secrets: string[]) {
  return (error: unknown): boolean => {
    assert.ok(error instanceof DomainError, String(error));
    assert.equal(reasonName(error.reason), reasonName(reason));
    assert.ok(error.message.length > 20);
    for (const secret of secrets) assert.ok(!error.message.includes(secret));
    return true;
  };
}

const revoke = (token: string): Promise<unknown> => {
  const id = parseEnrollmentToken(token)?.id;
  assert.ok(id);
  return fleet.db.database.system((tx) => fleet.enrollment.revokeToken(tx, id));
};

const serialOf = (identity: Identity): string => {
  const certificate = fleet.authority.issued(identity.certificate);
  assert.ok(certificate);
  return certificate.serial;
};

const faultOf = (identity: Identity): Promise<string | undefined> =>
  fleet.db.database.system(async (tx) => {
    const serial = serialOf(identity);
    const check = (await fleet.nodes.checkCertificates(tx, [serial])).get(serial);
    assert.ok(check);
    return check.fault;
  });

const use = (identity: Identity): Promise<void> =>
  fleet.db.database.system((tx) => fleet.nodes.certificateUsed(tx, serialOf(identity)));

const renew = (nodeId: NodeId, key: NodeKey): Promise<Identity> =>
  fleet.db.database.system((tx) => fleet.nodes.renew(tx, nodeId, key.certificateRequest));

describe("enrollment", () => {
  test("gives a node an id, a name, a place, a certificate of its key, and the trust bundle", async () => {
    const key = await createNodeKey("CN=somebody-else, C=US");
    const identity = await enroll(await fleet.createToken({ nodeName: "first-node" }), key);
    assert.match(identity.node.nodeId, /^nod_/);
    assert.equal(identity.node.name, "first-node");
    assert.equal(identity.node.state, "enrolled");
    assert.deepEqual(identity.node.location, madrid);
    assert.equal(identity.nodeEndpoint, "node.example:8444");
    assert.deepEqual(identity.trustBundle, fleet.authority.trustBundle);
    const certificate = fleet.authority.issued(identity.certificate);
    assert.equal(certificate?.nodeId, identity.node.nodeId);
    assert.deepEqual(certificate?.location, madrid);
    assert.deepEqual(certificate?.publicKey, key.publicKey);
    assert.ok(new X509Certificate(identity.certificate).checkPrivateKey(createPrivateKey(key.privateKeyPem)));
    const lifetimeMs = identity.expireTime.getTime() - fleet.now().getTime();
    assert.ok(Math.abs(lifetimeMs - certificateLifetimeMs) < 1000);
  });

  test("makes a name of datacenter and id where the token has none", async () => {
    const identity = await enroll(await fleet.createToken(), await createNodeKey());
    assert.match(identity.node.name, /^kumo-1-[0-9a-z]{10}$/);
    assert.ok(identity.node.nodeId.endsWith(identity.node.name.slice("kumo-1-".length)));
  });

  test("with the same token and key again is the same node, and no second use", async () => {
    const [token, key] = [await fleet.createToken(), await createNodeKey()];
    const first = await enroll(token, key);
    const second = await enroll(token, key);
    assert.equal(second.node.nodeId, first.node.nodeId);
    assert.equal(serialOf(second), serialOf(first));
    assert.equal(await faultOf(second), undefined);
  });

  test("of the same token and key from many sides at once is one node and one use", async () => {
    const [token, key] = [await fleet.createToken({ maxUses: 5 }), await createNodeKey()];
    const identities = await Promise.all(Array.from({ length: 8 }, () => enroll(token, key)));
    assert.equal(new Set(identities.map(({ node }) => node.nodeId)).size, 1);
    const records = await fleet.db.database.system((tx) => fleet.enrollment.listTokens(tx, undefined, 500));
    const record = records.find(({ id }) => id === parseEnrollmentToken(token)?.id);
    assert.equal(record?.uses, 1);
  });

  test("of two keys that race for a token's one use lets exactly one in", async () => {
    for (let round = 0; round < 5; round += 1) {
      const token = await fleet.createToken();
      const keys = await Promise.all(Array.from({ length: 4 }, () => createNodeKey()));
      const outcomes = await Promise.allSettled(keys.map((key) => enroll(token, key)));
      const refused = outcomes.filter((outcome) => outcome.status === "rejected");
      assert.equal(refused.length, 3);
      for (const { reason } of refused) reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, token)(reason);
    }
  });

  test("a token enrolls as many keys as it has uses", async () => {
    const token = await fleet.createToken({ maxUses: 2 });
    const [one, two] = [await enroll(token, await createNodeKey()), await enroll(token, await createNodeKey())];
    assert.notEqual(one.node.nodeId, two.node.nodeId);
    await assert.rejects(enroll(token, await createNodeKey()), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, token));
  });

  test("unknown, mistyped, expired, revoked, used up and foreign tokens are refused, all but the mistyped alike", async () => {
    const key = await createNodeKey();
    const known = await fleet.createToken();
    const parts = known.split("-");
    const unknown = await fleet.createToken().then((other) => [...parts.slice(0, 4), other.split("-")[4]].join("-"));
    const foreign = [...parts.slice(0, 2), "0".repeat(64), ...parts.slice(3)].join("-");
    const expired = await fleet.createToken({ lifetimeMs: 1000 });
    const revoked = await fleet.createToken();
    await revoke(revoked);
    const used = await fleet.createToken();
    await enroll(used, await createNodeKey());
    fleet.advance(1001);
    const texts = new Set<string>();
    for (const token of [unknown, foreign, expired, revoked, used]) {
      await assert.rejects(enroll(token, key), (error) => {
        if (error instanceof DomainError) texts.add(error.message);
        return reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, token)(error);
      });
    }
    assert.equal(texts.size, 1, "one text says nothing about which tokens there are");
    await assert.rejects(enroll(known.slice(0, -30), key), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, known));
    assert.ok(await enroll(known, key), "and none of it used up the good one");
  });

  test("a lost answer does not burn the token, but a revoked token answers nobody", async () => {
    const [token, key] = [await fleet.createToken(), await createNodeKey()];
    await enroll(token, key);
    await revoke(token);
    await assert.rejects(enroll(token, key), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, token));
  });

  test("a key that cannot be used does not use the token up", async () => {
    const token = await fleet.createToken();
    const bad = await createNodeKey("CN=x", { name: "ECDSA", namedCurve: "P-384", hash: "SHA-384" });
    await assert.rejects(enroll(token, bad), (error) => {
      assert.ok(error instanceof DomainError);
      assert.equal(error.fields[0]?.field, "certificate_request");
      return reasoned(ErrorReason.INVALID_ARGUMENT, token)(error);
    });
    assert.ok(await enroll(token, await createNodeKey()));
  });

  test("only the hash of a token is in the database", async () => {
    const token = await fleet.createToken();
    const secret = token.split("-").at(-1) ?? "";
    const rows = await fleet.db.database.system((tx) =>
      tx.query<{ row: string }>("select t::text as row from enrollment_tokens t"),
    );
    assert.ok(rows.length > 0);
    assert.ok(rows.every(({ row }) => !row.includes(secret) && !row.includes(Buffer.from(secret).toString("hex"))));
  });
});

describe("jurisdictions", () => {
  test("a token for a country outside them is refused, and so is an enrollment after the list got shorter", async () => {
    const elsewhere = { ...madrid, country: "US" };
    await assert.rejects(fleet.createToken({ location: elsewhere }), reasoned(ErrorReason.LOCATION_NOT_ALLOWED));
    const token = await fleet.createToken();
    const stricter = new Enrollment({
      database: fleet.db.database,
      authority: fleet.authority,
      clock: fleet.now,
      hints: fleet.db.wakeups,
      allowedCountries: ["DE"],
      certificateLifetimeMs,
      nodeEndpoint: () => "",
    });
    const key = await createNodeKey();
    const request = { enrollmentToken: token, certificateRequest: key.certificateRequest, agentVersion: "" };
    await assert.rejects(stricter.enroll(request), reasoned(ErrorReason.LOCATION_NOT_ALLOWED));
    assert.ok(await enroll(token, key));
  });
});

describe("names", () => {
  test("one name is one node's, until it is revoked", async () => {
    const identity = await enroll(await fleet.createToken({ nodeName: "only-one" }), await createNodeKey());
    await assert.rejects(fleet.createToken({ nodeName: "only-one" }), reasoned(ErrorReason.FAILED_PRECONDITION));
    await assert.rejects(
      fleet.createToken({ nodeName: "two-uses", maxUses: 2 }),
      reasoned(ErrorReason.INVALID_ARGUMENT),
    );
    await fleet.db.database.system((tx) => revokeNode(tx, identity.node.nodeId, "", fleet.now(), fleet.db.wakeups));
    const [one, two] = [
      await fleet.createToken({ nodeName: "only-one" }),
      await fleet.createToken({ nodeName: "only-one" }),
    ];
    assert.ok(await enroll(one, await createNodeKey()));
    await assert.rejects(enroll(two, await createNodeKey()), reasoned(ErrorReason.FAILED_PRECONDITION, two));
  });
});

describe("renewal over the node link", () => {
  test("keeps the old certificate good until the new one is used", async () => {
    const { identity } = await fleet.enrollNode();
    await use(identity);
    const renewed = await renew(identity.node.nodeId, await createNodeKey());
    assert.equal(renewed.node.nodeId, identity.node.nodeId);
    assert.equal(await faultOf(identity), undefined);
    assert.equal(await faultOf(renewed), undefined);
    await use(renewed);
    assert.equal(await faultOf(identity), "superseded");
    assert.equal(await faultOf(renewed), undefined);
    await use(identity);
    assert.equal(await faultOf(renewed), undefined, "using a superseded certificate supersedes nothing");
  });

  test("of which every answer is lost leaves a few unused certificates, and not ever more", async () => {
    const { identity } = await fleet.enrollNode();
    await use(identity);
    const renewed: Identity[] = [];
    for (let round = 0; round < 6; round += 1) renewed.push(await renew(identity.node.nodeId, await createNodeKey()));
    const faults = await Promise.all(renewed.map(faultOf));
    assert.deepEqual(faults, ["superseded", "superseded", undefined, undefined, undefined, undefined]);
    assert.equal(await faultOf(identity), undefined);
  });

  test("that is repeated because its answer was lost gets the same certificate, and one for a used key a new one", async () => {
    const { identity } = await fleet.enrollNode();
    await use(identity);
    const key = await createNodeKey();
    const lost = await renew(identity.node.nodeId, key);
    fleet.advance(60_000);
    const again = await renew(identity.node.nodeId, key);
    assert.deepEqual([again.certificate, again.expireTime], [lost.certificate, lost.expireTime]);
    await use(again);
    assert.notEqual(serialOf(await renew(identity.node.nodeId, key)), serialOf(again));
  });

  test("is refused to a node that asks without end, until an hour has passed, and never as a repeat", async () => {
    const { identity } = await fleet.enrollNode();
    const { nodeId } = identity.node;
    await use(identity);
    const keys = await Promise.all(Array.from({ length: 7 }, () => createNodeKey()));
    for (const key of keys) {
      await renew(nodeId, key);
      fleet.advance(60_000);
    }
    // The enrollment's own certificate is the first of eight.
    await assert.rejects(renew(nodeId, await createNodeKey()), (error) => {
      assert.ok(reasoned(ErrorReason.RATE_LIMITED)(error));
      assert.ok(error instanceof DomainError);
      assert.equal(error.retryAfterMs, (60 - 7) * 60_000);
      return true;
    });
    const lost = keys.at(-1);
    assert.ok(lost);
    await renew(nodeId, lost);
    const { identity: other } = await fleet.enrollNode();
    await renew(other.node.nodeId, await createNodeKey());
    fleet.advance(53 * 60_000);
    await renew(nodeId, await createNodeKey());
  });

  test("is refused to a revoked and to a quarantined node", async () => {
    const { identity: revoked } = await fleet.enrollNode();
    await fleet.db.database.system((tx) => revokeNode(tx, revoked.node.nodeId, "", fleet.now(), fleet.db.wakeups));
    await assert.rejects(renew(revoked.node.nodeId, await createNodeKey()), reasoned(ErrorReason.NODE_REVOKED));
    const { identity: cloned } = await fleet.enrollNode();
    await fleet.db.database.system((tx) => fleet.nodes.quarantine(tx, cloned.node.nodeId, "two of them"));
    await assert.rejects(renew(cloned.node.nodeId, await createNodeKey()), reasoned(ErrorReason.NODE_QUARANTINED));
  });

  test("ends what the enrollment's token and key could fetch, once the new key was used", async () => {
    const { identity, key, token } = await fleet.enrollNode();
    await use(identity);
    const renewed = await renew(identity.node.nodeId, await createNodeKey());
    assert.equal((await enroll(token, key)).node.nodeId, identity.node.nodeId);
    await use(renewed);
    await assert.rejects(enroll(token, key), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, token));
  });
});

describe("enrolling a node again", () => {
  test("keeps new work off the node from then on, before its lease ends", async () => {
    const { identity } = await fleet.enrollNode();
    const { nodeId } = identity.node;
    await fleet.hello(nodeId);
    await fleet.db.database.system(async (tx) => {
      const facts = { nodeId, gpus: [], acceptingWork: true, acceptingWorkMessage: "", observedGeneration: 0n };
      await fleet.nodes.applyHeartbeats(tx, [facts]);
      assert.ok(takesNewWork((await fleet.nodes.nodes(tx, [nodeId]))[0] ?? assert.fail()));
      const node = await endIdentity(tx, nodeId, fleet.now(), fleet.db.wakeups);
      assert.equal(node.state, "ready");
      assert.ok(!takesNewWork(node));
      assert.match(node.acceptingWorkMessage, /new enrollment/);
    });
  });

  test("ends its certificates and gives a new key the old id, and the old token and key nothing", async () => {
    const { identity, key, token } = await fleet.enrollNode();
    const { nodeId, name } = identity.node;
    await fleet.db.database.system((tx) => fleet.nodes.quarantine(tx, nodeId, "two of them"));
    const again = await fleet.db.database.system(async (tx) => {
      const node = await endIdentity(tx, nodeId, fleet.now(), fleet.db.wakeups);
      return fleet.enrollment.createReenrollmentToken(tx, node, "opr_test");
    });
    assert.equal(await faultOf(identity), "ended");
    assert.equal(again.record.reenrollsNodeId, nodeId);
    await assert.rejects(enroll(token, key), reasoned(ErrorReason.NODE_QUARANTINED, token));
    const back = await enroll(again.token, await createNodeKey());
    assert.equal(back.node.nodeId, nodeId);
    assert.equal(back.node.name, name);
    assert.equal(back.node.state, "enrolled");
    assert.equal(await faultOf(back), undefined);
    assert.equal(await faultOf(identity), "ended");
    await assert.rejects(enroll(token, key), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID, token));
    await assert.rejects(enroll(again.token, await createNodeKey()), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID));
  });

  test("with a second token ends the first one; a revoked node stays revoked", async () => {
    const { identity } = await fleet.enrollNode();
    const { nodeId } = identity.node;
    const reenroll = () =>
      fleet.db.database.system(async (tx) => {
        const node = await endIdentity(tx, nodeId, fleet.now(), fleet.db.wakeups);
        return fleet.enrollment.createReenrollmentToken(tx, node, "opr_test");
      });
    const [one, two] = [await reenroll(), await reenroll()];
    await assert.rejects(enroll(one.token, await createNodeKey()), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID));
    await fleet.db.database.system((tx) => revokeNode(tx, nodeId, "", fleet.now(), fleet.db.wakeups));
    await assert.rejects(enroll(two.token, await createNodeKey()), reasoned(ErrorReason.ENROLLMENT_TOKEN_INVALID));
    await assert.rejects(reenroll(), reasoned(ErrorReason.NODE_REVOKED));
  });
});

describe("renewal after expiry", () => {
  async function renewExpired(
    identity: Identity,
    oldKey: NodeKey,
    change: { challenge?: Uint8Array; nodeId?: NodeId; signature?: Uint8Array; certificate?: Uint8Array } = {},
  ): Promise<Identity> {
    const nodeId = change.nodeId ?? identity.node.nodeId;
    const challenge = change.challenge ?? fleet.enrollment.createRenewalChallenge(nodeId).challenge;
    const { certificateRequest } = await createNodeKey();
    const signature = change.signature ?? signRenewal(oldKey.privateKeyPem, challenge, certificateRequest);
    const certificate = change.certificate ?? identity.certificate;
    return fleet.enrollment.renewExpired({ nodeId, certificate, challenge, certificateRequest, signature });
  }

  test("gives the holder of the old key a new certificate, for 30 days", async () => {
    const { identity, key } = await fleet.enrollNode();
    await use(identity);
    fleet.advance(certificateLifetimeMs + 1000);
    assert.equal(await faultOf(identity), "expired");
    const renewed = await renewExpired(identity, key);
    assert.equal(renewed.node.nodeId, identity.node.nodeId);
    assert.equal(await faultOf(renewed), undefined);
    fleet.advance(30 * dayMs - 60_000);
    assert.ok(await renewExpired(identity, key), "the answer was lost, and the new certificate never used");
    fleet.advance(120_000);
    await assert.rejects(renewExpired(identity, key), reasoned(ErrorReason.CERTIFICATE_INVALID));
  });

  test("works once for a challenge, also when two replicas are asked at once", async () => {
    const { identity, key } = await fleet.enrollNode();
    const { challenge } = fleet.enrollment.createRenewalChallenge(identity.node.nodeId);
    assert.equal(challenge.length, 32);
    const outcomes = await Promise.allSettled(
      Array.from({ length: 4 }, () => renewExpired(identity, key, { challenge })),
    );
    assert.equal(outcomes.filter(({ status }) => status === "fulfilled").length, 1);
    await assert.rejects(renewExpired(identity, key, { challenge }), reasoned(ErrorReason.CHALLENGE_INVALID));
  });

  test("refuses a challenge that is a minute old, another node's, made up, or of another CA", async () => {
    const { identity, key } = await fleet.enrollNode();
    const { identity: other } = await fleet.enrollNode();
    const invalid = reasoned(ErrorReason.CHALLENGE_INVALID);
    const old = fleet.enrollment.createRenewalChallenge(identity.node.nodeId).challenge;
    fleet.advance(60_000);
    await assert.rejects(renewExpired(identity, key, { challenge: old }), invalid);
    const others = fleet.enrollment.createRenewalChallenge(other.node.nodeId).challenge;
    await assert.rejects(renewExpired(identity, key, { challenge: others }), invalid);
    await assert.rejects(renewExpired(identity, key, { challenge: new Uint8Array(32) }), invalid);
    const { certificatePem, privateKeyPem } = await Authority.generate(fleet.now());
    const authority = await Authority.fromPem(certificatePem, privateKeyPem, "clodei.com", fleet.now());
    const elsewhere = new Enrollment({
      database: fleet.db.database,
      authority,
      clock: fleet.now,
      hints: fleet.db.wakeups,
      allowedCountries: ["ES"],
      certificateLifetimeMs,
      nodeEndpoint: () => "",
    });
    const foreign = elsewhere.createRenewalChallenge(identity.node.nodeId).challenge;
    await assert.rejects(renewExpired(identity, key, { challenge: foreign }), invalid);
  });

  test("refuses a signature of another key, and another node's certificate", async () => {
    const { identity, key } = await fleet.enrollNode();
    const { identity: other, key: otherKey } = await fleet.enrollNode();
    await assert.rejects(renewExpired(identity, otherKey), reasoned(ErrorReason.CHALLENGE_INVALID));
    const garbage = { signature: new Uint8Array([1, 2, 3]) };
    await assert.rejects(renewExpired(identity, key, garbage), reasoned(ErrorReason.CHALLENGE_INVALID));
    const stolen = { nodeId: other.node.nodeId };
    await assert.rejects(renewExpired(identity, key, stolen), reasoned(ErrorReason.CERTIFICATE_INVALID));
    const nonsense = { certificate: new Uint8Array([48, 0]) };
    await assert.rejects(renewExpired(identity, key, nonsense), reasoned(ErrorReason.CERTIFICATE_INVALID));
  });

  test("refuses a revoked, a quarantined and a superseded identity", async () => {
    const { identity: revoked, key: revokedKey } = await fleet.enrollNode();
    await fleet.db.database.system((tx) => revokeNode(tx, revoked.node.nodeId, "", fleet.now(), fleet.db.wakeups));
    await assert.rejects(renewExpired(revoked, revokedKey), reasoned(ErrorReason.NODE_REVOKED));
    const { identity: cloned, key: clonedKey } = await fleet.enrollNode();
    await fleet.db.database.system((tx) => fleet.nodes.quarantine(tx, cloned.node.nodeId, "two of them"));
    await assert.rejects(renewExpired(cloned, clonedKey), reasoned(ErrorReason.NODE_QUARANTINED));
    const { identity: old, key: oldKey } = await fleet.enrollNode();
    await use(await renew(old.node.nodeId, await createNodeKey()));
    await assert.rejects(renewExpired(old, oldKey), reasoned(ErrorReason.CERTIFICATE_INVALID));
  });

  test("a challenge is given for nodes that are not there, costs the database nothing, and looks alike", async () => {
    const count = async (): Promise<bigint> => {
      const sql = "select count(*) as count from used_renewal_challenges";
      const [row] = await fleet.db.database.system((tx) => tx.query<{ count: bigint }>(sql));
      return row?.count ?? 0n;
    };
    const first = await count();
    const challenges = Array.from({ length: 100 }, () => fleet.enrollment.createRenewalChallenge(newId("nod")));
    assert.ok(challenges.every(({ challenge }) => challenge.length === 32));
    assert.equal(await count(), first);
  });
});
