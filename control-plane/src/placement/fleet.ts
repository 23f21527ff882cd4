// What placement knows of a node: what it reported, less what is allocated on it.
import { GpuHealth, MigMode, type Gpu } from "@clodei/proto/gen/clodei/v1/inventory";
import type { NodeId } from "@clodei/proto/ids";
import { type FleetNode as NodeRecord, takesNewWork } from "../nodes/service.ts";
import type { FleetGpu, FleetNode, NodeObstacle } from "./model.ts";

/** Memory that instances are not given: the agent, the engine and the kernel need some. */
const systemReservedMemoryMib = 512;

/** What is allocated in the fleet. */
export type Allocations = {
  /** UUIDs of the GPUs that are somebody's. */
  readonly gpuUuids: ReadonlySet<string>;
  readonly byNode: ReadonlyMap<NodeId, { readonly cpuMillis: number; readonly memoryMib: number }>;
};

/**
 * The fleet as placement sees it. Nodes that never reported what they have are left out. A GPU that several nodes report
 * (a cloned disk, a card that was moved, a wrong report) is there once.
 */
export function createFleet(nodes: readonly NodeRecord[], allocations: Allocations): FleetNode[] {
  const reporters = findReporters(nodes);
  return nodes.flatMap((node) => {
    const host = node.inventory?.host;
    if (node.inventory === undefined || host === undefined) return [];
    const cpuMillis = host.cpuCount * 1000;
    const memoryMib = Math.max(0, host.memoryMib - systemReservedMemoryMib);
    const used = allocations.byNode.get(node.nodeId) ?? { cpuMillis: 0, memoryMib: 0 };
    return [
      {
        id: node.nodeId,
        location: node.location,
        obstacle: obstacleOf(node),
        cpuMillis,
        memoryMib,
        freeCpuMillis: cpuMillis - used.cpuMillis,
        freeMemoryMib: memoryMib - used.memoryMib,
        gpus: node.inventory.gpus.map((gpu) => ({
          ...createFleetGpu(gpu, allocations.gpuUuids),
          ...(reporters.get(gpu.uuid) !== gpu && { usable: false, unhealthy: false }),
        })),
      },
    ];
  });
}

/** Whose report of a GPU counts: that of a node that takes work before others, and then the node's that is older. */
function findReporters(nodes: readonly NodeRecord[]): ReadonlyMap<string, Gpu> {
  const rank = (node: NodeRecord): string => `${obstacleOf(node) === undefined ? 0 : 1}${node.nodeId}`;
  const ranked = nodes.map((node) => ({ node, rank: rank(node) })).toSorted((a, b) => (a.rank < b.rank ? -1 : 1));
  const reporters = new Map<string, Gpu>();
  for (const { node } of ranked) {
    for (const gpu of node.inventory?.gpus ?? []) if (!reporters.has(gpu.uuid)) reporters.set(gpu.uuid, gpu);
  }
  return reporters;
}

function createFleetGpu(gpu: Gpu, allocated: ReadonlySet<string>): FleetGpu {
  const isWhole = gpu.migMode === MigMode.DISABLED || gpu.migMode === MigMode.UNSUPPORTED;
  const isKnown = gpu.model !== "" && isWhole;
  // Not "is not known to be ill": what nobody vouches for is not given to a customer.
  const isHealthy = gpu.health === GpuHealth.HEALTHY;
  return {
    uuid: gpu.uuid,
    model: gpu.model,
    memoryMib: gpu.memoryMib,
    simulated: gpu.simulated,
    index: gpu.index,
    usable: isKnown && isHealthy,
    unhealthy: isKnown && !isHealthy,
    allocated: allocated.has(gpu.uuid),
  };
}

function obstacleOf(node: NodeRecord): NodeObstacle | undefined {
  if (takesNewWork(node)) return undefined;
  switch (node.state) {
    case "enrolled":
    case "unreachable":
      return "unreachable";
    case "quarantined":
      return "quarantined";
    case "revoked":
      return "revoked";
    case "ready":
      if (!node.connected) return "unreachable";
      return node.cordoned ? "cordoned" : "not_accepting";
  }
}
