// All SQL of dispatch. Works as clodei_system: a node belongs to no organization, and its reports to many.
import type { InstanceId, NodeId, OrganizationId } from "@clodei/proto/ids";
import { idArray, type SystemTx } from "../platform/database.ts";
import type { SessionRecord } from "./model.ts";

/** A node's session, with who holds it and what it is being asked. */
export type SessionRow = SessionRecord & {
  readonly nodeId: NodeId;
  readonly replicaId: string;
  /** "host:port" by which other replicas reach that process, where they may ask it. */
  readonly replicaEndpoint: string | undefined;
  readonly probe: ProbeRow | undefined;
  /** The boot whose containers were compared with the instances last. */
  readonly reconciledBootId: string | undefined;
};

/** A question whether the holder of a session is there. */
export type ProbeRow = { readonly nonce: Buffer; readonly time: Date; readonly replyTime: Date | undefined };

/** A session that takes the node's place. */
export type NewSession = {
  readonly nodeId: NodeId;
  readonly sessionId: string;
  readonly replicaId: string;
  readonly replicaEndpoint: string | undefined;
  readonly secretHash: Buffer;
  readonly previousSecretHash: Buffer;
  readonly time: Date;
};

type RawSession = {
  readonly node_id: NodeId;
  readonly session_id: string;
  readonly replica_id: string;
  readonly replica_endpoint: string | null;
  readonly secret_hash: Buffer;
  readonly previous_secret_hash: Buffer | null;
  readonly heartbeat_time: Date;
  readonly end_time: Date | null;
  readonly probe_nonce: Buffer | null;
  readonly probe_time: Date | null;
  readonly probe_reply_time: Date | null;
  readonly reconciled_boot_id: string | null;
};

const sessionColumns = `node_id, session_id, replica_id, replica_endpoint, secret_hash, previous_secret_hash, heartbeat_time, end_time,
  probe_nonce, probe_time, probe_reply_time, reconciled_boot_id`;

function toSession(row: RawSession): SessionRow {
  return {
    nodeId: row.node_id,
    sessionId: row.session_id,
    replicaId: row.replica_id,
    replicaEndpoint: row.replica_endpoint ?? undefined,
    secretHash: row.secret_hash,
    previousSecretHash: row.previous_secret_hash ?? undefined,
    heartbeatTime: row.heartbeat_time,
    endTime: row.end_time ?? undefined,
    reconciledBootId: row.reconciled_boot_id ?? undefined,
    probe:
      row.probe_nonce === null || row.probe_time === null
        ? undefined
        : { nonce: row.probe_nonce, time: row.probe_time, replyTime: row.probe_reply_time ?? undefined },
  };
}

/** Lets one Hello of a node decide at a time, in all replicas, until the transaction ends. */
export async function lockNodeSession(tx: SystemTx, nodeId: NodeId): Promise<void> {
  await tx.execute("select pg_advisory_xact_lock(hashtextextended('node_session:' || $1, 0))", [nodeId]);
}

/** The sessions of these nodes. */
export async function readSessions(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<SessionRow[]> {
  const rows = await tx.query<RawSession>(`select ${sessionColumns} from node_sessions where node_id = any($1)`, [
    nodeIds,
  ]);
  return rows.map(toSession);
}

/**
 * Of sessions that a process holds, those about which there is something to do: another one took the node (or there is
 * none, which is undefined), it was ended, or it is being asked for. Asked for all of them every second: what is in order
 * is not in the answer.
 */
export async function readUnsettledSessions(
  tx: SystemTx,
  held: readonly HeldSession[],
): Promise<ReadonlyMap<NodeId, SessionRow | undefined>> {
  const nodes = await tx.query<{ node_id: NodeId }>(
    `select held.node_id from unnest($1::text[], $2::text[]) as held(node_id, session_id)
     left join node_sessions s on s.node_id = held.node_id
     where s.session_id is distinct from held.session_id or s.end_time is not null
       or (s.probe_nonce is not null and s.probe_reply_time is null)`,
    arraysOf(held),
  );
  const nodeIds = nodes.map((row) => row.node_id);
  const rows = nodeIds.length === 0 ? [] : await readSessions(tx, nodeIds);
  const found = new Map(rows.map((row) => [row.nodeId, row]));
  return new Map(nodeIds.map((nodeId) => [nodeId, found.get(nodeId)]));
}

/** Makes a session the node's, in place of the one before. */
export async function replaceSession(tx: SystemTx, session: NewSession): Promise<void> {
  await tx.execute(
    `insert into node_sessions
       (node_id, session_id, replica_id, replica_endpoint, secret_hash, previous_secret_hash, begin_time, heartbeat_time)
     values ($1, $2, $3, $4, $5, $6, $7, $7)
     on conflict (node_id) do update set
       session_id = excluded.session_id, replica_id = excluded.replica_id,
       replica_endpoint = excluded.replica_endpoint, secret_hash = excluded.secret_hash,
       previous_secret_hash = excluded.previous_secret_hash, begin_time = excluded.begin_time,
       heartbeat_time = excluded.heartbeat_time, end_time = null, probe_nonce = null, probe_time = null,
       probe_reply_time = null`,
    [
      session.nodeId,
      session.sessionId,
      session.replicaId,
      session.replicaEndpoint ?? null,
      session.secretHash,
      session.previousSecretHash,
      session.time,
    ],
  );
}

/** A session, and the node whose it is or was. */
type HeldSession = { readonly nodeId: NodeId; readonly id: string };

/** Locks those of the sessions that are their nodes' and stand: in one order, or two replicas could wait for each other. */
const lockStanding = `select s.node_id, s.session_id from node_sessions s
  join unnest($1::text[], $2::text[]) as b(node_id, session_id) using (node_id, session_id)
  where s.end_time is null order by s.node_id for update of s`;

function arraysOf(sessions: readonly HeldSession[]): [string, string] {
  return [idArray(sessions.map(({ nodeId }) => nodeId)), idArray(sessions.map(({ id }) => id))];
}

/**
 * Notes heartbeats. What the agent showed at the session's begin is no longer good: the session's own secret arrived.
 *
 * @returns the sessions that are still their nodes'; the others were replaced, and speak for nobody.
 */
export async function recordSessionHeartbeats(
  tx: SystemTx,
  sessions: readonly HeldSession[],
  time: Date,
): Promise<ReadonlySet<string>> {
  const rows = await tx.query<{ session_id: string }>(
    `with beating as (${lockStanding})
     update node_sessions s set heartbeat_time = $3, previous_secret_hash = null
     from beating where s.node_id = beating.node_id
     returning s.session_id`,
    [...arraysOf(sessions), time],
  );
  return new Set(rows.map((row) => row.session_id));
}

/** Locks those of the sessions that are their nodes' and stand. Returns their ids. */
export async function lockStandingSessions(
  tx: SystemTx,
  sessions: readonly HeldSession[],
): Promise<ReadonlySet<string>> {
  const rows = await tx.query<{ session_id: string }>(lockStanding, arraysOf(sessions));
  return new Set(rows.map((row) => row.session_id));
}

/** Asks the holder of a session whether it is there. */
export async function askProbe(
  tx: SystemTx,
  nodeId: NodeId,
  sessionId: string,
  nonce: Buffer,
  time: Date,
): Promise<void> {
  await tx.execute(
    `update node_sessions set probe_nonce = $3, probe_time = $4, probe_reply_time = null
     where node_id = $1 and session_id = $2`,
    [nodeId, sessionId, nonce, time],
  );
}

/** Notes the answer to a probe. Returns whether it was being asked. */
export async function answerProbe(
  tx: SystemTx,
  nodeId: NodeId,
  sessionId: string,
  nonce: Uint8Array,
  time: Date,
): Promise<boolean> {
  const changed = await tx.execute(
    `update node_sessions set probe_reply_time = $4
     where node_id = $1 and session_id = $2 and probe_nonce = $3 and probe_reply_time is null`,
    [nodeId, sessionId, nonce, time],
  );
  return changed > 0;
}

/** Notes that a session's stream is over. Does nothing to a newer session. Returns whether it was the node's. */
export async function endSession(tx: SystemTx, nodeId: NodeId, sessionId: string, time: Date): Promise<boolean> {
  const changed = await tx.execute(
    "update node_sessions set end_time = $3 where node_id = $1 and session_id = $2 and end_time is null",
    [nodeId, sessionId, time],
  );
  return changed > 0;
}

/** Ends whatever session a node has, in all replicas. */
export async function endAnySession(tx: SystemTx, nodeId: NodeId, time: Date): Promise<void> {
  await tx.execute("update node_sessions set end_time = $2 where node_id = $1 and end_time is null", [nodeId, time]);
}

/** Notes that a boot's containers were compared with the instances. */
export async function setReconciledBoot(tx: SystemTx, nodeId: NodeId, bootId: string): Promise<void> {
  await tx.execute("update node_sessions set reconciled_boot_id = $2 where node_id = $1", [nodeId, bootId]);
}

/** Up to where a journal is committed; 0 for one that is new. */
export async function readWatermark(tx: SystemTx, nodeId: NodeId, journalId: string): Promise<bigint> {
  const [row] = await tx.query<{ watermark: bigint }>(
    "select watermark from node_journals where node_id = $1 and journal_id = $2",
    [nodeId, journalId],
  );
  return row?.watermark ?? 0n;
}

/** The same, and keeps others from advancing it until the transaction ends. */
export async function lockWatermark(tx: SystemTx, nodeId: NodeId, journalId: string, time: Date): Promise<bigint> {
  const [row] = await tx.query<{ watermark: bigint }>(
    `insert into node_journals (node_id, journal_id, watermark, update_time) values ($1, $2, 0, $3)
     on conflict (node_id, journal_id) do update set update_time = excluded.update_time
     returning watermark`,
    [nodeId, journalId, time],
  );
  if (row === undefined) throw new Error("an upsert returned no row");
  return row.watermark;
}

/** Advances a journal. The caller holds its lock. */
export async function advanceWatermark(
  tx: SystemTx,
  nodeId: NodeId,
  journalId: string,
  watermark: bigint,
  time: Date,
): Promise<void> {
  await tx.execute("update node_journals set watermark = $3, update_time = $4 where node_id = $1 and journal_id = $2", [
    nodeId,
    journalId,
    watermark,
    time,
  ]);
}

/** Forgets a node's oldest journals beyond so many. A forgotten one's intervals stay, so a replay still adds nothing. */
export async function pruneJournals(tx: SystemTx, nodeId: NodeId, keep: number): Promise<void> {
  await tx.execute(
    `delete from node_journals where node_id = $1 and journal_id not in (
       select journal_id from node_journals where node_id = $1 order by update_time desc, journal_id limit $2)`,
    [nodeId, keep],
  );
}

/** An interval that is added to the record. */
export type UsageRow = {
  readonly nodeId: NodeId;
  readonly journalId: string;
  readonly sequence: bigint;
  readonly organizationId: OrganizationId;
  readonly instanceId: InstanceId;
  readonly attempt: number;
  readonly bootId: string;
  readonly beginMonotonicMs: bigint;
  readonly endMonotonicMs: bigint;
  readonly beginTime: Date | undefined;
};

/** Adds intervals. One that is there already stays as it is. */
export async function insertUsageIntervals(tx: SystemTx, rows: readonly UsageRow[], time: Date): Promise<void> {
  const column = <K extends keyof UsageRow>(key: K): UsageRow[K][] => rows.map((row) => row[key]);
  await tx.execute(
    `insert into usage_intervals (node_id, journal_id, sequence, organization_id, instance_id, attempt, boot_id,
       begin_monotonic_ms, end_monotonic_ms, begin_time, receive_time)
     select node_id, journal_id, sequence, organization_id, instance_id, attempt, boot_id, begin_ms, end_ms, begin_time, $11
     from unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::integer[], $7::text[],
       $8::bigint[], $9::bigint[], $10::timestamptz[])
       as t(node_id, journal_id, sequence, organization_id, instance_id, attempt, boot_id, begin_ms, end_ms, begin_time)
     on conflict (node_id, journal_id, sequence) do nothing`,
    [
      column("nodeId"),
      column("journalId"),
      column("sequence"),
      column("organizationId"),
      column("instanceId"),
      column("attempt"),
      column("bootId"),
      column("beginMonotonicMs"),
      column("endMonotonicMs"),
      rows.map(({ beginTime }) => beginTime ?? null),
      time,
    ],
  );
}
