// All SQL about nodes and their inventory. Works as clodei_system: a node belongs to no organization. Every change
// that an operator can see moves the node's version on and is recorded in the fleet's feed, in its transaction.
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { type NodeInventory, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { NodeId } from "@clodei/proto/ids";
import { recordChange } from "../platform/changes.ts";
import { idArray, type SystemTx, type Tx } from "../platform/database.ts";
import { type FleetNode, type NodeLocation, type NodeState, troubleOf } from "./model.ts";

type RawNode = {
  readonly id: NodeId;
  readonly name: string;
  readonly country: string;
  readonly region: string;
  readonly datacenter: string;
  readonly tier: number;
  readonly state: NodeState;
  readonly message: string;
  readonly shared_gpus_message: string;
  readonly cordoned: boolean;
  readonly connected: boolean;
  readonly agent_version: string;
  readonly inventory: Buffer | null;
  readonly accepting_work: boolean;
  readonly accepting_work_message: string;
  readonly create_time: Date;
  readonly update_time: Date;
  readonly heartbeat_time: Date | null;
  readonly certificate_expire_time: Date | null;
  readonly desired_generation: bigint;
  readonly observed_generation: bigint;
  readonly version: bigint;
};

const nodeColumns = `n.id, n.name, n.country, n.region, n.datacenter, n.tier, n.state, n.message, n.shared_gpus_message, n.cordoned, n.connected,
  n.agent_version, n.inventory, n.accepting_work, n.accepting_work_message, n.create_time,
  n.update_time, n.heartbeat_time, n.desired_generation, n.observed_generation, n.version,
  (select max(c.expire_time) from node_certificates c where c.node_id = n.id and c.state = 'active')
    as certificate_expire_time`;

function toNode(row: RawNode): FleetNode {
  return {
    nodeId: row.id,
    name: row.name,
    location: { country: row.country, region: row.region, datacenter: row.datacenter, tier: row.tier },
    state: row.state,
    message: row.message,
    sharedGpusMessage: row.shared_gpus_message,
    cordoned: row.cordoned,
    connected: row.connected,
    agentVersion: row.agent_version,
    inventory: row.inventory === null ? undefined : fromBinary(NodeInventorySchema, row.inventory),
    acceptingWork: row.accepting_work,
    acceptingWorkMessage: row.accepting_work_message,
    createTime: row.create_time,
    updateTime: row.update_time,
    heartbeatTime: row.heartbeat_time ?? undefined,
    certificateExpireTime: row.certificate_expire_time ?? undefined,
    desiredGeneration: row.desired_generation,
    observedGeneration: row.observed_generation,
    version: row.version,
  };
}

/** Nodes by id, in the order of their ids. */
export async function readNodes(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<FleetNode[]> {
  const rows = await tx.query<RawNode>(`select ${nodeColumns} from nodes n where n.id = any($1) order by n.id`, [
    nodeIds,
  ]);
  return rows.map(toNode);
}

/** Where a node stands, without what it reported. */
export type NodeStanding = Pick<FleetNode, "state" | "connected">;

/** Where nodes stand, without reading their inventories. */
export async function readStandings(
  tx: SystemTx,
  nodeIds: readonly NodeId[],
): Promise<ReadonlyMap<NodeId, NodeStanding>> {
  if (nodeIds.length === 0) return new Map();
  const rows = await tx.query<{ id: NodeId; state: NodeState; connected: boolean }>(
    "select id, state, connected from nodes where id = any($1)",
    [nodeIds],
  );
  return new Map(rows.map(({ id, state, connected }) => [id, { state, connected }]));
}

/** One node; undefined where there is none. */
export async function readNode(tx: SystemTx, nodeId: NodeId): Promise<FleetNode | undefined> {
  const [node] = await readNodes(tx, [nodeId]);
  return node;
}

/** Locks nodes against other writers until the transaction ends. Always in the order of ids: two such calls cannot deadlock. */
export async function lockNodes(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<FleetNode[]> {
  const rows = await tx.query<RawNode>(
    `select ${nodeColumns} from nodes n where n.id = any($1) order by n.id for no key update of n`,
    [nodeIds],
  );
  return rows.map(toNode);
}

/** Which nodes a list shows. */
export type NodeFilter = {
  readonly states: readonly NodeState[];
  readonly country: string | undefined;
  readonly region: string | undefined;
  readonly datacenter: string | undefined;
};

/** A page of nodes by name, after a (name, id). */
export async function listNodes(
  tx: SystemTx,
  filter: NodeFilter,
  after: { readonly name: string; readonly id: string } | undefined,
  limit: number,
): Promise<FleetNode[]> {
  const rows = await tx.query<RawNode>(
    `select ${nodeColumns} from nodes n
     where n.state = any($1)
       and ($2::text is null or n.country = $2)
       and ($3::text is null or n.region = $3)
       and ($4::text is null or n.datacenter = $4)
       and ($5::text is null or (n.name, n.id) > ($5, $6))
     order by n.name, n.id
     limit $7`,
    [
      filter.states,
      filter.country ?? null,
      filter.region ?? null,
      filter.datacenter ?? null,
      after?.name ?? null,
      after?.id ?? null,
      limit,
    ],
  );
  return rows.map(toNode);
}

/** Every node that is not revoked. */
export async function readFleet(tx: SystemTx): Promise<FleetNode[]> {
  const rows = await tx.query<RawNode>(
    `select ${nodeColumns} from nodes n where n.state <> 'revoked' order by n.name, n.id`,
  );
  return rows.map(toNode);
}

/** Whether a node that is not revoked has this name. */
export async function isNodeNameTaken(tx: SystemTx, name: string): Promise<boolean> {
  const rows = await tx.query("select 1 from nodes where name = $1 and state <> 'revoked'", [name]);
  return rows.length > 0;
}

/** Adds a node. @returns false where another one has the name. */
export async function insertNode(
  tx: SystemTx,
  node: {
    readonly nodeId: NodeId;
    readonly name: string;
    readonly location: NodeLocation;
    readonly agentVersion: string;
  },
): Promise<boolean> {
  const inserted = await tx.execute(
    `insert into nodes (id, name, country, region, datacenter, tier, state, agent_version)
     values ($1, $2, $3, $4, $5, $6, 'enrolled', $7)
     on conflict (name) where state <> 'revoked' do nothing`,
    [
      node.nodeId,
      node.name,
      node.location.country,
      node.location.region,
      node.location.datacenter,
      node.location.tier,
      node.agentVersion,
    ],
  );
  if (inserted === 0) return false;
  await recordNodeChange(tx, node.nodeId);
  return true;
}

/** What can change on a node by a decision. Absent: stays as it is. */
export type NodeChange = {
  readonly state?: NodeState;
  readonly message?: string;
  readonly sharedGpusMessage?: string;
  readonly cordoned?: boolean;
  readonly connected?: boolean;
  readonly agentVersion?: string;
  readonly inventory?: NodeInventory;
  readonly acceptingWork?: boolean;
  readonly acceptingWorkMessage?: string;
  readonly observedGeneration?: bigint;
  /** Of the heartbeat that says so. Whatever else changes a node has the next heartbeat looked at again. */
  readonly heartbeatDigest?: string;
};

/** Changes a node that the caller has locked, moves its version on, and records the change. */
export async function updateNode(tx: SystemTx, nodeId: NodeId, change: NodeChange): Promise<void> {
  await tx.execute(
    `update nodes set
       state = coalesce($2, state),
       message = coalesce($3, message),
       cordoned = coalesce($4, cordoned),
       connected = coalesce($5, connected),
       agent_version = coalesce($6, agent_version),
       inventory = coalesce($7, inventory),
       accepting_work = coalesce($8, accepting_work),
       accepting_work_message = coalesce($9, accepting_work_message),
       observed_generation = coalesce($10, observed_generation),
       shared_gpus_message = coalesce($11, shared_gpus_message),
       revoke_time = case when $2 = 'revoked' then coalesce(revoke_time, now()) else revoke_time end,
       heartbeat_digest = $12,
       version = version + 1,
       update_time = now()
     where id = $1`,
    [
      nodeId,
      change.state ?? null,
      change.message ?? null,
      change.cordoned ?? null,
      change.connected ?? null,
      change.agentVersion ?? null,
      change.inventory === undefined ? null : toBinary(NodeInventorySchema, change.inventory),
      change.acceptingWork ?? null,
      change.acceptingWorkMessage ?? null,
      change.observedGeneration ?? null,
      change.sharedGpusMessage ?? null,
      change.heartbeatDigest ?? "",
    ],
  );
  if (change.inventory !== undefined) await writeNodeGpus(tx, nodeId, change.inventory);
  await recordNodeChange(tx, nodeId);
}

/** As many as a node can have. */
const maxGoneGpus = 64;

/** What is said of a GPU that the node's inventory had before. */
const goneTrouble = "its node no longer tells of it";

/** Notes which GPUs a node reports, and what is wrong with them. */
async function writeNodeGpus(tx: SystemTx, nodeId: NodeId, inventory: NodeInventory): Promise<void> {
  const troubles = new Map(inventory.gpus.map((gpu) => [gpu.uuid, troubleOf(gpu)]));
  await tx.execute(
    `with gone as (
       update node_gpus set reported = false, trouble = $4 where node_id = $1 and reported and gpu_uuid <> all($2)
     )
     insert into node_gpus (node_id, gpu_uuid, reported, trouble)
     select $1, gpu.uuid, true, gpu.trouble from unnest($2::text[], $3::text[]) as gpu(uuid, trouble)
     on conflict (node_id, gpu_uuid) do update set reported = true, trouble = excluded.trouble
     where not node_gpus.reported or node_gpus.trouble <> excluded.trouble`,
    [nodeId, [...troubles.keys()], [...troubles.values()], goneTrouble],
  );
  // A node that tells of new ones each time must not fill the table that everybody reads.
  await tx.execute(
    `delete from node_gpus where node_id = $1 and not reported and gpu_uuid not in (
       select gpu_uuid from node_gpus where node_id = $1 and not reported order by gpu_uuid limit $2
     )`,
    [nodeId, maxGoneGpus],
  );
}

/** Every GPU with which something is wrong, by node, and what. Of a revoked node nobody holds any. */
export async function readGpuTroubles(tx: SystemTx): Promise<ReadonlyMap<NodeId, ReadonlyMap<string, string>>> {
  const rows = await tx.query<{ node_id: NodeId; gpu_uuid: string; trouble: string }>(
    `select g.node_id, g.gpu_uuid, g.trouble from node_gpus g join nodes n on n.id = g.node_id
     where g.trouble <> '' and n.state <> 'revoked'`,
  );
  const byNode = Map.groupBy(rows, (row) => row.node_id);
  return new Map(
    [...byNode].map(([nodeId, gpus]) => [nodeId, new Map(gpus.map((row) => [row.gpu_uuid, row.trouble]))]),
  );
}

/** A GPU that several nodes report, none of them revoked. */
export type SharedGpu = {
  readonly uuid: string;
  /** In the order of their ids. */
  readonly reporters: readonly { readonly nodeId: NodeId; readonly name: string }[];
};

/** GPUs that several nodes report. */
export async function readSharedGpus(tx: SystemTx): Promise<SharedGpu[]> {
  const rows = await tx.query<{ gpu_uuid: string; ids: NodeId[]; names: string[] }>(
    `select g.gpu_uuid, array_agg(n.id order by n.id) as ids, array_agg(n.name order by n.id) as names
     from node_gpus g join nodes n on n.id = g.node_id
     where g.reported and n.state <> 'revoked'
     group by g.gpu_uuid having count(*) > 1
     order by g.gpu_uuid`,
  );
  return rows.map((row) => ({
    uuid: row.gpu_uuid,
    reporters: row.ids.map((nodeId, index) => ({ nodeId, name: row.names[index] ?? "" })),
  }));
}

/** What is said of nodes about GPUs that others report as well, of those of which something is. */
export async function readSharedGpuMessages(tx: SystemTx): Promise<ReadonlyMap<NodeId, string>> {
  const rows = await tx.query<{ id: NodeId; shared_gpus_message: string }>(
    "select id, shared_gpus_message from nodes where shared_gpus_message <> ''",
  );
  return new Map(rows.map((row) => [row.id, row.shared_gpus_message]));
}

/** What is known of a node before its heartbeat is looked at. */
export type HeartbeatState = { readonly state: NodeState; readonly connected: boolean; readonly digest: string };

type RawHeartbeatState = {
  readonly id: NodeId;
  readonly state: NodeState;
  readonly connected: boolean;
  readonly heartbeat_digest: string;
};

const lockHeard = `select id, state, connected, heartbeat_digest from nodes
  where id = any($1) and state <> 'revoked' order by id for no key update`;

function toHeartbeatStates(rows: readonly RawHeartbeatState[]): ReadonlyMap<NodeId, HeartbeatState> {
  return new Map(
    rows.map((row) => [row.id, { state: row.state, connected: row.connected, digest: row.heartbeat_digest }]),
  );
}

/** Locks the nodes that were heard and are not revoked, without reading their inventories. */
export async function lockForHeartbeat(
  tx: SystemTx,
  nodeIds: readonly NodeId[],
): Promise<ReadonlyMap<NodeId, HeartbeatState>> {
  return toHeartbeatStates(await tx.query<RawHeartbeatState>(lockHeard, [idArray(nodeIds)]));
}

/**
 * The same, and notes that their agents were heard: no change that an operator watches, so neither version nor feed. In
 * one statement, because every replica asks it twice a second.
 */
export async function extendLeases(
  tx: SystemTx,
  nodeIds: readonly NodeId[],
  leaseMs: number,
): Promise<ReadonlyMap<NodeId, HeartbeatState>> {
  const rows = await tx.query<RawHeartbeatState>(
    `with heard as (${lockHeard})
     update nodes set
       heartbeat_time = clock_timestamp(),
       lease_expire_time = clock_timestamp() + make_interval(secs => $2::double precision / 1000)
     from heard where nodes.id = heard.id
     returning heard.*`,
    [idArray(nodeIds), leaseMs],
  );
  return toHeartbeatStates(rows);
}

/**
 * Locks the nodes whose lease ended, some at a time. By the database's clock: replicas' clocks may disagree.
 * A node that another replica just works on is left to it.
 */
export async function lockExpiredLeases(
  tx: SystemTx,
  limit: number,
): Promise<{ readonly nodeId: NodeId; readonly state: NodeState }[]> {
  const rows = await tx.query<{ id: NodeId; state: NodeState }>(
    `select id, state from nodes
     where (state = 'ready' or connected) and lease_expire_time <= clock_timestamp()
     order by id limit $1
     for no key update skip locked`,
    [limit],
  );
  return rows.map(({ id, state }) => ({ nodeId: id, state }));
}

/** Whether there is a node whose lease ended. */
export async function hasExpiredLeases(tx: SystemTx): Promise<boolean> {
  const rows = await tx.query(
    "select 1 from nodes where (state = 'ready' or connected) and lease_expire_time <= clock_timestamp() limit 1",
  );
  return rows.length > 0;
}

/** Counts a new enrollment under a node's id, so that what earlier ones left behind enrolls nothing. */
export async function bumpEnrollmentEpoch(tx: SystemTx, nodeId: NodeId): Promise<void> {
  await tx.execute("update nodes set enrollment_epoch = enrollment_epoch + 1 where id = $1", [nodeId]);
}

/** The enrollment that counts under a node's id. */
export async function readEnrollmentEpoch(tx: SystemTx, nodeId: NodeId): Promise<number | undefined> {
  const [row] = await tx.query<{ enrollment_epoch: number }>("select enrollment_epoch from nodes where id = $1", [
    nodeId,
  ]);
  return row?.enrollment_epoch;
}

/** The generations of those nodes' desired sets that are newer than the ones given. */
export async function readNewerGenerations(
  tx: SystemTx,
  known: ReadonlyMap<NodeId, bigint>,
): Promise<ReadonlyMap<NodeId, bigint>> {
  const rows = await tx.query<{ id: NodeId; desired_generation: bigint }>(
    `select n.id, n.desired_generation from unnest($1::text[], $2::int8[]) as known(id, generation)
     join nodes n on n.id = known.id where n.desired_generation > known.generation`,
    [idArray([...known.keys()]), idArray([...known.values()])],
  );
  return new Map(rows.map((row) => [row.id, row.desired_generation]));
}

/** Moves a node's desired set on. By a definer function, so that a tenant's transaction may. */
export async function bumpDesiredGeneration(tx: Tx, nodeId: NodeId): Promise<bigint | undefined> {
  const [row] = await tx.query<{ generation: bigint | null }>("select bump_desired_generation($1) as generation", [
    nodeId,
  ]);
  return row?.generation ?? undefined;
}

/**
 * Records in the fleet's feed that a node changed. The payload stays empty: a watcher reads the node as it is then,
 * so an inventory of many kilobytes is not stored once more for every change.
 */
async function recordNodeChange(tx: SystemTx, nodeId: NodeId): Promise<void> {
  await recordChange(tx, { organizationId: undefined, kind: "node", subjectId: nodeId, payload: new Uint8Array() });
}
