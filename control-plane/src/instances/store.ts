// Rows of instances and their events. A change is written under the row's lock, guarded by its version.
import type { InstanceSpec } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceId, newId, type NodeId, type OrganizationId } from "@clodei/proto/ids";
import type { SystemTx, TenantTx, Tx } from "../platform/database.ts";
import type { LocationConstraint } from "../placement/service.ts";
import type { Instance, InstanceGpu, Reason, State } from "./model.ts";
import {
  fromRow,
  instanceColumns,
  instanceIdOf,
  nodeIdOf,
  type InstanceRow,
  organizationIdOf,
  specFromRow,
  toRow,
} from "./rows.ts";
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

/** What a tenant's login may change of a row. */
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

const createColumns = [
  "id",
  "organization_id",
  "spec",
  "created_by",
  "create_time",
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
] as const satisfies readonly (keyof InstanceRow)[];

const insert = withEvents(
  `insert into instances (${createColumns.join(", ")}, labels, gpu_model)
   values (${createColumns.map((_, index) => `$${index + 1}`).join(", ")}, $${createColumns.length + 1}, $${createColumns.length + 2})`,
  createColumns.length + 2,
);
const tenantUpdate = updateStatement(tenantColumns);
const systemUpdate = updateStatement(systemColumns);

/** Events to add together with what they tell of. */
export type NewEvents = {
  /** The number of the first of them. */
  readonly firstSequence: bigint;
  readonly events: readonly EventDraft[];
  readonly actor: Actor;
  readonly time: Date;
};

/** Writes a new instance and its first events, in one round trip. */
export async function insertInstance(tx: TenantTx, instance: Instance, added: NewEvents): Promise<void> {
  const row = toRow(instance);
  const values = createColumns.map((column) => row[column]);
  const more = [JSON.stringify(instance.spec.labels), instance.spec.gpu?.model ?? ""];
  await tx.query(insert, [...values, ...more, ...eventParameters(added)]);
}

/** Writes what changed, if the row still has the version that was read, and adds events, in one round trip. */
export async function updateInstance(
  tx: TenantTx | SystemTx,
  next: Instance,
  versionBefore: bigint,
  added: NewEvents,
): Promise<void> {
  const row = toRow(next);
  const columns = "system" in tx ? systemColumns : tenantColumns;
  const values = columns.map((column) => toParameter(row[column]));
  const [result] = await tx.query<{ written: bigint }>("system" in tx ? systemUpdate : tenantUpdate, [
    row.id,
    versionBefore,
    ...values,
    ...eventParameters(added),
  ]);
  if (result?.written !== 1n) throw new Error(`instance ${row.id} changed while its row was locked`);
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

/**
 * Specifications of instances, in the order given: the first of them, and as many more as fit. An instance outlives
 * whatever is kept about it elsewhere, so what was asked for and is not there did not fit.
 */
export async function selectSpecs(tx: Tx, ids: readonly InstanceId[]): Promise<ReadonlyMap<InstanceId, InstanceSpec>> {
  const rows = await tx.query<{ id: string; spec: Uint8Array }>(
    `select id, spec from (
       select instances.id, instances.spec, wanted.place, sum(octet_length(instances.spec)) over (
         order by wanted.place rows between unbounded preceding and 1 preceding
       ) as bytes_before
       from unnest($1::text[]) with ordinality as wanted (id, place) join instances on instances.id = wanted.id
     ) as counted
     where coalesce(bytes_before, 0) < $2
     order by place`,
    [ids, maxPageBytes],
  );
  return new Map(rows.map((row) => [instanceIdOf(row.id), specFromRow(row)]));
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

/** Whether any instance waits for its place. */
export async function hasPending(tx: SystemTx): Promise<boolean> {
  return (await tx.query("select 1 from instances where state = 'PENDING' limit 1")).length > 0;
}

/** What an organization has of what it may have a share of. */
export type Shares = {
  readonly pending: number;
  /** Of instances that are not deleted. */
  readonly specBytes: number;
  /** Of instances that were created after the time given, deleted or not. */
  readonly recentSpecBytes: number;
};

/** What an organization has of what it may have a share of. */
export async function selectShares(tx: TenantTx, recentAfter: Date): Promise<Shares> {
  const [row] = await tx.query<{ pending: bigint; bytes: bigint; recent_bytes: bigint }>(
    `select count(*) filter (where state = 'PENDING') as pending, coalesce(sum(octet_length(spec)), 0)::bigint as bytes,
       (select coalesce(sum(octet_length(spec)), 0)::bigint from instances
        where organization_id = $1 and id > $2) as recent_bytes
     from instances where organization_id = $1 and state <> 'DELETED'`,
    // Ids begin with the time, so that the index finds the recent ones.
    [tx.organizationId, newId("ins", recentAfter.getTime())],
  );
  const { pending = 0n, bytes = 0n, recent_bytes: recent = 0n } = row ?? {};
  return { pending: Number(pending), specBytes: Number(bytes), recentSpecBytes: Number(recent) };
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

/** An instance that has GPUs, with what is said of them. */
export type GpuHolder = { readonly id: InstanceId; readonly nodeId: NodeId; readonly gpus: readonly InstanceGpu[] };

/** The instances that have GPUs on one of these nodes, and those that show an unhealthy one. */
export async function selectGpuHolders(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<GpuHolder[]> {
  const rows = await tx.query<{ id: string; node_id: string; gpus: readonly InstanceGpu[] }>(
    `select id, node_id, gpus from instances where node_id = any ($1) and state <> 'DELETED' and gpus <> '[]'
     union
     select id, node_id, gpus from instances where gpus @? '$[*].trouble'`,
    [nodeIds],
  );
  return rows.map((row) => ({ id: instanceIdOf(row.id), nodeId: nodeIdOf(row.node_id), gpus: row.gpus }));
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
  return withEvents(`update instances set ${assignments} where id = $1 and version = $2`, columns.length + 2);
}

/** A statement that writes one instance, and its events if it wrote it. `parameters`: how many the first part has. */
function withEvents(statement: string, parameters: number): string {
  const at = (index: number): string => `$${parameters + index}`;
  return `with written as (${statement} returning id, organization_id), added as (
    insert into instance_events (instance_id, sequence, organization_id, event_time, actor_kind, actor_id, attempt,
      state, reason, message)
    select id, ${at(1)}::bigint + e.index - 1, organization_id, ${at(2)}::timestamptz, ${at(3)}, ${at(4)}, e.attempt,
      e.state, e.reason, e.message
    from written, unnest(${at(5)}::integer[], ${at(6)}::text[], ${at(7)}::text[], ${at(8)}::text[])
      with ordinality as e(attempt, state, reason, message, index)
  )
  select count(*) as written from written`;
}

function eventParameters({ firstSequence, events, actor, time }: NewEvents): unknown[] {
  const column = <K extends keyof EventDraft>(key: K): EventDraft[K][] => events.map((event) => event[key]);
  const columns = [column("attempt"), column("state"), column("reason"), column("message")];
  return [firstSequence, time, actor.kind, actor.id, ...columns];
}

/** The driver would write an array of objects as an array of SQL. */
function toParameter(value: InstanceRow[keyof InstanceRow]): unknown {
  const isJson = typeof value === "object" && value !== null && !(value instanceof Date || value instanceof Uint8Array);
  return isJson ? JSON.stringify(value) : value;
}
