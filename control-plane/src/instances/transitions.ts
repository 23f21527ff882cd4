// What the scheduler and a node make of an instance, as pure functions with the time as an argument. Attempts only
// count up, an attempt only moves forward, and what is said about an attempt that is over changes nothing: so a report
// may come twice, late, or across a stop, and the instance is still right.
import type { NodeId } from "@clodei/proto/ids";
import type { Placement } from "../placement/service.ts";
import {
  deleted,
  draftOf,
  moved,
  queueNextAttempt,
  restartByPolicy,
  restartsByPolicy,
  requeueByPolicy,
  silent,
  type EventDraft,
  type Outcome,
} from "./attempts.ts";
import {
  holdsAllocation,
  type FailedReason,
  type Instance,
  type InstanceGpu,
  type Isolation,
  type PullProgress,
  type Reason,
  type StoppedReason,
} from "./model.ts";

/** What an agent says about an attempt. */
export type AttemptReport = {
  readonly attempt: number;
  readonly phase: "PULLING" | "CREATING" | "RUNNING" | "STOPPING" | "ENDED" | "REMOVED";
  readonly reason: Reason;
  readonly message: string;
  readonly exitCode: number | undefined;
  readonly progress: PullProgress | undefined;
  readonly imageDigest: string;
  readonly imageId: string;
  readonly startTime: Date | undefined;
  readonly finishTime: Date | undefined;
  readonly isolation: Isolation | undefined;
};

// ---- The scheduler.

/** Gives a waiting instance its place. */
export function schedule(instance: Instance, placement: Placement): Outcome {
  if (instance.status.state !== "PENDING") return "unchanged";
  return moved({
    ...instance,
    status: { state: "SCHEDULED", notBeforeTime: undefined, message: "" },
    place: {
      nodeId: placement.nodeId,
      location: placement.location,
      attempt: instance.attempt,
      lost: false,
      reachable: true,
    },
    gpus: placement.gpus.map(({ uuid, model, memoryMib, simulated }) => ({ uuid, model, memoryMib, simulated })),
    // The row may have the last attempt's: a customer's start may not write what a node's kernel applied.
    isolation: undefined,
  });
}

/** What is said of the same wait changes at most so often. */
const explainIntervalMs = 10_000;

/**
 * Says why an instance still waits. That it waits is one event; what the text says later is told by the instance alone,
 * and not at once: a fleet that comes and goes would write without end.
 */
export function explainPending(instance: Instance, message: string, now: Date): Outcome {
  const { status } = instance;
  if (status.state !== "PENDING" || status.message === message) return "unchanged";
  const next: Instance = { ...instance, status: { ...status, message } };
  if (status.message === "") return moved(next);
  return now.getTime() - instance.updateTime.getTime() < explainIntervalMs ? "unchanged" : silent(next);
}

/** Fails an instance that waited for too long. */
export function expire(instance: Instance, now: Date): Outcome {
  const { status } = instance;
  if (status.state !== "PENDING" || status.deadline > now) return "unchanged";
  const last = status.message === "" ? "" : ` Last: ${status.message}.`;
  const message = `No capacity within placement_timeout.${last}`;
  return moved({ ...instance, status: { state: "FAILED", reason: "PLACEMENT_TIMED_OUT", message } });
}

/** The node's revocation: what was there is lost. */
export function loseNode(instance: Instance, now: Date): Outcome {
  const { place, status } = instance;
  if (place === undefined || place.lost || status.state === "DELETED") return "unchanged";
  const lost: Instance = { ...instance, place: { ...place, lost: true, reachable: false }, gpus: [] };
  const message = "Its node was taken out of service; the workspace is lost.";
  if (status.state === "STOPPING" && status.after === "delete") return deleted(lost, now);
  if (status.state === "PENDING") return silent(lost);
  if (status.state === "STOPPED" || status.state === "FAILED") {
    return moved({ ...lost, status: { ...status, message } });
  }
  const finishTime = lost.startTime === undefined ? undefined : now;
  return moved({ ...lost, finishTime, status: { state: "FAILED", reason: "NODE_LOST", message } });
}

/** Notes whether the node answers. The state stays the last that is known. */
export function noteReachability(instance: Instance, reachable: boolean): Outcome {
  const { place, status } = instance;
  if (place === undefined || place.lost || place.reachable === reachable || status.state === "DELETED") {
    return "unchanged";
  }
  const next = { ...instance, place: { ...place, reachable } };
  if (!holdsAllocation(instance)) return silent(next);
  const message = reachable ? "Its node answers again." : "Its node does not answer. What runs goes on.";
  return { next, events: [{ ...draftOf(next), message }] };
}

/** What one event says of each GPU. All of it stands beside the GPU. */
const maxTroubleCharacters = 256;

/**
 * Notes which of the instance's GPUs are unhealthy. They stay its own, and what runs goes on: only its customer knows
 * whether it still can.
 *
 * @param troubles What is wrong with GPUs of its node, by UUID.
 */
export function noteGpuHealth(instance: Instance, troubles: ReadonlyMap<string, string>): Outcome {
  if (!holdsAllocation(instance)) return "unchanged";
  const before = new Map(instance.gpus.map(({ uuid, trouble }) => [uuid, trouble]));
  const gpus = instance.gpus.map(({ trouble: _, ...gpu }): InstanceGpu => {
    const trouble = troubles.get(gpu.uuid);
    return trouble === undefined ? gpu : { ...gpu, trouble };
  });
  if (gpus.every(({ uuid, trouble }) => trouble === before.get(uuid))) return "unchanged";
  const next = { ...instance, gpus };
  const fell = gpus.filter(({ uuid, trouble }) => trouble !== undefined && before.get(uuid) === undefined);
  const rose = gpus.filter(({ uuid, trouble }) => trouble === undefined && before.get(uuid) !== undefined);
  const events: EventDraft[] = [];
  if (fell.length > 0) {
    const goesOn = instance.status.state === "RUNNING" ? " What runs goes on." : "";
    const why = fell.map(({ uuid, trouble = "" }) => `${uuid} is unhealthy: ${trouble.slice(0, maxTroubleCharacters)}`);
    events.push({ ...draftOf(next), reason: "GPU_UNHEALTHY", message: `${why.join("; ")}.${goesOn}` });
  }
  if (rose.length > 0) {
    const message = `Healthy again: ${rose.map(({ uuid }) => uuid).join(", ")}.`;
    events.push({ ...draftOf(next), reason: "GPU_RECOVERED", message });
  }
  return { next, events };
}

// ---- The node.

/** What a node reports of an attempt. */
export function applyReport(instance: Instance, nodeId: NodeId, report: AttemptReport, now: Date): Outcome {
  const { place, status } = instance;
  if (place === undefined || place.lost || place.nodeId !== nodeId || place.attempt !== report.attempt) {
    return "unchanged";
  }
  if (report.phase === "REMOVED" && status.state === "STOPPING" && status.after === "delete") {
    return deleted({ ...instance, gpus: [] }, now);
  }
  // What holds an allocation was placed with its current attempt, so the report is of that one.
  if (!holdsAllocation(instance)) return "unchanged";
  const known: Instance = {
    ...instance,
    startTime: instance.startTime ?? report.startTime,
    imageDigest: report.imageDigest === "" ? instance.imageDigest : report.imageDigest,
    imageId: report.imageId === "" ? instance.imageId : report.imageId,
    isolation: report.isolation ?? instance.isolation,
  };
  switch (report.phase) {
    case "PULLING":
      return applyPulling(known, report);
    case "CREATING":
      if (status.state !== "SCHEDULED" && status.state !== "PULLING") return "unchanged";
      return moved({ ...known, status: { state: "CREATING" } });
    case "RUNNING":
      return applyRunning(instance, known, report, now);
    case "STOPPING":
      if (status.state === "STOPPING") return "unchanged";
      return moved({ ...known, status: { state: "STOPPING", after: "end", ended: false, message: report.message } });
    case "ENDED":
    case "REMOVED":
      return end(known, report, now);
  }
}

/** The node came back without the container of an attempt that ran. */
export function loseContainer(instance: Instance, bootChanged: boolean, now: Date): Outcome {
  if (instance.status.state !== "RUNNING") return "unchanged";
  const message = bootChanged
    ? "Its node restarted and came back without the container."
    : "Its node came back without the container.";
  return end(instance, { reason: "NODE_LOST", message, exitCode: undefined, finishTime: undefined }, now);
}

function applyPulling(instance: Instance, report: AttemptReport): Outcome {
  const { status } = instance;
  const { progress } = report;
  if (status.state === "SCHEDULED") return moved({ ...instance, status: { state: "PULLING", progress } });
  if (status.state !== "PULLING" || progress === undefined) return "unchanged";
  const done = status.progress?.bytesDone ?? -1n;
  const total = status.progress?.bytesTotal ?? -1n;
  // Progress is no event, and one that was overtaken is not news.
  if (progress.bytesDone < done || (progress.bytesDone === done && progress.bytesTotal <= total)) return "unchanged";
  return silent({ ...instance, status: { state: "PULLING", progress } });
}

function applyRunning(instance: Instance, known: Instance, report: AttemptReport, now: Date): Outcome {
  const startTime = known.startTime ?? now;
  switch (instance.status.state) {
    case "SCHEDULED":
    case "PULLING":
    case "CREATING":
      return moved({ ...known, startTime, status: { state: "RUNNING" } });
    case "STOPPING":
      // It was asked to stop while it started: that it ran is still worth knowing.
      return instance.startTime === undefined && report.startTime !== undefined ? silent(known) : "unchanged";
    case "PENDING":
    case "RUNNING":
    case "STOPPED":
    case "FAILED":
    case "DELETED":
      return "unchanged";
  }
}

type End = Pick<AttemptReport, "reason" | "message" | "exitCode" | "finishTime">;

function end(instance: Instance, report: End, now: Date): Outcome {
  const { status } = instance;
  const finishTime = report.finishTime ?? (instance.startTime === undefined ? undefined : now);
  const ended: Instance = { ...instance, exitCode: report.exitCode, finishTime, gpus: [] };
  if (status.state === "STOPPING" && status.after !== "end") {
    if (status.after === "delete") return moved({ ...ended, status: { ...status, ended: true } });
    const stopped: Instance = {
      ...ended,
      status: { state: "STOPPED", reason: stoppedReasonOf(report.reason), message: "" },
    };
    if (status.after === "stop") return moved(stopped);
    const next = queueNextAttempt(stopped, now);
    return { next, events: [draftOf(stopped), draftOf(next)] };
  }
  const over: Instance = { ...ended, status: judgeEnd(instance, report) };
  if (!restartsByPolicy(over)) return moved(over);
  // The same GPUs would do the same again, where one of them is why it ended.
  const isIll = instance.gpus.some(({ trouble }) => trouble !== undefined);
  const next = isIll ? requeueByPolicy(over, now) : restartByPolicy({ ...over, gpus: instance.gpus }, now);
  return { next, events: [draftOf(over), draftOf(next)] };
}

/** After a stop by request the instance is stopped, however its process took it. */
function stoppedReasonOf(reason: Reason): StoppedReason {
  return reason === "COMPLETED" || reason === "MAX_RUN_TIME_REACHED" ? reason : "STOPPED_BY_REQUEST";
}

function judgeEnd(instance: Instance, { reason, message, exitCode }: End): Instance["status"] {
  switch (reason) {
    case "COMPLETED":
    case "STOPPED_BY_REQUEST":
    case "MAX_RUN_TIME_REACHED":
      return { state: "STOPPED", reason, message };
    case "IMAGE_NOT_ALLOWED":
    case "IMAGE_NOT_FOUND":
    case "PULL_FAILED":
    case "START_FAILED":
    case "OUT_OF_MEMORY":
    case "EXITED_NONZERO":
    case "NODE_LOST":
    case "POLICY_VIOLATION":
    case "NODE_ERROR":
    case "PULL_UNAUTHORIZED":
    case "PULL_INTERRUPTED":
    case "PULL_STALLED":
    case "IMAGE_DAMAGED":
    case "REGISTRY_UNREACHABLE":
      return {
        state: "FAILED",
        reason,
        message: message === "" ? describeFailure(instance, reason, exitCode) : message,
      };
    // A node has no say about these: go by the exit code.
    case "":
    case "WAITING_FOR_CAPACITY":
    case "RESTART_BACKOFF":
    case "PLACEMENT_TIMED_OUT":
    case "GPU_UNHEALTHY":
    case "GPU_RECOVERED": {
      if (exitCode === 0) return { state: "STOPPED", reason: "COMPLETED", message };
      const failed = exitCode === undefined ? "NODE_ERROR" : "EXITED_NONZERO";
      return { state: "FAILED", reason: failed, message: describeFailure(instance, failed, exitCode) };
    }
  }
}

function describeFailure(instance: Instance, reason: FailedReason, exitCode: number | undefined): string {
  if (reason === "EXITED_NONZERO") return `The process ended with exit code ${exitCode ?? "unknown"}.`;
  if (reason === "OUT_OF_MEMORY")
    return `The process used more than its ${instance.spec.memoryMib ?? 0} MiB of memory.`;
  return "";
}
