// The feed behind watches. A reader's position is a snapshot of PostgreSQL: the set of transactions that it has
// seen. Its next batch is what a new snapshot shows and the old one did not. So a transaction that drew its
// numbers early and commits late is not skipped, and nothing comes twice. Changes of one subject come in order,
// because writers of a subject follow each other under its row lock.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { OrganizationId } from "@clodei/proto/ids";
import { decodeCursor, encodeCursor, type Position } from "./change-cursor.ts";
import type { Database, SystemTx, TenantTx, Tx } from "./database.ts";
import { DomainError } from "./errors.ts";

/** What a feed is about. */
export type ChangeKind = "instance" | "node";

/** A change to record. */
export type NewChange = {
  /** Whose it is. Undefined: the fleet's own. */
  readonly organizationId: OrganizationId | undefined;
  readonly kind: ChangeKind;
  readonly subjectId: string;
  /** What readers need of the object as it was after the change, and cannot read elsewhere. */
  readonly payload: Uint8Array;
};

/** A change as it was recorded. */
export type Change = {
  readonly revision: bigint;
  readonly organizationId: string;
  readonly subjectId: string;
  readonly payload: Buffer;
  /** When the change was recorded, by the database's clock. */
  readonly createTime: Date;
  /** Resumes after this change. */
  readonly cursor: string;
};

/** A batch of changes. */
export type ChangeBatch = {
  readonly changes: readonly Change[];
  /** Resumes after the batch. */
  readonly cursor: string;
  /** There is more already: read again without waiting. */
  readonly more: boolean;
};

/** How long a change is kept, and how many a feed keeps. */
export const changeRetentionMs = 24 * 60 * 60 * 1_000;
export const maxChangesPerFeed = 100_000;
/** A statement must end well before its time is over. */
const maxPrunedAtOnce = 20_000;
/** The most that one read returns: so many changes, and no further one after so many bytes. */
const maxBatch = 1_000;
const maxBatchBytes = 1024 * 1024;

/** Records a change, in the transaction that makes it and after the row that it is about was written. */
export async function recordChange(tx: TenantTx | SystemTx, change: NewChange): Promise<void> {
  await tx.execute("insert into changes (organization_id, kind, subject_id, payload) values ($1, $2, $3, $4)", [
    change.organizationId ?? "",
    change.kind,
    change.subjectId,
    change.payload,
  ]);
}

/**
 * The position of the transaction's own snapshot. Take it in a "repeatable read" transaction together with the
 * objects: what the objects do not show comes as a change, and nothing else.
 */
export async function currentCursor(tx: Tx): Promise<string> {
  const [row] = await tx.query<{ database_id: string; snapshot: string }>(
    "select id as database_id, pg_current_snapshot()::text as snapshot from database_identity",
  );
  if (row === undefined) throw new Error("the database has no identity");
  return encodeCursor({ databaseId: row.database_id, from: row.snapshot, to: undefined, revision: 0n });
}

/**
 * Reads the changes of one feed after a cursor: in a tenant's transaction the organization's, in a system
 * transaction the fleet's own.
 * @throws DomainError CURSOR_INVALID for one that is not of this database, CURSOR_EXPIRED for one that is too old.
 */
export async function readChanges(
  tx: TenantTx | SystemTx,
  kind: ChangeKind,
  cursor: string,
  limit: number,
): Promise<ChangeBatch> {
  const position = decodeCursor(cursor);
  if (position === undefined) throw cursorInvalid();
  const organizationId = "organizationId" in tx ? tx.organizationId : "";
  const wanted = Math.min(limit, maxBatch);
  const rows = await queryChanges(tx, { kind, organizationId, position, limit: wanted + 1 });
  const [first] = rows;
  if (first === undefined) throw new Error("the database has no identity");
  if (first.database_id !== position.databaseId) throw cursorInvalid();
  if (first.expired) {
    throw new DomainError(ErrorReason.CURSOR_EXPIRED, "the cursor is too old: start again without one");
  }
  const to = position.to ?? first.snapshot;
  const found = rows.flatMap((row) => (row.revision === null ? [] : [{ ...row, revision: row.revision }]));
  const changes = found.slice(0, wanted).map((row) => ({
    revision: row.revision,
    organizationId,
    subjectId: row.subject_id,
    payload: row.payload,
    createTime: row.create_time,
    cursor: encodeCursor({ ...position, to, revision: row.revision }),
  }));
  const last = changes.at(-1);
  if (Number(first.candidates ?? 0n) > changes.length && last !== undefined)
    return { changes, cursor: last.cursor, more: true };
  // The batch reaches up to its snapshot. If that was an earlier call's, newer changes may stand behind it.
  const end = encodeCursor({ databaseId: position.databaseId, from: to, to: undefined, revision: 0n });
  return { changes, cursor: end, more: position.to !== undefined };
}

/**
 * Deletes some of what is too old or too much, and remembers up to where.
 * @returns how many changes went. Call it again while there are any.
 */
export async function pruneChanges(
  database: Database,
  now: Date,
  limits: { readonly maxPerFeed?: number; readonly retentionMs?: number } = {},
): Promise<number> {
  const before = new Date(now.getTime() - (limits.retentionMs ?? changeRetentionMs));
  const [row] = await database.system((tx) =>
    tx.query<{ count: bigint }>(
      `with feeds as (
        select organization_id, kind from changes group by organization_id, kind having count(*) > $2
      ), bounds as (
        select organization_id, kind, (
          select revision from changes
          where changes.kind = feeds.kind and changes.organization_id = feeds.organization_id
          order by revision desc offset $2 limit 1
        ) as revision from feeds
      ), excess as (
        select changes.revision from changes join bounds using (organization_id, kind)
        where changes.revision <= bounds.revision order by changes.revision limit $3
      ), old as (
        select revision from changes where create_time < $1 order by create_time limit $3
      ), pruned as (
        delete from changes where revision in (select revision from old union select revision from excess)
        returning organization_id, kind, xid
      ), horizons as (
        insert into change_horizons (organization_id, kind, pruned_xid)
        select organization_id, kind, max(xid) from pruned group by organization_id, kind
        on conflict (organization_id, kind) do update
        set pruned_xid = greatest(change_horizons.pruned_xid, excluded.pruned_xid)
      )
      select count(*) as count from pruned`,
      [before, limits.maxPerFeed ?? maxChangesPerFeed, maxPrunedAtOnce],
    ),
  );
  return Number(row?.count ?? 0n);
}

type ChangeRow = {
  readonly database_id: string;
  readonly snapshot: string;
  readonly expired: boolean;
  /** How many changes there were to read, at most one more than were asked for. */
  readonly candidates: bigint | null;
  readonly revision: bigint | null;
  readonly subject_id: string;
  readonly payload: Buffer;
  readonly create_time: Date;
};

/** One statement, so that rows, snapshot and horizon are of one moment. At least one row: the identity's. */
async function queryChanges(
  tx: Tx,
  query: { kind: ChangeKind; organizationId: string; position: Position; limit: number },
): Promise<ChangeRow[]> {
  const { position } = query;
  return tx.query<ChangeRow>(
    `select identity.id as database_id, pg_current_snapshot()::text as snapshot,
      coalesce(horizon.pruned_xid >= pg_snapshot_xmin($3::pg_snapshot), false) as expired,
      change.candidates, change.revision, change.subject_id, change.payload, change.create_time
    from database_identity as identity
    left join change_horizons as horizon on horizon.kind = $1 and horizon.organization_id = $2
    left join lateral (
      select * from (
        select candidate.*, count(*) over () as candidates, sum(octet_length(payload)) over (
          order by revision rows between unbounded preceding and 1 preceding
        ) as bytes_before
        from (
          select revision, subject_id, payload, create_time from changes
          where kind = $1 and organization_id = $2
            -- The index finds the candidates, the snapshots decide.
            and xid >= pg_snapshot_xmin($3::pg_snapshot)
            and not pg_visible_in_snapshot(xid, $3::pg_snapshot)
            and ($4::pg_snapshot is null or pg_visible_in_snapshot(xid, $4::pg_snapshot))
            and revision > $5
          order by revision
          limit $6
        ) as candidate
      ) as counted
      -- A customer's objects can be megabytes each: the first always comes, and then only as many as are small.
      where coalesce(bytes_before, 0) < $7
    ) as change on true
    order by change.revision`,
    [
      query.kind,
      query.organizationId,
      position.from,
      position.to ?? null,
      position.revision,
      query.limit,
      maxBatchBytes,
    ],
  );
}

function cursorInvalid(): DomainError {
  return new DomainError(ErrorReason.CURSOR_INVALID, "the cursor is not one of this server's");
}
