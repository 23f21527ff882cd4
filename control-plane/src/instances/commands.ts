// What a customer may ask of an instance, in every state, as pure functions. The newest wish wins; a wish that is
// fulfilled already changes nothing; only a deletion is final.
import { deleted, moved, queueNextAttempt, type Change, type CommandOutcome } from "./attempts.ts";
import type { Instance } from "./model.ts";

/** Stops. An instance that never got a node is stopped at once. */
export function stop(instance: Instance): CommandOutcome {
  const { status } = instance;
  switch (status.state) {
    case "PENDING":
      return moved({ ...instance, status: { state: "STOPPED", reason: "STOPPED_BY_REQUEST", message: "" } });
    case "SCHEDULED":
    case "PULLING":
    case "CREATING":
    case "RUNNING":
      return moved({ ...instance, status: { state: "STOPPING", after: "stop", ended: false, message: "" } });
    case "STOPPING":
      return status.after === "start" || status.after === "end"
        ? moved({ ...instance, status: { ...status, after: "stop", message: "" } })
        : "unchanged";
    case "STOPPED":
    case "FAILED":
    case "DELETED":
      return "unchanged";
  }
}

/** Starts a new attempt of one that is stopped or failed; of one that is being stopped, once it has. */
export function start(instance: Instance, now: Date): CommandOutcome {
  const { status } = instance;
  switch (status.state) {
    case "PENDING":
    case "SCHEDULED":
    case "PULLING":
    case "CREATING":
    case "RUNNING":
      return "unchanged";
    case "STOPPING":
      if (status.after === "delete") return "refused";
      return status.after === "start" ? "unchanged" : startAfterStop(instance, status.ended);
    case "STOPPED":
    case "FAILED":
      return moved(queueNextAttempt(instance, now));
    case "DELETED":
      return "refused";
  }
}

/** Stops what runs and starts it again; starts what does not run. */
export function restart(instance: Instance, now: Date): CommandOutcome {
  switch (instance.status.state) {
    case "SCHEDULED":
    case "PULLING":
    case "CREATING":
    case "RUNNING":
      return startAfterStop(instance, false);
    case "PENDING":
    case "STOPPING":
    case "STOPPED":
    case "FAILED":
    case "DELETED":
      return start(instance, now);
  }
}

/** Deletes: at once where no node has anything of it, else once its node has removed everything. */
export function remove(instance: Instance, now: Date): CommandOutcome {
  const { status, place } = instance;
  const message = "being deleted";
  switch (status.state) {
    case "PENDING":
    case "STOPPED":
    case "FAILED":
      if (place === undefined || place.lost) return deleted(instance, now);
      return moved({ ...instance, status: { state: "STOPPING", after: "delete", ended: true, message } });
    case "SCHEDULED":
    case "PULLING":
    case "CREATING":
    case "RUNNING":
      return moved({ ...instance, status: { state: "STOPPING", after: "delete", ended: false, message } });
    case "STOPPING":
      if (status.after === "delete") return "unchanged";
      return moved({ ...instance, status: { ...status, after: "delete", message } });
    case "DELETED":
      return "unchanged";
  }
}

function startAfterStop(instance: Instance, ended: boolean): Change {
  return moved({ ...instance, status: { state: "STOPPING", after: "start", ended, message: "restarting" } });
}
