// Rows of gpu_allocations and resource_allocations, for clodei_system alone.
import type { InstanceId, NodeId, OrganizationId } from "@clodei/proto/ids";
import { parseId } from "@clodei/proto/ids";
import type { SystemTx } from "../platform/database.ts";
import type { Allocations } from "./fleet.ts";

/** Any number that no other advisory lock of ours uses. */
const placementLockKey = 7_306_001;

/** What becomes an instance's. */
export type AllocationRows = {
  readonly organizationId: OrganizationId;
  readonly instanceId: InstanceId;
  readonly attempt: number;
  readonly nodeId: NodeId;
  readonly gpuUuids: readonly string[];
  readonly cpuMillis: number;
  readonly memoryMib: number;
};

/** Waits until no other replica places, and keeps the others waiting until this transaction ends. */
export async function lockPlacement(tx: SystemTx): Promise<void> {
  await tx.execute("select pg_advisory_xact_lock($1)", [placementLockKey]);
}

/** Everything that is allocated now. One statement: it stands on the way of every start. */
export async function selectAllocations(tx: SystemTx): Promise<Allocations> {
  const rows = await tx.query<{
    node_id: string;
    cpu_millis: bigint;
    memory_mib: bigint;
    gpu_uuid: string | null;
  }>(
    `select node_id, sum(cpu_millis)::bigint as cpu_millis, sum(memory_mib)::bigint as memory_mib, null as gpu_uuid
     from resource_allocations where release_time is null group by node_id
     union all
     select node_id, 0, 0, gpu_uuid from gpu_allocations where release_time is null`,
  );
  const gpuUuids = new Set<string>();
  const byNode = new Map<NodeId, { cpuMillis: number; memoryMib: number }>();
  for (const row of rows) {
    const nodeId = parseId("nod", row.node_id);
    if (row.gpu_uuid !== null) gpuUuids.add(row.gpu_uuid);
    else if (nodeId !== undefined) {
      byNode.set(nodeId, { cpuMillis: Number(row.cpu_millis), memoryMib: Number(row.memory_mib) });
    }
  }
  return { gpuUuids, byNode };
}

/** Writes an allocation. The unique indexes refuse a GPU that is another's and a second allocation of an instance. */
export async function insertAllocation(tx: SystemTx, rows: AllocationRows, now: Date): Promise<void> {
  const { organizationId, instanceId, attempt, nodeId, gpuUuids, cpuMillis, memoryMib } = rows;
  await tx.execute(
    `with resources as (
       insert into resource_allocations
         (organization_id, instance_id, attempt, node_id, cpu_millis, memory_mib, create_time)
       values ($1, $2, $3, $4, $5, $6, $7)
     )
     insert into gpu_allocations (organization_id, instance_id, attempt, node_id, gpu_uuid, create_time)
     select $1, $2, $3, $4, uuid, $7 from unnest($8::text[]) as uuid`,
    [organizationId, instanceId, attempt, nodeId, cpuMillis, memoryMib, now, gpuUuids],
  );
}

/** Ends an instance's allocation. Does nothing where it has none. */
export async function releaseAllocation(tx: SystemTx, instanceId: InstanceId, now: Date): Promise<void> {
  // A clock that went back must not keep a GPU.
  await tx.execute(
    `with resources as (
       update resource_allocations set release_time = greatest($2, create_time)
       where instance_id = $1 and release_time is null
     )
     update gpu_allocations set release_time = greatest($2, create_time)
     where instance_id = $1 and release_time is null`,
    [instanceId, now],
  );
}

/** What is allocated on one node. */
export async function selectNodeAllocation(
  tx: SystemTx,
  nodeIds: readonly NodeId[],
): Promise<{ node_id: string; gpu_uuids: string[]; cpu_millis: bigint; memory_mib: bigint; instances: bigint }[]> {
  return tx.query(
    `select node.id as node_id,
       array(select gpu_uuid from gpu_allocations
             where node_id = node.id and release_time is null order by gpu_uuid) as gpu_uuids,
       coalesce(sum(cpu_millis), 0)::bigint as cpu_millis,
       coalesce(sum(memory_mib), 0)::bigint as memory_mib,
       count(instance_id) as instances
     from unnest($1::text[]) as node (id)
     left join resource_allocations on resource_allocations.node_id = node.id and release_time is null
     group by node.id`,
    [nodeIds],
  );
}

/** Removes rows that were released before a time. Returns how many GPU rows went. */
export async function deleteReleased(tx: SystemTx, before: Date): Promise<void> {
  await tx.execute("delete from resource_allocations where release_time < $1", [before]);
  await tx.execute("delete from gpu_allocations where release_time < $1", [before]);
}
