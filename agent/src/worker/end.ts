// How an attempt ended, from what the engine shows of its container and what the agent did to it.

import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import type { ObservedContainer } from "../containers/observed.ts";
import type { AttemptRecord } from "../journal/attempt-table.ts";
import type { StatusPart } from "./attempt-book.ts";
import type { BootClock } from "./boot-clock.ts";

/** The parts of an ENDED status. */
export function describeEnd(
  container:
    | Pick<ObservedContainer, "state" | "exitCode" | "oomKilled" | "startTime" | "finishTime" | "imageId">
    | undefined,
  record: AttemptRecord | undefined,
  clock: BootClock,
): StatusPart {
  if (container === undefined || container.startTime === undefined) {
    return { ...reasonToStop(record), ...(container === undefined ? {} : { imageId: imageIdOf(container.imageId) }) };
  }
  const { finishTime, exitCode } = container;
  return {
    ...reasonOfEnd(container, record, clock),
    ...(exitCode === undefined ? {} : { exitCode }),
    ...(finishTime === undefined ? {} : { finishTime: timestampFromDate(finishTime) }),
    startTime: timestampFromDate(container.startTime),
    imageId: imageIdOf(container.imageId),
  };
}

interface Reason {
  readonly reason: InstanceReason;
  readonly message: string;
}

function reasonOfEnd(
  container: Pick<ObservedContainer, "exitCode" | "oomKilled" | "finishTime">,
  record: AttemptRecord | undefined,
  clock: BootClock,
): Reason {
  const { exitCode, finishTime } = container;
  if (isOfEarlierBoot(record, clock) && (finishTime === undefined || finishTime.getTime() >= bootTimeMs(clock))) {
    return { reason: InstanceReason.NODE_ERROR, message: "the node was restarted while the container ran" };
  }
  // A process that was done before the stop began was not stopped: both times are of one clock.
  const stopped =
    record !== undefined &&
    record.stopReason !== "none" &&
    (finishTime?.getTime() ?? Number.POSITIVE_INFINITY) >= record.stopTimeMs;
  if (stopped) return reasonToStop(record);
  if (container.oomKilled) {
    return {
      reason: InstanceReason.OUT_OF_MEMORY,
      message: "the container used more memory than it has and was killed",
    };
  }
  if (exitCode === undefined) {
    return {
      reason: InstanceReason.NODE_ERROR,
      message: "the container engine was killed when the container ended, and nobody knows how it ended",
    };
  }
  if (exitCode === 0) return { reason: InstanceReason.COMPLETED, message: "" };
  return { reason: InstanceReason.EXITED_NONZERO, message: `the process ended with code ${exitCode}` };
}

function reasonToStop(record: AttemptRecord | undefined): Reason {
  switch (record?.stopReason) {
    case "max_run_time":
      return {
        reason: InstanceReason.MAX_RUN_TIME_REACHED,
        message: "the container ran for max_run_time and was stopped",
      };
    case "policy":
      return {
        reason: InstanceReason.POLICY_VIOLATION,
        message: "the container was stopped because it broke a rule of the node",
      };
    case "requested":
    case "gone":
    case "none":
    case undefined:
      return { reason: InstanceReason.STOPPED_BY_REQUEST, message: "" };
  }
}

function isOfEarlierBoot(record: AttemptRecord | undefined, clock: BootClock): boolean {
  return record !== undefined && record.bootId !== "" && record.bootId !== clock.bootId;
}

function bootTimeMs(clock: BootClock): number {
  return Date.now() - clock.nowMs();
}

function imageIdOf(imageId: string): string {
  return /^sha256:[0-9a-f]{64}$/.test(imageId) ? imageId : "";
}
