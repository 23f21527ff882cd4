// Desired instances as the plan takes them.

import { timestampMs } from "@bufbuild/protobuf/wkt";
import { DesiredState } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { ContainerSpec, DesiredInstance } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { InstanceId } from "@clodei/proto/ids";
import type { DesiredAttempt, Needs } from "./model.ts";

/** `toBootMs` turns a time of the control plane's clock into one of the boot's. */
export function desiredAttempt(instanceId: InstanceId, instance: DesiredInstance, toBootMs: number): DesiredAttempt {
  return {
    instanceId,
    attempt: instance.attempt,
    state: desiredStateOf(instance.state),
    notBeforeMs: instance.notBeforeTime === undefined ? 0 : timestampMs(instance.notBeforeTime) + toBootMs,
    needs: needsOf(instance.container) ?? { gpuUuids: [], cpuMillis: 0, memoryMib: 0 },
  };
}

/** What a specification takes of the node. */
export function needsOf(spec: ContainerSpec | undefined): Needs | undefined {
  if (spec === undefined) return undefined;
  return { gpuUuids: spec.gpuUuids, cpuMillis: spec.cpuMillis, memoryMib: spec.memoryMib };
}

function desiredStateOf(state: DesiredState): DesiredAttempt["state"] {
  if (state === DesiredState.RUNNING) return "running";
  // What is not understood is not taken for a removal: that would cost a customer's data.
  return state === DesiredState.REMOVED ? "removed" : "stopped";
}

/** When an attempt's time is up, on the boot's clock; undefined without a limit or before its start. */
export function runDeadlineMs(
  limit: { readonly seconds: bigint; readonly nanos: number } | undefined,
  startedMs: bigint,
): number | undefined {
  if (limit === undefined || startedMs === 0n) return undefined;
  return Number(startedMs) + Number(limit.seconds) * 1000 + limit.nanos / 1e6;
}
