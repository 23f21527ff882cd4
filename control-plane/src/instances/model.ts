// What an instance is. Its states are a union, so that what only one state has (a deadline, a reason, what follows a
// stop) exists in that state alone. What may become of an instance stands in transitions.ts.
import type { InstanceId, NodeId, OrganizationId } from "@clodei/proto/ids";
import type { InstanceSpec } from "@clodei/proto/gen/clodei/v1/instance";
import type { FleetGpu, Location } from "../placement/service.ts";

/** Why a stopped instance is stopped. */
export type StoppedReason = "COMPLETED" | "STOPPED_BY_REQUEST" | "MAX_RUN_TIME_REACHED";

/** Why a failed instance failed. */
export type FailedReason =
  | "PLACEMENT_TIMED_OUT"
  | "IMAGE_NOT_ALLOWED"
  | "IMAGE_NOT_FOUND"
  | "PULL_FAILED"
  | "START_FAILED"
  | "OUT_OF_MEMORY"
  | "EXITED_NONZERO"
  | "NODE_LOST"
  | "POLICY_VIOLATION"
  | "NODE_ERROR"
  | "PULL_UNAUTHORIZED"
  | "PULL_INTERRUPTED"
  | "PULL_STALLED"
  | "IMAGE_DAMAGED"
  | "REGISTRY_UNREACHABLE";

/** What an event tells beside the state. */
export type NewsReason = "GPU_UNHEALTHY" | "GPU_RECOVERED";

/** Every reason, with the one that says nothing. */
export type Reason = "" | "WAITING_FOR_CAPACITY" | "RESTART_BACKOFF" | StoppedReason | FailedReason | NewsReason;

/** The state, and what belongs to it alone. */
export type Status =
  /** Waits for capacity; `message` says what would fit, once a search found nothing. */
  | { readonly state: "PENDING"; readonly queueTime: Date; readonly deadline: Date; readonly message: string }
  /** Has a node and GPUs. The node has not taken it up, or waits for notBeforeTime (backoff of the restart policy). */
  | { readonly state: "SCHEDULED"; readonly notBeforeTime: Date | undefined; readonly message: string }
  | { readonly state: "PULLING"; readonly progress: PullProgress | undefined }
  | { readonly state: "CREATING" }
  | { readonly state: "RUNNING" }
  /** `ended`: the attempt is over on its node and the GPUs are free; only the removal is awaited. */
  | { readonly state: "STOPPING"; readonly after: AfterStop; readonly ended: boolean; readonly message: string }
  | { readonly state: "STOPPED"; readonly reason: StoppedReason; readonly message: string }
  | { readonly state: "FAILED"; readonly reason: FailedReason; readonly message: string }
  | { readonly state: "DELETED"; readonly deleteTime: Date };

/**
 * What follows a stop: nothing, the next attempt, or the removal, as its customer asked; or, with "end", what the node
 * says, which stops the attempt on its own account (max_run_time, a broken policy).
 */
export type AfterStop = "stop" | "start" | "delete" | "end";

/** The states by name. */
export type State = Status["state"];

/** How far a pull is. */
export type PullProgress = { readonly bytesDone: bigint; readonly bytesTotal: bigint };

/** Where an instance was placed last. Its workspace is there, unless the node was lost. */
export type Place = {
  readonly nodeId: NodeId;
  readonly location: Location;
  /** The attempt that was placed there: the current one, or an earlier one where the current one was never placed. */
  readonly attempt: number;
  /** The node was revoked: nothing of the instance is left. */
  readonly lost: boolean;
  readonly reachable: boolean;
};

/** A GPU that is an instance's. */
export type InstanceGpu = Pick<FleetGpu, "uuid" | "model" | "memoryMib" | "simulated"> & {
  /** Why it is not healthy, as its node last said. Absent: it is. */
  readonly trouble?: string;
};

/** What the kernel really applies to a container, as its agent read it back. */
export type Isolation = {
  /** CapEff, as a decimal number. */
  readonly effectiveCapabilities: string;
  readonly noNewPrivileges: boolean;
  readonly seccompMode: number;
  readonly seccompFilters: number;
};

/** An instance. */
export type Instance = {
  readonly id: InstanceId;
  readonly organizationId: OrganizationId;
  /** Defaults filled in. */
  readonly spec: InstanceSpec;
  readonly createdBy: string;
  readonly createTime: Date;
  readonly updateTime: Date;
  /** Counts the changes, from 1. */
  readonly version: bigint;
  /** Counts the events, from 1. */
  readonly eventCount: bigint;
  /** From 1; never goes back. */
  readonly attempt: number;
  /** How often the restart policy restarted it since it was last started. */
  readonly restartCount: number;
  readonly status: Status;
  readonly place: Place | undefined;
  /** The GPUs that are its own now. */
  readonly gpus: readonly InstanceGpu[];
  /** Of the current attempt's container. */
  readonly startTime: Date | undefined;
  readonly finishTime: Date | undefined;
  readonly exitCode: number | undefined;
  /** Of the last attempt that knew. */
  readonly imageDigest: string;
  readonly imageId: string;
  readonly isolation: Isolation | undefined;
};

/** The reason of a status. */
export function reasonOf(status: Status): Reason {
  switch (status.state) {
    case "PENDING":
      return status.message === "" ? "" : "WAITING_FOR_CAPACITY";
    case "SCHEDULED":
      return status.notBeforeTime === undefined ? "" : "RESTART_BACKOFF";
    case "STOPPED":
    case "FAILED":
      return status.reason;
    case "PULLING":
    case "CREATING":
    case "RUNNING":
    case "STOPPING":
    case "DELETED":
      return "";
  }
}

/** The message of a status. */
export function messageOf(status: Status): string {
  return "message" in status ? status.message : "";
}

/** Whether the instance holds GPUs, CPU and memory of a node: from placement until its attempt has ended there. */
export function holdsAllocation(instance: Pick<Instance, "status">): boolean {
  switch (instance.status.state) {
    case "SCHEDULED":
    case "PULLING":
    case "CREATING":
    case "RUNNING":
      return true;
    case "STOPPING":
      return !instance.status.ended;
    case "PENDING":
    case "STOPPED":
    case "FAILED":
    case "DELETED":
      return false;
  }
}

/** What shall be with an instance on its node. */
export type Desired = {
  readonly nodeId: NodeId;
  readonly attempt: number;
  readonly state: "RUNNING" | "STOPPED" | "REMOVED";
  readonly notBeforeTime: Date | undefined;
};

/** What shall be with an instance on its node; undefined where no node has anything of it to keep or remove. */
export function desiredOf(instance: Pick<Instance, "status" | "place">): Desired | undefined {
  const { place, status } = instance;
  if (place === undefined || place.lost || status.state === "DELETED") return undefined;
  const { nodeId, attempt } = place;
  switch (status.state) {
    case "SCHEDULED":
      return { nodeId, attempt, state: "RUNNING", notBeforeTime: status.notBeforeTime };
    case "PULLING":
    case "CREATING":
    case "RUNNING":
      return { nodeId, attempt, state: "RUNNING", notBeforeTime: undefined };
    case "STOPPING":
      return { nodeId, attempt, state: status.after === "delete" ? "REMOVED" : "STOPPED", notBeforeTime: undefined };
    // PENDING: the attempt that was placed, not the one that waits, which the node must not take for ended.
    case "PENDING":
    case "STOPPED":
    case "FAILED":
      return { nodeId, attempt, state: "STOPPED", notBeforeTime: undefined };
  }
}

/** Whether two wishes are the same. */
export function isSameDesired(a: Desired | undefined, b: Desired | undefined): boolean {
  if (a === undefined || b === undefined) return a === b;
  return (
    a.nodeId === b.nodeId &&
    a.attempt === b.attempt &&
    a.state === b.state &&
    a.notBeforeTime?.getTime() === b.notBeforeTime?.getTime()
  );
}

/** The node that a new attempt must go to, because the instance's workspace is there. */
export function pinnedNodeOf(instance: Pick<Instance, "place">): NodeId | undefined {
  return instance.place === undefined || instance.place.lost ? undefined : instance.place.nodeId;
}
