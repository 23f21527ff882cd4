// Says why a request waits and what would fit, in terms of the machines that there are. Never how many GPUs others
// use: what it says follows from the fleet's shapes and from the fact alone that there is no room now.
import { fitsEmptyNode, isEligible, isInLocation, isWanted } from "./model.ts";
import type { FleetNode, LocationConstraint, NodeObstacle, PlacementRequest } from "./model.ts";

/** How many models, or places, a message names. */
const maxNamed = 8;

/** Why there is no room for a request, for a person. */
export function explainWaiting(request: PlacementRequest, fleet: readonly FleetNode[]): string {
  const why = request.pinnedNodeId === undefined ? explainAny(request, fleet) : explainPinned(request, fleet);
  return `${describeRequest(request)} asked for; ${why}`;
}

/** What passes comes first: others' use, then ill health, then nodes that take nothing; and last what no wait mends. */
function explainAny(request: PlacementRequest, fleet: readonly FleetNode[]): string {
  const where = describeLocation(request.location);
  const elsewhere = describeElsewhere(request, fleet);
  const nodes = fleet.filter((node) => isEligible(request, node));
  if (nodes.length === 0) return `there is no node ${where}${elsewhere}`;
  const open = nodes.filter((node) => node.obstacle === undefined);
  if (open.some((node) => fitsEmptyNode(request, node))) {
    return `no node ${where} has that much free now${describeLargestNode(request, open)}; waiting until it is free`;
  }
  if (open.some((node) => fitsEmptyNode(request, healed(node)))) {
    return `no node ${where} has that many healthy GPUs now${describeLargestNode(request, open)}; waiting until they are healthy again${elsewhere}`;
  }
  const closed = nodes.filter((node) => fitsEmptyNode(request, healed(node)));
  if (closed.length > 0) {
    return `what would fit ${where} takes no new instances now (${describeObstacles(closed)}); waiting until it does${elsewhere}`;
  }
  return `${explainMisfit(request, nodes.map(healed), where)}${elsewhere}`;
}

/** The node with all its GPUs in good health. */
function healed(node: FleetNode): FleetNode {
  return { ...node, gpus: node.gpus.map((gpu) => (gpu.unhealthy ? { ...gpu, usable: true } : gpu)) };
}

function describeObstacles(nodes: readonly FleetNode[]): string {
  const byObstacle = Map.groupBy(nodes, ({ obstacle }) => obstacle ?? "not_accepting");
  const parts = [...byObstacle].map(([obstacle, those]) => `${those.length} ${obstacleWords[obstacle]}`);
  return parts.toSorted().join(", ");
}

/** What a node is that takes nothing. */
const obstacleWords: Readonly<Record<NodeObstacle, string>> = {
  unreachable: "not answering",
  cordoned: "under maintenance",
  quarantined: "waiting for an operator",
  revoked: "out of service",
  not_accepting: "not ready for work",
};

/** Where else it would fit, if the caller let go of the location. */
function describeElsewhere(request: PlacementRequest, fleet: readonly FleetNode[]): string {
  const anywhere = { ...request, location: {} };
  const fitting = fleet.filter((node) => node.obstacle === undefined && fitsEmptyNode(anywhere, node));
  const places = new Set(fitting.map(({ location }) => describeLocation(location)));
  if (places.size === 0) return "";
  return `; it would fit ${[...places].toSorted().slice(0, maxNamed).join(", ")}: ask for that location`;
}

/** What was asked for: "2 x H100-SXM in ES" without the place. */
export function describeRequest(request: PlacementRequest): string {
  const { count, model, minMemoryMib } = request.gpu;
  if (count === 0) return `${request.cpuMillis} CPU millis and ${request.memoryMib} MiB of memory`;
  const memory = minMemoryMib > 0 ? ` with at least ${minMemoryMib} MiB each` : "";
  return `${count} x ${model === "" ? "GPU of any one model" : model}${memory}`;
}

function describeLocation(constraint: LocationConstraint): string {
  const parts = [constraint.country, constraint.region, constraint.datacenter].filter((part) => part !== undefined);
  return parts.length === 0 ? "in any location" : `in ${parts.join("/")}`;
}

/** No node would do, even if it were empty: what there is instead. */
function explainMisfit(request: PlacementRequest, nodes: readonly FleetNode[], where: string): string {
  const { count, model } = request.gpu;
  if (count > 0) {
    const wanted = largestGroup(request, nodes);
    if (wanted === undefined) {
      const models = [
        ...new Set(nodes.flatMap((node) => node.gpus.filter((gpu) => gpu.usable).map((gpu) => gpu.model))),
      ];
      if (models.length === 0) return `no node ${where} has GPUs`;
      const named = models.toSorted().slice(0, maxNamed).join(", ");
      if (model !== "" && !models.includes(model)) return `no node ${where} has that model; there are ${named}`;
      const most = Math.max(...nodes.flatMap((node) => node.gpus.filter(isOfModel(model)).map((gpu) => gpu.memoryMib)));
      return `no GPU ${where} has that much memory; the largest has ${most} MiB`;
    }
    if (wanted.count < count) {
      return `no node ${where} has that many; the largest has ${wanted.count} x ${wanted.model}: ask for at most ${wanted.count}`;
    }
  }
  const cpuMillis = Math.max(...nodes.map((node) => node.cpuMillis));
  const memoryMib = Math.max(...nodes.map((node) => node.memoryMib));
  const size = `${request.cpuMillis} CPU millis and ${request.memoryMib} MiB of memory`;
  return `no node ${where} is large enough for ${size} together; nodes have up to ${cpuMillis} CPU millis and up to ${memoryMib} MiB`;
}

function isOfModel(model: string): (gpu: { usable: boolean; model: string }) => boolean {
  return (gpu) => gpu.usable && (model === "" || gpu.model === model);
}

/** The most that a node has, with what is ill among it; nothing for a request without GPUs. */
function describeLargestNode(request: PlacementRequest, nodes: readonly FleetNode[]): string {
  const group = largestGroup(request, nodes.map(healed));
  if (request.gpu.count === 0 || group === undefined) return "";
  const ill = group.unhealthy === 0 ? "" : `, ${group.unhealthy} of them unhealthy`;
  return `; the largest node there has ${group.count} x ${group.model} in all${ill}`;
}

type GpuGroup = { readonly model: string; readonly count: number; readonly unhealthy: number };

/** The most GPUs of one model, of those that are wanted, that one node has, allocated or not. */
function largestGroup(request: PlacementRequest, nodes: readonly FleetNode[]): GpuGroup | undefined {
  let largest: GpuGroup | undefined;
  for (const node of nodes) {
    const byModel = Map.groupBy(
      node.gpus.filter((gpu) => isWanted(request, gpu)),
      (gpu) => gpu.model,
    );
    for (const [model, gpus] of byModel) {
      const unhealthy = gpus.filter((gpu) => gpu.unhealthy).length;
      const isLarger = largest === undefined || gpus.length > largest.count;
      if (isLarger) largest = { model, count: gpus.length, unhealthy };
    }
  }
  return largest;
}

function explainPinned(request: PlacementRequest, fleet: readonly FleetNode[]): string {
  const node = fleet.find(({ id }) => id === request.pinnedNodeId);
  if (node === undefined) return "the node that holds its workspace is gone";
  if (node.obstacle !== undefined) return `the node that holds its workspace is ${obstacleWords[node.obstacle]}`;
  if (!isInLocation(request.location, node.location) || !fitsEmptyNode(request, healed(node))) {
    return "the node that holds its workspace no longer has that much, even when empty";
  }
  if (!fitsEmptyNode(request, node)) {
    const group = largestGroup(request, [healed(node)]);
    const ill = `${group?.unhealthy ?? 0} of its ${group?.count ?? 0} x ${group?.model ?? "GPU"} are unhealthy`;
    return `the node that holds its workspace has not that many healthy GPUs now: ${ill}; waiting until they are healthy again`;
  }
  return "the node that holds its workspace has not that much free now; waiting until it has";
}
