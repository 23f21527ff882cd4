// How nodes are let in and stay in: enrollment tokens, enrollment, renewal. Whoever calls Enroll or RenewExpired
// is a stranger: what needs no secret is checked first, what needs the database comes after a proof, and an error
// tells the bearer of a proof what to do and everybody else nothing about what exists.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { formatEnrollmentToken, parseEnrollmentToken } from "@clodei/proto/enrollment-token";
import { type EnrollmentTokenId, type NodeId, newId } from "@clodei/proto/ids";
import { isCountryAllowed } from "@clodei/proto/locations";
import { renewAfterExpiryMs } from "@clodei/proto/node-link";
import { newSecret } from "@clodei/proto/secret";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Authority } from "./authority.ts";
import { type NodeCertificate, type RequestedKey, sha256 } from "./certificates.ts";
import { type Challenge, challengeLifetimeMs, checkChallenge, createChallenge } from "./challenges.ts";
import * as enrollmentStore from "./enrollment-store.ts";
import {
  defaultNodeName,
  type EnrollmentTokenRecord,
  type FleetNode,
  isTokenAlive,
  type NodeLocation,
} from "./model.ts";
import { certificateInvalid, challengeInvalid, isSignedBy, requireKey, tokenInvalid } from "./proofs.ts";
import { assertMayWork, type Hints, hintAfterCommit, lockNode, requireNode } from "./standing.ts";
import { insertNode, isNodeNameTaken, readEnrollmentEpoch, updateNode } from "./store.ts";

/** What enrollment is made of. */
export type EnrollmentOptions = {
  readonly database: Database;
  readonly authority: Authority;
  readonly clock: Clock;
  readonly hints: Hints;
  /** Countries in which a node may stand. */
  readonly allowedCountries: readonly string[];
  readonly certificateLifetimeMs: number;
  /** Where the node listener answers, "host:port". Asked late: the port may be chosen at start. */
  readonly nodeEndpoint: () => string;
};

/** An operator's wish for an enrollment token. */
export type TokenRequest = {
  readonly location: NodeLocation;
  /** Empty: made from the datacenter and the node's id. */
  readonly nodeName: string;
  readonly maxUses: number;
  readonly lifetimeMs: number;
  readonly creatorId: string;
};

/** A token that was made. The text is nowhere else. */
export type CreatedToken = { readonly record: EnrollmentTokenRecord; readonly token: string };

/** What a node gets. */
export type Identity = {
  readonly node: FleetNode;
  readonly certificate: Uint8Array<ArrayBuffer>;
  readonly trustBundle: readonly Uint8Array<ArrayBuffer>[];
  readonly nodeEndpoint: string;
  readonly expireTime: Date;
};

/** The token of ReenrollNode: long enough to carry it to the machine. */
const reenrollmentLifetimeMs = 60 * 60 * 1000;

/**
 * Certificates that a node may hold without having used them. Each lost answer leaves one behind; a node that
 * asks without end makes no more of them good than this.
 */
const maxUnusedCertificates = 4;

/**
 * Certificates that are issued to one node in an hour: it enrolls and renews twice in a certificate's life, and may
 * fail at it. Where certificates live less than half an hour, in two of their lives.
 */
const maxCertificatesPerHour = 8;
const issueWindowMs = 60 * 60 * 1000;

/** Replicas' clocks agree within this: a used challenge is remembered so much longer than it lives. */
const clockMarginMs = 5 * 60 * 1000;

/** Lets nodes in. */
export class Enrollment {
  readonly #options: EnrollmentOptions;
  readonly #challengeSecret: Uint8Array;

  constructor(options: EnrollmentOptions) {
    this.#options = options;
    this.#challengeSecret = options.authority.deriveSecret("clodei renewal challenge v1");
  }

  // ---- tokens -------------------------------------------------------------------------------------------------

  /** Makes an enrollment token. @throws DomainError LOCATION_NOT_ALLOWED, INVALID_ARGUMENT, FAILED_PRECONDITION. */
  async createToken(tx: SystemTx, request: TokenRequest): Promise<CreatedToken> {
    this.#assertAllowed(request.location);
    if (request.nodeName !== "" && request.maxUses !== 1) {
      throw new DomainError(ErrorReason.INVALID_ARGUMENT, "a token with a node name enrolls one node only", {
        fields: [
          { field: "max_uses", rule: "node-name-once", message: "must be 1 (or 0, which means 1) with node_name" },
        ],
      });
    }
    if (request.nodeName !== "" && (await isNodeNameTaken(tx, request.nodeName))) {
      throw new DomainError(
        ErrorReason.FAILED_PRECONDITION,
        "a node has this name: choose another, or revoke that node first",
        {
          fields: [
            { field: "node_name", rule: "unique", message: "must not be the name of a node that is not revoked" },
          ],
        },
      );
    }
    return this.#insertToken(tx, request, undefined);
  }

  /** Makes the token that enrolls this node again, under its id. The caller has ended the node's identity. */
  createReenrollmentToken(tx: SystemTx, node: FleetNode, creatorId: string): Promise<CreatedToken> {
    this.#assertAllowed(node.location);
    const request = {
      location: node.location,
      nodeName: node.name,
      maxUses: 1,
      lifetimeMs: reenrollmentLifetimeMs,
      creatorId,
    };
    return this.#insertToken(tx, request, node.nodeId);
  }

  /** A page of tokens, the newest first. */
  listTokens(tx: SystemTx, afterId: string | undefined, limit: number): Promise<EnrollmentTokenRecord[]> {
    return enrollmentStore.listEnrollmentTokens(tx, afterId, limit);
  }

  /** Revokes a token. @throws DomainError NOT_FOUND. */
  async revokeToken(tx: SystemTx, id: EnrollmentTokenId): Promise<EnrollmentTokenRecord> {
    const record = await enrollmentStore.revokeEnrollmentToken(tx, id, this.#options.clock());
    if (record === undefined) {
      throw new DomainError(
        ErrorReason.NOT_FOUND,
        "there is no such enrollment token: ListEnrollmentTokens shows those that there are",
      );
    }
    return record;
  }

  // ---- enrollment ---------------------------------------------------------------------------------------------

  /**
   * Enrolls a node. Idempotent by token and public key: the same again is the same node, and no second use.
   *
   * @throws DomainError ENROLLMENT_TOKEN_INVALID, INVALID_ARGUMENT, LOCATION_NOT_ALLOWED, NODE_REVOKED,
   *   NODE_QUARANTINED, FAILED_PRECONDITION.
   */
  async enroll(request: {
    readonly enrollmentToken: string;
    readonly certificateRequest: Uint8Array;
    readonly agentVersion: string;
  }): Promise<Identity> {
    const parts = parseEnrollmentToken(request.enrollmentToken);
    if (parts === undefined) {
      throw new DomainError(
        ErrorReason.ENROLLMENT_TOKEN_INVALID,
        "this is not a whole enrollment token (CLDT-1-…): copy it again, from its first to its last character",
      );
    }
    const secretHash = sha256(parts.secret);
    const { database, authority } = this.#options;
    const exists = await database.anonymous((tx) => enrollmentStore.doesEnrollmentTokenExist(tx, parts.id, secretHash));
    // A digest of another CA: the agent trusts somebody else, and would refuse what we answer.
    if (!exists || parts.caDigestHex !== authority.digestHex) throw tokenInvalid();
    const key = await requireKey(request.certificateRequest);
    return database.system(async (tx) => {
      const token = await enrollmentStore.lockEnrollmentToken(tx, parts.id, secretHash);
      if (token === undefined || !isTokenAlive(token, this.#options.clock())) throw tokenInvalid();
      this.#assertAllowed(token.location);
      const node =
        (await this.#enrolledBefore(tx, token, key)) ?? (await this.#enrollNow(tx, token, key, request.agentVersion));
      return this.#certify(tx, node, key);
    });
  }

  /** The node that this key became with this token. @throws DomainError where it has become another's meanwhile. */
  async #enrolledBefore(tx: SystemTx, token: EnrollmentTokenRecord, key: RequestedKey): Promise<FleetNode | undefined> {
    const enrollment = await enrollmentStore.readEnrollment(tx, token.id, key.publicKeyHash);
    if (enrollment === undefined) return undefined;
    const node = await lockNode(tx, enrollment.nodeId);
    assertMayWork(node.state);
    // Enrolled again since, or gone on to another key: then the old key may be a copy's, on some old disk.
    const epoch = await readEnrollmentEpoch(tx, node.nodeId);
    if (epoch !== enrollment.enrollmentEpoch) throw tokenInvalid();
    if (await enrollmentStore.wasKeyReplaced(tx, node.nodeId, key.publicKeyHash)) throw tokenInvalid();
    return node;
  }

  async #enrollNow(
    tx: SystemTx,
    token: EnrollmentTokenRecord,
    key: RequestedKey,
    agentVersion: string,
  ): Promise<FleetNode> {
    if (token.uses >= token.maxUses) throw tokenInvalid();
    const node =
      token.reenrollsNodeId === undefined
        ? await this.#addNode(tx, token, agentVersion)
        : await this.#readmitNode(tx, token.reenrollsNodeId, agentVersion);
    const enrollmentEpoch = await readEnrollmentEpoch(tx, node.nodeId);
    if (enrollmentEpoch === undefined) throw new Error(`the node ${node.nodeId} is gone`);
    await enrollmentStore.insertEnrollment(tx, token.id, key.publicKeyHash, { nodeId: node.nodeId, enrollmentEpoch });
    hintAfterCommit(tx, this.#options.hints, "nodes");
    return node;
  }

  async #addNode(tx: SystemTx, token: EnrollmentTokenRecord, agentVersion: string): Promise<FleetNode> {
    const nodeId = newId("nod", this.#options.clock().getTime());
    const name = token.nodeName === "" ? defaultNodeName(token.location, nodeId) : token.nodeName;
    if (!(await insertNode(tx, { nodeId, name, location: token.location, agentVersion }))) {
      throw new DomainError(
        ErrorReason.FAILED_PRECONDITION,
        "another node took this node's name since the token was made: ask an operator for a token with another name",
      );
    }
    return requireNode(tx, nodeId);
  }

  async #readmitNode(tx: SystemTx, nodeId: NodeId, agentVersion: string): Promise<FleetNode> {
    const node = await lockNode(tx, nodeId);
    if (node.state === "revoked") assertMayWork(node.state);
    await enrollmentStore.endCertificates(tx, nodeId);
    await updateNode(tx, nodeId, { state: "enrolled", message: "", connected: false, agentVersion });
    return requireNode(tx, nodeId);
  }

  // ---- renewal ------------------------------------------------------------------------------------------------

  /**
   * Renews over the node link. The old certificate is good until the new one is used (`certificateUsed`). The same
   * request again, because its answer was lost, gets the same certificate.
   *
   * @throws DomainError INVALID_ARGUMENT, NODE_REVOKED, NODE_QUARANTINED, NOT_FOUND, RATE_LIMITED.
   */
  async renew(tx: SystemTx, nodeId: NodeId, certificateRequest: Uint8Array): Promise<Identity> {
    const key = await requireKey(certificateRequest);
    const node = await lockNode(tx, nodeId);
    assertMayWork(node.state);
    this.#assertAllowed(node.location);
    return this.#certify(tx, node, key);
  }

  /** A challenge for renewExpired: fresh, for this node, good once and for a minute. Given for unknown nodes too. */
  createRenewalChallenge(nodeId: NodeId): Challenge {
    return createChallenge(this.#challengeSecret, nodeId, this.#options.clock());
  }

  /**
   * Renews a certificate that ran out at most 30 days ago, for whoever holds its key.
   *
   * @throws DomainError CHALLENGE_INVALID, CERTIFICATE_INVALID, INVALID_ARGUMENT, NODE_REVOKED, NODE_QUARANTINED.
   */
  async renewExpired(request: {
    readonly nodeId: NodeId;
    readonly certificate: Uint8Array;
    readonly challenge: Uint8Array;
    readonly certificateRequest: Uint8Array;
    readonly signature: Uint8Array;
  }): Promise<Identity> {
    const now = this.#options.clock();
    const challengeEnd = checkChallenge(this.#challengeSecret, request.nodeId, request.challenge, now);
    if (challengeEnd === undefined) throw challengeInvalid();
    const certificate = this.#options.authority.issued(request.certificate);
    if (certificate === undefined || certificate.nodeId !== request.nodeId) throw certificateInvalid();
    if (!isSignedBy(request.certificate, request)) throw challengeInvalid();
    // From here on the caller has proved to hold the node's key, and may be told about the node.
    const key = await requireKey(request.certificateRequest);
    return this.#options.database.system(async (tx) => {
      await enrollmentStore.pruneChallenges(tx, new Date(now.getTime() - clockMarginMs - challengeLifetimeMs));
      if (!(await enrollmentStore.useChallenge(tx, sha256(request.challenge), challengeEnd))) throw challengeInvalid();
      const node = await lockNode(tx, request.nodeId);
      assertMayWork(node.state);
      this.#assertAllowed(node.location);
      await this.#assertRenewable(tx, certificate, now);
      return this.#certify(tx, node, key);
    });
  }

  async #assertRenewable(tx: SystemTx, certificate: NodeCertificate, now: Date): Promise<void> {
    const record = await enrollmentStore.readCertificate(tx, certificate.serial);
    if (record === undefined || record.nodeId !== certificate.nodeId || record.state !== "active") {
      throw certificateInvalid();
    }
    if (record.expireTime.getTime() + renewAfterExpiryMs < now.getTime()) throw certificateInvalid();
  }

  // ---- inside -------------------------------------------------------------------------------------------------

  /** The node's row is locked, so that no two requests are counted as one. */
  async #certify(tx: SystemTx, node: FleetNode, key: RequestedKey): Promise<Identity> {
    const { authority, clock, certificateLifetimeMs, nodeEndpoint } = this.#options;
    const now = clock();
    const { trustBundle } = authority;
    // One whose life has begun just now, and not one of another CA.
    const repeatable = new Date(now.getTime() - Math.min(issueWindowMs, certificateLifetimeMs / 4));
    const repeated = await enrollmentStore.readUnusedCertificate(tx, node.nodeId, key.publicKeyHash, repeatable);
    if (repeated !== undefined && authority.issued(repeated.der) !== undefined) {
      const { der, expireTime } = repeated;
      return { node, certificate: new Uint8Array(der), trustBundle, nodeEndpoint: nodeEndpoint(), expireTime };
    }
    await assertMayIssue(tx, node.nodeId, certificateLifetimeMs, now);
    const certificate = await authority.issueNodeCertificate({
      nodeId: node.nodeId,
      location: node.location,
      publicKey: key.publicKey,
      lifetimeMs: certificateLifetimeMs,
      now,
    });
    await enrollmentStore.insertCertificate(tx, {
      serial: certificate.serial,
      nodeId: node.nodeId,
      publicKeyHash: key.publicKeyHash,
      der: certificate.der,
      createTime: now,
      expireTime: certificate.notAfter,
    });
    await enrollmentStore.supersedeUnused(tx, node.nodeId, maxUnusedCertificates);
    return {
      node,
      certificate: certificate.der,
      trustBundle,
      nodeEndpoint: nodeEndpoint(),
      expireTime: certificate.notAfter,
    };
  }

  async #insertToken(tx: SystemTx, request: TokenRequest, reenrollsNodeId: NodeId | undefined): Promise<CreatedToken> {
    const { authority, clock } = this.#options;
    const now = clock();
    const id = newId("ent", now.getTime());
    const secret = newSecret();
    const record = await enrollmentStore.insertEnrollmentToken(tx, {
      id,
      secretHash: sha256(secret),
      location: request.location,
      nodeName: request.nodeName,
      maxUses: request.maxUses,
      reenrollsNodeId,
      creatorId: request.creatorId,
      createTime: now,
      expireTime: new Date(now.getTime() + request.lifetimeMs),
    });
    return { record, token: formatEnrollmentToken({ caDigestHex: authority.digestHex, id, secret }) };
  }

  #assertAllowed(location: NodeLocation): void {
    if (isCountryAllowed(location.country, this.#options.allowedCountries)) return;
    throw new DomainError(
      ErrorReason.LOCATION_NOT_ALLOWED,
      `nodes may not stand in ${location.country}: allowed are ${this.#options.allowedCountries.join(", ")}`,
      {
        fields: [
          { field: "location.country", rule: "allowed-jurisdiction", message: "must be one of the allowed countries" },
        ],
      },
    );
  }
}

/** @throws DomainError RATE_LIMITED where the node was issued as many certificates as it may have for now. */
async function assertMayIssue(tx: SystemTx, nodeId: NodeId, lifetimeMs: number, now: Date): Promise<void> {
  const windowMs = Math.min(issueWindowMs, 2 * lifetimeMs);
  const after = new Date(now.getTime() - windowMs);
  const oldest = await enrollmentStore.readNthIssueTime(tx, nodeId, after, maxCertificatesPerHour - 1);
  if (oldest === undefined) return;
  const retryAfterMs = oldest.getTime() + windowMs - now.getTime();
  throw new DomainError(ErrorReason.RATE_LIMITED, "the node asks for certificates too often: it has new ones already", {
    retryAfterMs,
  });
}
