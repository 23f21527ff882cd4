// All SQL about how nodes are let in: enrollment tokens, who used them, certificates, used challenges. Works as
// clodei_system, but for one question by which strangers are told apart before they cost anything.
import type { EnrollmentTokenId, NodeId } from "@clodei/proto/ids";
import { idArray, type SystemTx, type Tx } from "../platform/database.ts";
import type { EnrollmentTokenRecord, NodeLocation, NodeState } from "./model.ts";

type RawToken = {
  readonly id: EnrollmentTokenId;
  readonly country: string;
  readonly region: string;
  readonly datacenter: string;
  readonly tier: number;
  readonly node_name: string;
  readonly max_uses: number;
  readonly uses: number;
  readonly reenrolls_node_id: NodeId | null;
  readonly create_time: Date;
  readonly expire_time: Date;
  readonly revoke_time: Date | null;
};

const tokenColumns = `id, country, region, datacenter, tier, node_name, max_uses, uses, reenrolls_node_id, create_time,
  expire_time, revoke_time`;

function toToken(row: RawToken): EnrollmentTokenRecord {
  return {
    id: row.id,
    location: { country: row.country, region: row.region, datacenter: row.datacenter, tier: row.tier },
    nodeName: row.node_name,
    maxUses: row.max_uses,
    uses: row.uses,
    reenrollsNodeId: row.reenrolls_node_id ?? undefined,
    createTime: row.create_time,
    expireTime: row.expire_time,
    revokeTime: row.revoke_time ?? undefined,
  };
}

/** A token to be stored. */
export type NewEnrollmentToken = {
  readonly id: EnrollmentTokenId;
  readonly secretHash: Uint8Array;
  readonly location: NodeLocation;
  readonly nodeName: string;
  readonly maxUses: number;
  readonly reenrollsNodeId: NodeId | undefined;
  readonly creatorId: string;
  readonly createTime: Date;
  readonly expireTime: Date;
};

/** Stores a token, by its hash. */
export async function insertEnrollmentToken(tx: SystemTx, token: NewEnrollmentToken): Promise<EnrollmentTokenRecord> {
  const [row] = await tx.query<RawToken>(
    `insert into enrollment_tokens (id, secret_hash, country, region, datacenter, tier, node_name, max_uses,
       reenrolls_node_id, creator_id, create_time, expire_time)
     values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
     returning ${tokenColumns}`,
    [
      token.id,
      token.secretHash,
      token.location.country,
      token.location.region,
      token.location.datacenter,
      token.location.tier,
      token.nodeName,
      token.maxUses,
      token.reenrollsNodeId ?? null,
      token.creatorId,
      token.createTime,
      token.expireTime,
    ],
  );
  if (row === undefined) throw new Error("an insert returned no row");
  return toToken(row);
}

/** Whether a token with this hash was ever made. Answers without a tenant, by a definer function. */
export async function doesEnrollmentTokenExist(
  tx: Tx,
  id: EnrollmentTokenId,
  secretHash: Uint8Array,
): Promise<boolean> {
  const [row] = await tx.query<{ found: boolean }>("select enrollment_token_exists($1, $2) as found", [id, secretHash]);
  return row?.found ?? false;
}

/** The token with this id and hash, locked: of two enrollments that race for its last use, one comes second. */
export async function lockEnrollmentToken(
  tx: SystemTx,
  id: EnrollmentTokenId,
  secretHash: Uint8Array,
): Promise<EnrollmentTokenRecord | undefined> {
  const [row] = await tx.query<RawToken>(
    `select ${tokenColumns} from enrollment_tokens where id = $1 and secret_hash = $2 for update`,
    [id, secretHash],
  );
  return row === undefined ? undefined : toToken(row);
}

/** A page of tokens, the newest first, after an id. */
export async function listEnrollmentTokens(
  tx: SystemTx,
  afterId: string | undefined,
  limit: number,
): Promise<EnrollmentTokenRecord[]> {
  const rows = await tx.query<RawToken>(
    `select ${tokenColumns} from enrollment_tokens where $1::text is null or id < $1 order by id desc limit $2`,
    [afterId ?? null, limit],
  );
  return rows.map(toToken);
}

/** Revokes a token. One that was revoked before keeps its time. */
export async function revokeEnrollmentToken(
  tx: SystemTx,
  id: EnrollmentTokenId,
  now: Date,
): Promise<EnrollmentTokenRecord | undefined> {
  const [row] = await tx.query<RawToken>(
    `update enrollment_tokens set revoke_time = coalesce(revoke_time, $2) where id = $1 returning ${tokenColumns}`,
    [id, now],
  );
  return row === undefined ? undefined : toToken(row);
}

/** Revokes whatever tokens would still enroll this node again. */
export async function revokeReenrollmentTokens(tx: SystemTx, nodeId: NodeId, now: Date): Promise<void> {
  await tx.execute(
    "update enrollment_tokens set revoke_time = $2 where reenrolls_node_id = $1 and revoke_time is null",
    [nodeId, now],
  );
}

/** An enrollment that was made with a token. */
export type EnrollmentRecord = { readonly nodeId: NodeId; readonly enrollmentEpoch: number };

/** What this key was enrolled as with this token. */
export async function readEnrollment(
  tx: SystemTx,
  tokenId: EnrollmentTokenId,
  publicKeyHash: Uint8Array,
): Promise<EnrollmentRecord | undefined> {
  const [row] = await tx.query<{ node_id: NodeId; enrollment_epoch: number }>(
    "select node_id, enrollment_epoch from enrollments where enrollment_token_id = $1 and public_key_hash = $2",
    [tokenId, publicKeyHash],
  );
  return row === undefined ? undefined : { nodeId: row.node_id, enrollmentEpoch: row.enrollment_epoch };
}

/** Notes an enrollment and takes one use of the token, which the caller has locked. */
export async function insertEnrollment(
  tx: SystemTx,
  tokenId: EnrollmentTokenId,
  publicKeyHash: Uint8Array,
  enrollment: EnrollmentRecord,
): Promise<void> {
  await tx.execute("update enrollment_tokens set uses = uses + 1 where id = $1", [tokenId]);
  await tx.execute(
    `insert into enrollments (enrollment_token_id, public_key_hash, node_id, enrollment_epoch) values ($1, $2, $3, $4)`,
    [tokenId, publicKeyHash, enrollment.nodeId, enrollment.enrollmentEpoch],
  );
}

/** A certificate as it is stored. */
export type CertificateRecord = {
  readonly serial: string;
  readonly nodeId: NodeId;
  readonly nodeState: NodeState;
  readonly state: "active" | "superseded" | "ended";
  readonly expireTime: Date;
  readonly firstUseTime: Date | undefined;
};

/** A certificate and the state of the node that it names. */
export async function readCertificate(tx: SystemTx, serial: string): Promise<CertificateRecord | undefined> {
  const [record] = await readCertificates(tx, [serial]);
  return record;
}

/** Certificates by serial, in no order. */
export async function readCertificates(tx: SystemTx, serials: readonly string[]): Promise<CertificateRecord[]> {
  const rows = await tx.query<{
    serial: string;
    node_id: NodeId;
    node_state: NodeState;
    state: CertificateRecord["state"];
    expire_time: Date;
    first_use_time: Date | null;
  }>(
    `select c.serial, c.node_id, n.state as node_state, c.state, c.expire_time, c.first_use_time
     from node_certificates c join nodes n on n.id = c.node_id
     where c.serial = any($1)`,
    [serials],
  );
  return rows.map((row) => ({
    serial: row.serial,
    nodeId: row.node_id,
    nodeState: row.node_state,
    state: row.state,
    expireTime: row.expire_time,
    firstUseTime: row.first_use_time ?? undefined,
  }));
}

/**
 * Of these certificates, those that are not good any more, or that there are not. Asked for thousands of sessions every
 * second: an answer that names the few that changed costs a twentieth of one that describes them all.
 */
export async function readEndedCertificates(tx: SystemTx, serials: readonly string[]): Promise<string[]> {
  const rows = await tx.query<{ serial: string }>(
    `select known.serial from unnest($1::text[]) as known(serial)
     left join node_certificates c on c.serial = known.serial
     left join nodes n on n.id = c.node_id
     where (c.state = 'active' and n.state not in ('revoked', 'quarantined')) is not true`,
    [idArray(serials)],
  );
  return rows.map(({ serial }) => serial);
}

/** Stores what is known of a certificate that is about to be handed out. */
export async function insertCertificate(
  tx: SystemTx,
  certificate: {
    readonly serial: string;
    readonly nodeId: NodeId;
    readonly publicKeyHash: Uint8Array;
    readonly der: Uint8Array;
    readonly createTime: Date;
    readonly expireTime: Date;
  },
): Promise<void> {
  const { serial, nodeId, publicKeyHash, der, createTime, expireTime } = certificate;
  await tx.execute(
    `insert into node_certificates (serial, node_id, public_key_hash, certificate, state, create_time, expire_time)
     values ($1, $2, $3, $4, 'active', $5, $6)`,
    [serial, nodeId, publicKeyHash, der, createTime, expireTime],
  );
}

/** The newest certificate for a key, in DER, where it was issued after a time and never used. */
export async function readUnusedCertificate(
  tx: SystemTx,
  nodeId: NodeId,
  publicKeyHash: Uint8Array,
  issuedAfter: Date,
): Promise<{ readonly der: Uint8Array; readonly expireTime: Date } | undefined> {
  const [row] = await tx.query<{ certificate: Buffer; expire_time: Date }>(
    `select certificate, expire_time from node_certificates
     where node_id = $1 and public_key_hash = $2 and state = 'active' and first_use_time is null
       and certificate is not null and create_time > $3
     order by issue_order desc limit 1`,
    [nodeId, publicKeyHash, issuedAfter],
  );
  return row && { der: row.certificate, expireTime: row.expire_time };
}

/**
 * When the certificate was issued that has so many newer ones, of those that were issued to a node after a time.
 * An operator's decision to enroll the node again starts anew.
 */
export async function readNthIssueTime(
  tx: SystemTx,
  nodeId: NodeId,
  issuedAfter: Date,
  newer: number,
): Promise<Date | undefined> {
  const [row] = await tx.query<{ create_time: Date }>(
    `select create_time from node_certificates
     where node_id = $1 and state <> 'ended' and create_time > $2
     order by issue_order desc offset $3 limit 1`,
    [nodeId, issuedAfter, newer],
  );
  return row?.create_time;
}

/** Ends the oldest certificates that were handed out and never used, beyond so many. */
export async function supersedeUnused(tx: SystemTx, nodeId: NodeId, keep: number): Promise<void> {
  await tx.execute(
    `update node_certificates set state = 'superseded', certificate = null
     where serial in (
       select serial from node_certificates
       where node_id = $1 and state = 'active' and first_use_time is null
       order by issue_order desc offset $2
     )`,
    [nodeId, keep],
  );
}

/** Notes the first use of a certificate and supersedes the older ones of its node. @returns whether it was the first. */
export async function markCertificateUsed(tx: SystemTx, serial: string, now: Date): Promise<boolean> {
  const used = await tx.query<{ node_id: NodeId; issue_order: bigint }>(
    `update node_certificates set first_use_time = $2, certificate = null
     where serial = $1 and state = 'active' and first_use_time is null
     returning node_id, issue_order`,
    [serial, now],
  );
  const [row] = used;
  if (row === undefined) return false;
  await tx.execute(
    `update node_certificates set state = 'superseded', certificate = null
     where node_id = $1 and issue_order < $2 and state = 'active'`,
    [row.node_id, row.issue_order],
  );
  return true;
}

/** Ends every certificate of a node. */
export async function endCertificates(tx: SystemTx, nodeId: NodeId): Promise<void> {
  await tx.execute(
    "update node_certificates set state = 'ended', certificate = null where node_id = $1 and state <> 'ended'",
    [nodeId],
  );
}

/** Whether a node has used a certificate for another key since this key was first certified for it. */
export async function wasKeyReplaced(tx: SystemTx, nodeId: NodeId, publicKeyHash: Uint8Array): Promise<boolean> {
  const rows = await tx.query(
    `select 1 from node_certificates c
     where c.node_id = $1 and c.public_key_hash <> $2 and c.first_use_time is not null
       and c.issue_order > (
         select min(own.issue_order) from node_certificates own where own.node_id = $1 and own.public_key_hash = $2
       )
     limit 1`,
    [nodeId, publicKeyHash],
  );
  return rows.length > 0;
}

/** Notes that a challenge was used. @returns false where it was used before. */
export async function useChallenge(tx: SystemTx, challengeHash: Uint8Array, expireTime: Date): Promise<boolean> {
  const inserted = await tx.execute(
    "insert into used_renewal_challenges (challenge_hash, expire_time) values ($1, $2) on conflict do nothing",
    [challengeHash, expireTime],
  );
  return inserted === 1;
}

/** Forgets challenges that are too old to be used again. */
export async function pruneChallenges(tx: SystemTx, before: Date): Promise<void> {
  await tx.execute("delete from used_renewal_challenges where expire_time < $1", [before]);
}
