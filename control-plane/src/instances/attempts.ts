// How a change of an instance is told, and how one attempt follows another.
import { RestartPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { messageOf, reasonOf, type FailedReason, type Instance, type Reason, type State } from "./model.ts";

/** Something to be written to the list of events. */
export type EventDraft = {
  readonly attempt: number;
  readonly state: State;
  readonly reason: Reason;
  readonly message: string;
};

/** An instance after something happened, and the events that tell of it. */
export type Change = { readonly next: Instance; readonly events: readonly EventDraft[] };

/** What became of something that was asked for or reported: a change, or nothing to change. */
export type Outcome = Change | "unchanged";

/** What became of a customer's command: "refused" where the instance is deleted or being deleted. */
export type CommandOutcome = Outcome | "refused";

const defaultPlacementTimeoutMs = 600_000;
/** After that many the failure is not one that a restart mends. */
const maxRestartsOnFailure = 5;
const maxBackoffSeconds = 60;

/** Whether the restart policy asks for another attempt after this end. */
export function restartsByPolicy({ status, spec, restartCount }: Instance): boolean {
  const failed = status.state === "FAILED" && isMendable(status.reason);
  const completed = status.state === "STOPPED" && status.reason === "COMPLETED";
  if (spec.restartPolicy === RestartPolicy.ON_FAILURE) return failed && restartCount < maxRestartsOnFailure;
  return spec.restartPolicy === RestartPolicy.ALWAYS && (failed || completed);
}

/** Whether another attempt may go better. An image that is refused or absent will be so again. */
function isMendable(reason: FailedReason): boolean {
  switch (reason) {
    case "PULL_FAILED":
    case "START_FAILED":
    case "OUT_OF_MEMORY":
    case "EXITED_NONZERO":
    case "NODE_LOST":
    case "NODE_ERROR":
    case "PULL_INTERRUPTED":
    case "PULL_STALLED":
    case "IMAGE_DAMAGED":
    case "REGISTRY_UNREACHABLE":
      return true;
    case "PLACEMENT_TIMED_OUT":
    case "IMAGE_NOT_ALLOWED":
    case "IMAGE_NOT_FOUND":
    case "POLICY_VIOLATION":
    case "PULL_UNAUTHORIZED":
      return false;
  }
}

/** The next attempt on the same node with the same GPUs, after a backoff of 1, 2, 4 … 60 seconds. */
export function restartByPolicy(instance: Instance, now: Date): Instance {
  const { place, restartCount } = instance;
  const attempt = instance.attempt + 1;
  const backoffMs = Math.min(maxBackoffSeconds, 2 ** restartCount) * 1000;
  const why = [reasonOf(instance.status), messageOf(instance.status)].filter((part) => part !== "").join(": ");
  return {
    ...withoutAttempt(instance),
    attempt,
    restartCount: restartCount + 1,
    place: place && { ...place, attempt },
    status: {
      state: "SCHEDULED",
      notBeforeTime: new Date(now.getTime() + backoffMs),
      message: `Attempt ${instance.attempt} ended (${why}).`,
    },
  };
}

/** The next attempt by policy where its GPUs are not to be used again: in the queue for others of its node. */
export function requeueByPolicy(instance: Instance, now: Date): Instance {
  return { ...queueNextAttempt(instance, now), restartCount: instance.restartCount + 1 };
}

/** The next attempt, in the queue for capacity. */
export function queueNextAttempt(instance: Instance, now: Date): Instance {
  const timeoutMs = placementTimeoutMs(instance);
  return {
    ...withoutAttempt(instance),
    attempt: instance.attempt + 1,
    restartCount: 0,
    gpus: [],
    status: { state: "PENDING", queueTime: now, deadline: new Date(now.getTime() + timeoutMs), message: "" },
  };
}

/** How long an instance may wait for capacity. */
export function placementTimeoutMs({ spec }: Pick<Instance, "spec">): number {
  const timeout = spec.placementTimeout;
  return timeout === undefined ? defaultPlacementTimeoutMs : Number(timeout.seconds) * 1000 + timeout.nanos / 1e6;
}

function withoutAttempt(instance: Instance): Instance {
  return { ...instance, startTime: undefined, finishTime: undefined, exitCode: undefined, isolation: undefined };
}

/** Nothing is left of it. */
export function deleted(instance: Instance, now: Date): Change {
  return moved({ ...instance, status: { state: "DELETED", deleteTime: now } });
}

/** A change that is an event. */
export function moved(next: Instance): Change {
  return { next, events: [draftOf(next)] };
}

/** A change that is no event. */
export function silent(next: Instance): Change {
  return { next, events: [] };
}

/** The event that tells of an instance as it is. */
export function draftOf(instance: Instance): EventDraft {
  const { attempt, status } = instance;
  return { attempt, state: status.state, reason: reasonOf(status), message: messageOf(status) };
}
