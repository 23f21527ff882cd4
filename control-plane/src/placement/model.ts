// Placement as a pure function: from what is free and what is asked for to a node and concrete GPUs. GPU work goes
// where the fewest GPUs are left over, so that large requests still find whole nodes; CPU-only work is spread, and
// kept off GPU nodes while others have room.
import type { NodeId } from "@clodei/proto/ids";

/** Where a node stands, or an instance runs. */
export type Location = {
  /** ISO 3166-1 alpha-2, in upper case. */
  readonly country: string;
  readonly region: string;
  readonly datacenter: string;
  /** Uptime Institute's classification, 1 to 4. */
  readonly tier: number;
};

/** Where an instance may run. What is absent allows every value. */
export type LocationConstraint = {
  readonly country?: string | undefined;
  readonly region?: string | undefined;
  readonly datacenter?: string | undefined;
};

/** A GPU of the fleet. */
export type FleetGpu = {
  readonly uuid: string;
  /** Empty where the product is not in our table. */
  readonly model: string;
  readonly memoryMib: number;
  readonly simulated: boolean;
  /** The driver's number for it. */
  readonly index: number;
  /** Healthy, of a known model, and not split by MIG. */
  readonly usable: boolean;
  /** Not usable for its health alone. */
  readonly unhealthy: boolean;
  readonly allocated: boolean;
};

/** Why nothing new is placed on a node. */
export type NodeObstacle = "unreachable" | "cordoned" | "quarantined" | "revoked" | "not_accepting";

/** A node as placement sees it. */
export type FleetNode = {
  readonly id: NodeId;
  readonly location: Location;
  /** Undefined: takes new instances. */
  readonly obstacle: NodeObstacle | undefined;
  /** What instances may have in all. */
  readonly cpuMillis: number;
  readonly memoryMib: number;
  readonly freeCpuMillis: number;
  readonly freeMemoryMib: number;
  readonly gpus: readonly FleetGpu[];
};

/** What an instance needs. */
export type PlacementRequest = {
  readonly gpu: {
    /** Empty: any model, but one for all of them. */
    readonly model: string;
    readonly count: number;
    readonly minMemoryMib: number;
  };
  readonly cpuMillis: number;
  readonly memoryMib: number;
  readonly location: LocationConstraint;
  /** The node that holds the instance's workspace: no other will do. */
  readonly pinnedNodeId: NodeId | undefined;
};

/** A node and the GPUs on it. */
export type Placement = { readonly nodeId: NodeId; readonly location: Location; readonly gpus: readonly FleetGpu[] };

type Candidate = { readonly node: FleetNode; readonly gpus: readonly FleetGpu[] };

/** Finds a node and GPUs, or undefined where there is no room now. Deterministic: the same fleet, the same place. */
export function place(request: PlacementRequest, fleet: readonly FleetNode[]): Placement | undefined {
  const order = request.gpu.count === 0 ? compareSpread(request) : compareBestFit;
  let best: Candidate | undefined;
  for (const node of fleet) {
    if (node.obstacle !== undefined || !isEligible(request, node)) continue;
    const gpus = chooseGpus(request, node, (gpu) => !gpu.allocated);
    if (gpus === undefined) continue;
    if (request.cpuMillis > node.freeCpuMillis || request.memoryMib > node.freeMemoryMib) continue;
    const candidate = { node, gpus };
    if (best === undefined || order(candidate, best) < 0) best = candidate;
  }
  return best && { nodeId: best.node.id, location: best.node.location, gpus: best.gpus };
}

/** Whether a node that is empty could take the request: such a request waits for others to end, not in vain. */
export function fitsEmptyNode(request: PlacementRequest, node: FleetNode): boolean {
  return (
    isEligible(request, node) &&
    chooseGpus(request, node, () => true) !== undefined &&
    request.cpuMillis <= node.cpuMillis &&
    request.memoryMib <= node.memoryMib
  );
}

/** Whether a node is one that the request admits, whatever it holds. */
export function isEligible(request: PlacementRequest, node: FleetNode): boolean {
  return (
    (request.pinnedNodeId === undefined || request.pinnedNodeId === node.id) &&
    isInLocation(request.location, node.location)
  );
}

/** Whether a place is inside a constraint. */
export function isInLocation(constraint: LocationConstraint, location: Location): boolean {
  return (
    (constraint.country === undefined || constraint.country === location.country) &&
    (constraint.region === undefined || constraint.region === location.region) &&
    (constraint.datacenter === undefined || constraint.datacenter === location.datacenter)
  );
}

/** Whether a GPU is of the kind that is asked for, allocated or not. */
export function isWanted(request: PlacementRequest, gpu: FleetGpu): boolean {
  const { model, minMemoryMib } = request.gpu;
  return gpu.usable && (model === "" || model === gpu.model) && gpu.memoryMib >= minMemoryMib;
}

/**
 * The fleet after a placement, for the next one of the same pass. A GPU that two nodes claim to have is taken on both:
 * the database would refuse it the second time.
 */
export function occupy(fleet: readonly FleetNode[], request: PlacementRequest, placement: Placement): FleetNode[] {
  const taken = new Set(placement.gpus.map((gpu) => gpu.uuid));
  return fleet.map((node) => {
    const holdsTaken = node.gpus.some((gpu) => taken.has(gpu.uuid));
    if (node.id !== placement.nodeId && !holdsTaken) return node;
    const gpus = node.gpus.map((gpu) => (taken.has(gpu.uuid) ? { ...gpu, allocated: true } : gpu));
    if (node.id !== placement.nodeId) return { ...node, gpus };
    return {
      ...node,
      freeCpuMillis: node.freeCpuMillis - request.cpuMillis,
      freeMemoryMib: node.freeMemoryMib - request.memoryMib,
      gpus,
    };
  });
}

/**
 * The queue in which a request waits: first come, first served holds within it. GPU requests queue by model and
 * constraints, so that small ones do not starve a large one. CPU-only requests queue by size as well, so that one
 * huge request does not stop all others.
 */
export function queueKey(request: PlacementRequest): string {
  const { gpu, location, pinnedNodeId } = request;
  const kind = gpu.count > 0 ? ["gpu", gpu.model, gpu.minMemoryMib] : ["cpu", request.cpuMillis, request.memoryMib];
  return JSON.stringify([...kind, location.country, location.region, location.datacenter, pinnedNodeId]);
}

/** Of one model, the smallest memory that will do, then the driver's order; undefined where there are too few. */
function chooseGpus(
  request: PlacementRequest,
  node: FleetNode,
  isFree: (gpu: FleetGpu) => boolean,
): readonly FleetGpu[] | undefined {
  const { count } = request.gpu;
  if (count === 0) return [];
  const byModel = Map.groupBy(
    node.gpus.filter((gpu) => isWanted(request, gpu) && isFree(gpu)),
    (gpu) => gpu.model,
  );
  // Best fit among the models too, where any will do: the one of which the fewest are left over.
  const [group] = [...byModel.values()]
    .filter((gpus) => gpus.length >= count)
    .toSorted((a, b) => a.length - b.length || compareText(a[0]?.model ?? "", b[0]?.model ?? ""));
  return group
    ?.toSorted((a, b) => a.memoryMib - b.memoryMib || a.index - b.index || compareText(a.uuid, b.uuid))
    .slice(0, count);
}

function compareBestFit(a: Candidate, b: Candidate): number {
  return (
    gpusLeftOver(a) - gpusLeftOver(b) ||
    a.node.freeMemoryMib - b.node.freeMemoryMib ||
    compareText(a.node.id, b.node.id)
  );
}

/** Free GPUs of the node, of whatever model, that the placement leaves: what a larger request could still use. */
function gpusLeftOver({ node, gpus }: Candidate): number {
  return node.gpus.filter((gpu) => gpu.usable && !gpu.allocated).length - gpus.length;
}

/** Nodes without GPUs first; then the one that is least used afterwards. */
function compareSpread(request: PlacementRequest): (a: Candidate, b: Candidate) => number {
  const use = ({ node }: Candidate): number =>
    Math.max(
      (node.cpuMillis - node.freeCpuMillis + request.cpuMillis) / node.cpuMillis,
      (node.memoryMib - node.freeMemoryMib + request.memoryMib) / node.memoryMib,
    );
  const hasGpus = ({ node }: Candidate): number => (node.gpus.length > 0 ? 1 : 0);
  return (a, b) => hasGpus(a) - hasGpus(b) || use(a) - use(b) || compareText(a.node.id, b.node.id);
}

function compareText(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
