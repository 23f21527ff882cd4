// What is known of a container, from the engine's long answer.
import { containerLabels } from "@clodei/proto/node-link";
import type { AttemptKey } from "./container-body.ts";
import type { ContainerDetails } from "./engine-answers.ts";
import { attemptOf } from "./events.ts";
import { isEndLost } from "./lost-end.ts";

/** What is known of a container. */
export type ObservedContainer = AttemptKey & {
  readonly containerId: string;
  readonly generation: bigint;
  /** One whose removal was cut off is what it was before. */
  readonly state: "created" | "running" | "exited";
  /** How the process ended; undefined until it did, and where the engine lost it. */
  readonly exitCode: number | undefined;
  readonly oomKilled: boolean;
  readonly startTime: Date | undefined;
  readonly finishTime: Date | undefined;
  readonly imageId: string;
  readonly pid: number;
};

/** Whether the container's process was ever started. */
export function hasRun(container: ContainerDetails): boolean {
  return container.State.Running || timeOf(container.State.StartedAt) !== undefined;
}

/** Undefined for a container whose labels name no attempt. */
export function observedContainer(container: ContainerDetails): ObservedContainer | undefined {
  const key = attemptOf(container.Config.Labels);
  if (key === undefined) return undefined;
  const generation = container.Config.Labels[containerLabels.generation] ?? "";
  const ran = hasRun(container);
  const state = container.State.Running ? "running" : ran ? "exited" : "created";
  const finishTime = container.State.Running ? undefined : timeOf(container.State.FinishedAt);
  const { ExitCode: exitCode } = container.State;
  return {
    ...key,
    containerId: container.Id,
    generation: /^[0-9]{1,20}$/.test(generation) ? BigInt(generation) : 0n,
    state,
    exitCode: container.State.Running || !ran || isEndLost(exitCode, finishTime) ? undefined : exitCode,
    oomKilled: container.State.OOMKilled,
    startTime: startTimeOf(container),
    finishTime,
    imageId: container.Image,
    pid: container.State.Pid,
  };
}

/** When it started. The engine notes that when it hears that the program runs; a short one may have ended by then. */
export function startTimeOf({ State: state }: ContainerDetails): Date | undefined {
  const startTime = timeOf(state.StartedAt);
  const finishTime = state.Running ? undefined : timeOf(state.FinishedAt);
  return startTime !== undefined && finishTime !== undefined && finishTime < startTime ? finishTime : startTime;
}

/** A time of the engine's, which writes the year 1 for "never". */
function timeOf(text: string): Date | undefined {
  const time = new Date(text);
  return Number.isNaN(time.getTime()) || time.getUTCFullYear() <= 1 ? undefined : time;
}
