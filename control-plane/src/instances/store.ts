// Rows of instances and their events. A change is written under the row's lock, guarded by its version.
import type { InstanceId, NodeId, OrganizationId } from "@clodei/proto/ids";
import type { SystemTx, TenantTx, Tx } from "../platform/database.ts";
import type { LocationConstraint } from "../placement/service.ts";
import type { Instance, Reason, State } from "./model.ts";
import { fromRow, instanceColumns, instanceIdOf, nodeIdOf, type InstanceRow, organizationIdOf, toRow } from "./rows.ts";
import type { EventDraft } from "./attempts.ts";
import type { Actor, InstanceEvent } from "./wire.ts";

/** Which instances are meant. */
export type InstanceFilter = {
  /** Empty: any. */
  readonly states: readonly State[];
  readonly labels: Readonly<Record<string, string>>;
  /** Empty: any. */
  readonly gpuModel: string;
  readonly location: LocationConstraint;
  readonly showDeleted: boolean;
};

/** What a tenant's login may change of a row, in the order of updateRow's parameters. */
const tenantColumns = [
  "update_time",
  "version",
  "event_count",
  "attempt",
  "restart_count",
  "state",
  "reason",
  "message",
  "queue_time",
  "placement_deadline",
  "not_before_time",
  "pull_bytes_done",
  "pull_bytes_total",
  "stop_then",
  "attempt_ended",
  "delete_time",
  "start_time",
  "finish_time",
  "exit_code",
] as const satisfies readonly (keyof InstanceRow)[];

const systemColumns = [
  ...tenantColumns,
  "image_digest",
  "image_id",
  "isolation",
  "node_id",
  "placed_attempt",
  "node_lost",
  "node_reachable",
  "country",
  "region",
  "datacenter",
  "tier",
  "gpus",
] as const satisfies readonly (keyof InstanceRow)[];

const tenantUpdate = updateStatement(tenantColumns);
const systemUpdate = updateStatement(systemColumns);

/** Writes a new instance. */
export async function insertInstance(tx: TenantTx, instance: Instance): Promise<void> {
  const row = toRow(instance);
  await tx.execute(
    `insert into instances (id, organization_id, spec, labels, gpu_model, created_by, create_time, update_time, version,
       event_count, attempt, restart_count, state, reason, message, queue_time, placement_deadline)
     values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)`,
    [
      row.id,
      row.organization_id,
      row.spec,
      JSON.stringify(instance.spec.labels),
      instance.spec.gpu?.model ?? "",
      row.created_by,
      row.create_time,
      row.update_time,
      row.version,
      row.event_count,
      row.attempt,
      row.restart_count,
      row.state,
      row.reason,
      row.message,
      row.queue_time,
      row.placement_deadline,
    ],
  );
}

/** Writes what changed, if the row still has the version that was read. */
export async function updateInstance(tx: TenantTx | SystemTx, next: Instance, versionBefore: bigint): Promise<void> {
  const row = toRow(next);
  const columns = "system" in tx ? systemColumns : tenantColumns;
  const values = columns.map((column) => toParameter(row[column]));
  const updated = await tx.execute("system" in tx ? systemUpdate : tenantUpdate, [row.id, versionBefore, ...values]);
  if (updated !== 1) throw new Error(`instance ${row.id} changed while its row was locked`);
}

/** Adds events. */
export async function insertEvents(
  tx: Tx,
  instance: Pick<Instance, "id" | "organizationId">,
  firstSequence: bigint,
  events: readonly EventDraft[],
  actor: Actor,
  now: Date,
): Promise<void> {
  for (const [index, event] of events.entries()) {
    await tx.execute(
      `insert into instance_events (instance_id, sequence, organization_id, event_time, actor_kind, actor_id, attempt,
         state, reason, message) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`,
      [
        instance.id,
        firstSequence + BigInt(index),
        instance.organizationId,
        now,
        actor.kind,
        actor.id,
        event.attempt,
        event.state,
        event.reason,
        event.message,
      ],
    );
  }
}

/** One instance. */
export async function selectInstance(tx: Tx, id: InstanceId): Promise<Instance | undefined> {
  const [row] = await tx.query<InstanceRow>(`select ${instanceColumns} from instances where id = $1`, [id]);
  return row && fromRow(row);
}

/** One instance, locked until the transaction ends. */
export async function lockInstance(tx: Tx, id: InstanceId): Promise<Instance | undefined> {
  const [row] = await tx.query<InstanceRow>(`select ${instanceColumns} from instances where id = $1 for update`, [id]);
  return row && fromRow(row);
}

/** Several instances, locked in the order of their ids, so that two who lock the same ones never wait in a circle. */
export async function lockInstances(tx: SystemTx, ids: readonly InstanceId[]): Promise<Instance[]> {
  const rows = await tx.query<InstanceRow>(
    `select ${instanceColumns} from instances where id = any ($1) order by id for update`,
    [ids],
  );
  return rows.map(fromRow);
}

/** A page of instances. */
export type InstancePage = {
  readonly instances: readonly Instance[];
  /** Whether there are more after it. */
  readonly more: boolean;
};

/** A page has no further instance after so many bytes of specifications, each of which can have 1 MiB. */
const maxPageBytes = 4 * 1024 * 1024;

/** A page, the newest first, before an id. It can have fewer than asked for, and yet more can follow. */
export async function selectInstances(
  tx: TenantTx,
  filter: InstanceFilter,
  beforeId: string | undefined,
  limit: number,
): Promise<InstancePage> {
  const { country, region, datacenter } = filter.location;
  const rows = await tx.query<InstanceRow & { readonly candidates: bigint }>(
    `select ${instanceColumns}, candidates from (
       select candidate.*, count(*) over () as candidates, sum(octet_length(spec)) over (
         order by id desc rows between unbounded preceding and 1 preceding
       ) as bytes_before
       from (
         select ${instanceColumns} from instances
         where organization_id = $1
           and ($2::text is null or id < $2)
           and (cardinality($3::text[]) = 0 or state = any ($3))
           and (state <> 'DELETED' or $4 or 'DELETED' = any ($3))
           and labels @> $5
           and ($6 = '' or gpu_model = $6)
           and ($7::text is null or country = $7)
           and ($8::text is null or region = $8)
           and ($9::text is null or datacenter = $9)
         order by id desc limit $10::bigint + 1
       ) as candidate
     ) as counted
     where coalesce(bytes_before, 0) < $11
     order by id desc limit $10`,
    [
      tx.organizationId,
      beforeId ?? null,
      filter.states,
      filter.showDeleted,
      JSON.stringify(filter.labels),
      filter.gpuModel,
      country ?? null,
      region ?? null,
      datacenter ?? null,
      limit,
      maxPageBytes,
    ],
  );
  return { instances: rows.map(fromRow), more: Number(rows[0]?.candidates ?? 0n) > rows.length };
}

/** A page of an instance's events, the oldest first. */
export async function selectEvents(
  tx: TenantTx,
  id: InstanceId,
  afterSequence: bigint,
  limit: number,
): Promise<InstanceEvent[]> {
  const rows = await tx.query<{
    sequence: bigint;
    event_time: Date;
    actor_kind: Actor["kind"];
    actor_id: string;
    attempt: number;
    state: State;
    reason: Reason;
    message: string;
  }>(
    `select sequence, event_time, actor_kind, actor_id, attempt, state, reason, message from instance_events
     where instance_id = $1 and sequence > $2 order by sequence limit $3`,
    [id, afterSequence, limit],
  );
  return rows.map((row) => ({
    sequence: row.sequence,
    time: row.event_time,
    actor: { kind: row.actor_kind, id: row.actor_id },
    attempt: row.attempt,
    state: row.state,
    reason: row.reason,
    message: row.message,
  }));
}

/** Instances that wait for capacity, the first come first, after one of them. */
export async function selectPending(
  tx: SystemTx,
  after: { readonly queueTime: Date; readonly id: InstanceId } | undefined,
  limit: number,
): Promise<Instance[]> {
  const rows = await tx.query<InstanceRow>(
    `select ${instanceColumns} from instances
     where state = 'PENDING' and ($1::timestamptz is null or (queue_time, id) > ($1, $2))
     order by queue_time, id limit $3`,
    [after?.queueTime ?? null, after?.id ?? "", limit],
  );
  return rows.map(fromRow);
}

/** How many instances of the organization wait for capacity. */
export async function countPending(tx: TenantTx): Promise<number> {
  const [row] = await tx.query<{ count: bigint }>(
    "select count(*) as count from instances where organization_id = $1 and state = 'PENDING'",
    [tx.organizationId],
  );
  return Number(row?.count ?? 0n);
}

/** How many bytes the specifications of the organization's instances take that are not deleted. */
export async function sumSpecBytes(tx: TenantTx): Promise<number> {
  const [row] = await tx.query<{ bytes: bigint }>(
    `select coalesce(sum(octet_length(spec)), 0)::bigint as bytes from instances
     where organization_id = $1 and state <> 'DELETED'`,
    [tx.organizationId],
  );
  return Number(row?.bytes ?? 0n);
}

/** Instances that waited for too long. */
export async function selectExpired(tx: SystemTx, now: Date, limit: number): Promise<InstanceId[]> {
  const rows = await tx.query<{ id: string }>(
    "select id from instances where state = 'PENDING' and placement_deadline <= $1 order by id limit $2",
    [now, limit],
  );
  return rows.map((row) => instanceIdOf(row.id));
}

/** Nodes that hold something of an instance, and what their instances say of them. */
export async function selectNodesInUse(
  tx: SystemTx,
): Promise<{ nodeId: NodeId; instances: number; hasReachable: boolean; hasUnreachable: boolean }[]> {
  const rows = await tx.query<{
    node_id: string;
    instances: bigint;
    has_reachable: boolean;
    has_unreachable: boolean;
  }>(
    `select node_id, count(*) as instances, bool_or(node_reachable) as has_reachable,
       bool_or(not node_reachable) as has_unreachable
     from instances where state <> 'DELETED' and node_id is not null and not node_lost group by node_id`,
  );
  return rows.map((row) => ({
    nodeId: nodeIdOf(row.node_id),
    instances: Number(row.instances),
    hasReachable: row.has_reachable,
    hasUnreachable: row.has_unreachable,
  }));
}

/** Instances with something on a node that isn't lost; of those that say this of it, if it is given. */
export async function selectOnNode(
  tx: SystemTx,
  nodeId: NodeId,
  reachable: boolean | undefined,
  limit: number,
): Promise<InstanceId[]> {
  const rows = await tx.query<{ id: string }>(
    `select id from instances
     where node_id = $1 and state <> 'DELETED' and not node_lost and ($2::boolean is null or node_reachable = $2)
     order by id limit $3`,
    [nodeId, reachable ?? null, limit],
  );
  return rows.map((row) => instanceIdOf(row.id));
}

/** Instances of which a node shall have something, or shall get rid of it. */
export async function selectDesired(tx: SystemTx, nodeId: NodeId, limit: number): Promise<Instance[]> {
  const rows = await tx.query<InstanceRow>(
    `select ${instanceColumns} from instances
     where node_id = $1 and state <> 'DELETED' and not node_lost order by id limit $2`,
    [nodeId, limit],
  );
  return rows.map(fromRow);
}

/** Instances that run on a node, as far as is known. */
export async function selectRunning(tx: SystemTx, nodeId: NodeId): Promise<{ id: InstanceId; attempt: number }[]> {
  const rows = await tx.query<{ id: string; attempt: number }>(
    "select id, attempt from instances where node_id = $1 and state = 'RUNNING' and not node_lost order by id",
    [nodeId],
  );
  return rows.map((row) => ({ id: instanceIdOf(row.id), attempt: row.attempt }));
}

/** Whose instances are, and up to which attempt they were on a node. */
export async function selectOwners(
  tx: SystemTx,
  nodeId: NodeId,
  ids: readonly InstanceId[],
): Promise<{ id: InstanceId; organizationId: OrganizationId; lastAttempt: number }[]> {
  const rows = await tx.query<{ id: string; organization_id: string; placed_attempt: number }>(
    "select id, organization_id, placed_attempt from instances where node_id = $1 and id = any ($2)",
    [nodeId, ids],
  );
  return rows.map((row) => ({
    id: instanceIdOf(row.id),
    organizationId: organizationIdOf(row.organization_id),
    lastAttempt: row.placed_attempt,
  }));
}

/** Removes instances that were deleted before a time, and their events. @returns how many. */
export async function purgeDeleted(tx: SystemTx, before: Date, limit: number): Promise<number> {
  const [row] = await tx.query<{ count: number }>("select purge_deleted_instances($1, $2) as count", [before, limit]);
  return row?.count ?? 0;
}

function updateStatement(columns: readonly string[]): string {
  const assignments = columns.map((column, index) => `${column} = $${index + 3}`).join(", ");
  return `update instances set ${assignments} where id = $1 and version = $2`;
}

/** The driver would write an array of objects as an array of SQL. */
function toParameter(value: InstanceRow[keyof InstanceRow]): unknown {
  const isJson = typeof value === "object" && value !== null && !(value instanceof Date || value instanceof Uint8Array);
  return isJson ? JSON.stringify(value) : value;
}
