// What other slices may ask of placement. Allocation happens under one lock for the whole fleet: first come, first
// served needs one queue, and CPU and memory need one reader at a time. GPUs are guarded by a unique index besides.
import type { InstanceId, NodeId, OrganizationId } from "@clodei/proto/ids";
import { parseId } from "@clodei/proto/ids";
import { type SystemTx, constraintOf } from "../platform/database.ts";
import type { NodesService } from "../nodes/service.ts";
import { createFleet } from "./fleet.ts";
import type { FleetNode, Placement, PlacementRequest } from "./model.ts";
import {
  deleteReleased,
  insertAllocation,
  releaseAllocation,
  selectAllocations,
  selectNodeAllocation,
} from "./store.ts";

export { explainWaiting } from "./explain.ts";
export { fitsEmptyNode, isInLocation, occupy, place, queueKey } from "./model.ts";
export type { FleetGpu, FleetNode, Location, LocationConstraint, Placement, PlacementRequest } from "./model.ts";
export { lockPlacement } from "./store.ts";

/** How long released allocations are kept, to answer what ran where. */
const releasedRetentionMs = 90 * 24 * 60 * 60 * 1000;

/** Someone else got the GPU, or the instance has an allocation already. Roll back, and place again. */
export class AllocationConflict extends Error {
  constructor(options: { cause: unknown }) {
    super("a GPU is allocated already, or the instance is", options);
    this.name = "AllocationConflict";
  }
}

/** What is allocated on a node. */
export type NodeAllocation = {
  readonly gpuUuids: readonly string[];
  readonly cpuMillis: number;
  readonly memoryMib: number;
  readonly instances: number;
};

/** Who has what of the fleet. */
export class PlacementService {
  readonly #nodes: Pick<NodesService, "fleet">;

  constructor(nodes: Pick<NodesService, "fleet">) {
    this.#nodes = nodes;
  }

  /** The fleet with what is free in it. To allocate by it, hold lockPlacement first. */
  async readFleet(tx: SystemTx): Promise<FleetNode[]> {
    const allocations = await selectAllocations(tx);
    return createFleet(await this.#nodes.fleet(tx), allocations);
  }

  /**
   * Makes a placement the instance's.
   *
   * @throws AllocationConflict where the database's constraints refuse it; the transaction is over then.
   */
  async allocate(
    tx: SystemTx,
    instance: { readonly organizationId: OrganizationId; readonly instanceId: InstanceId; readonly attempt: number },
    request: PlacementRequest,
    placement: Placement,
    now: Date,
  ): Promise<void> {
    const { nodeId, gpus } = placement;
    const { cpuMillis, memoryMib } = request;
    const rows = { ...instance, nodeId, gpuUuids: gpus.map((gpu) => gpu.uuid), cpuMillis, memoryMib };
    try {
      await insertAllocation(tx, rows, now);
    } catch (error) {
      const constraint = constraintOf(error);
      if (constraint === "gpu_allocations_live" || constraint === "resource_allocations_live") {
        throw new AllocationConflict({ cause: error });
      }
      throw error;
    }
  }

  /** Frees what an instance has. Does nothing where it has nothing. */
  async release(tx: SystemTx, instanceId: InstanceId, now: Date): Promise<void> {
    await releaseAllocation(tx, instanceId, now);
  }

  /** What is allocated on each of the nodes. Every node that is asked for is in the answer. */
  async nodeAllocations(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<ReadonlyMap<NodeId, NodeAllocation>> {
    const rows = await selectNodeAllocation(tx, nodeIds);
    return new Map(
      rows.flatMap((row) => {
        const nodeId = parseId("nod", row.node_id);
        if (nodeId === undefined) return [];
        const allocation = {
          gpuUuids: row.gpu_uuids,
          cpuMillis: Number(row.cpu_millis),
          memoryMib: Number(row.memory_mib),
          instances: Number(row.instances),
        };
        return [[nodeId, allocation]];
      }),
    );
  }

  /** Removes allocations that ended long ago. */
  async pruneAllocations(tx: SystemTx, now: Date): Promise<void> {
    await deleteReleased(tx, new Date(now.getTime() - releasedRetentionMs));
  }
}
