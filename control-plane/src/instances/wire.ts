// Instances and events as messages of the contract, and what agents say as values of ours.
import { create, toBinary } from "@bufbuild/protobuf";
import { timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type AttemptPhase,
  AttemptPhaseSchema,
  type AttemptStatus,
  type ContainerSpec,
  ContainerSpecSchema,
  type DesiredInstance,
  DesiredInstanceSchema,
  DesiredState,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import {
  ActorKind,
  type Instance as InstanceMessage,
  type InstanceEvent as InstanceEventMessage,
  InstanceEventSchema,
  InstanceReason,
  InstanceReasonSchema,
  InstanceSchema,
  type InstanceSpec,
  InstanceState,
  PullProgressSchema,
} from "@clodei/proto/gen/clodei/v1/instance";
import { GpuHealth } from "@clodei/proto/gen/clodei/v1/inventory";
import { LocationSchema } from "@clodei/proto/gen/clodei/v1/location";
import { desiredOf, messageOf, reasonOf, type Instance, type InstanceGpu, type Reason, type State } from "./model.ts";
import type { AttemptReport } from "./transitions.ts";

/** Who did something. */
export type Actor = { readonly kind: "CUSTOMER" | "PLATFORM" | "NODE" | "SYSTEM"; readonly id: string };

/** An event as it was recorded. */
export type InstanceEvent = {
  readonly sequence: bigint;
  readonly time: Date;
  readonly actor: Actor;
  readonly attempt: number;
  readonly state: State;
  readonly reason: Reason;
  readonly message: string;
};

/** An instance as its customer sees it. */
export function toInstanceMessage(instance: Instance): InstanceMessage {
  const { status, place, startTime, finishTime } = instance;
  return create(InstanceSchema, {
    id: instance.id,
    organizationId: instance.organizationId,
    spec: instance.spec,
    state: InstanceState[status.state],
    reason: toReason(reasonOf(status)),
    message: messageOf(status),
    attempt: instance.attempt,
    gpus: instance.gpus.map(toGpuMessage),
    imageDigest: instance.imageDigest,
    imageId: instance.imageId,
    version: instance.version,
    createdBy: instance.createdBy,
    createTime: timestampFromDate(instance.createTime),
    updateTime: timestampFromDate(instance.updateTime),
    restartCount: instance.restartCount,
    ...(instance.exitCode !== undefined && { exitCode: instance.exitCode }),
    ...(place && { location: create(LocationSchema, place.location), nodeReachable: place.reachable }),
    ...(startTime && { startTime: timestampFromDate(startTime) }),
    ...(finishTime && { finishTime: timestampFromDate(finishTime) }),
    ...(status.state === "DELETED" && { deleteTime: timestampFromDate(status.deleteTime) }),
    ...(status.state === "PENDING" && { placementDeadline: timestampFromDate(status.deadline) }),
    ...(status.state === "PULLING" && status.progress && { pullProgress: create(PullProgressSchema, status.progress) }),
  });
}

function toGpuMessage({ trouble, ...gpu }: InstanceGpu) {
  const health = trouble === undefined ? GpuHealth.HEALTHY : GpuHealth.UNHEALTHY;
  return { ...gpu, health, healthMessage: trouble ?? "" };
}

/**
 * What the feed keeps of a change: all but the specification, which can have 1 MiB, never changes, and stands in the
 * instance's row. Whoever reads the feed adds it.
 */
export function toChangePayload(instance: Instance): Uint8Array {
  const message = toInstanceMessage(instance);
  message.spec = undefined;
  return toBinary(InstanceSchema, message);
}

/** An event as its customer sees it. */
export function toEventMessage(event: InstanceEvent): InstanceEventMessage {
  return create(InstanceEventSchema, {
    sequence: event.sequence,
    time: timestampFromDate(event.time),
    // Which node it was is the platform's business.
    actor: { kind: ActorKind[event.actor.kind], id: event.actor.kind === "CUSTOMER" ? event.actor.id : "" },
    attempt: event.attempt,
    state: InstanceState[event.state],
    reason: toReason(event.reason),
    message: event.message,
  });
}

/** What shall be with an instance on its node, as the node is told. */
export function toDesiredInstance(instance: Instance): DesiredInstance | undefined {
  const desired = desiredOf(instance);
  if (desired === undefined) return undefined;
  return create(DesiredInstanceSchema, {
    instanceId: instance.id,
    attempt: desired.attempt,
    state: DesiredState[desired.state],
    ...(desired.state === "RUNNING" && {
      container: toContainerSpec(
        instance.spec,
        instance.gpus.map((gpu) => gpu.uuid),
      ),
    }),
    ...(desired.notBeforeTime && { notBeforeTime: timestampFromDate(desired.notBeforeTime) }),
  });
}

/** The container of a specification whose defaults are filled in. */
export function toContainerSpec(spec: InstanceSpec, gpuUuids: readonly string[]): ContainerSpec {
  return create(ContainerSpecSchema, {
    image: spec.image,
    command: spec.command,
    args: spec.args,
    env: spec.env,
    gpuUuids: [...gpuUuids],
    cpuMillis: spec.cpuMillis ?? 0,
    memoryMib: spec.memoryMib ?? 0,
    pullPolicy: spec.pullPolicy,
    ...(spec.stopGrace && { stopGrace: spec.stopGrace }),
    ...(spec.maxRunTime && { maxRunTime: spec.maxRunTime }),
  });
}

/** What an agent says of an attempt. A reason of a newer agent that we do not know says nothing to us. */
export function toAttemptReport(status: AttemptStatus): AttemptReport | undefined {
  const phase = phaseOf(status.phase);
  if (phase === undefined) return undefined;
  const { isolation } = status;
  return {
    attempt: status.attempt,
    phase,
    reason: fromReason(status.reason),
    message: status.message,
    exitCode: status.exitCode,
    progress: status.pullProgress && {
      bytesDone: status.pullProgress.bytesDone,
      bytesTotal: status.pullProgress.bytesTotal,
    },
    imageDigest: status.imageDigest,
    imageId: status.imageId,
    startTime: status.startTime && timestampDate(status.startTime),
    finishTime: status.finishTime && timestampDate(status.finishTime),
    isolation: isolation && {
      effectiveCapabilities: String(isolation.effectiveCapabilities),
      noNewPrivileges: isolation.noNewPrivileges,
      seccompMode: isolation.seccompMode,
      seccompFilters: isolation.seccompFilters,
    },
  };
}

function phaseOf(phase: AttemptPhase): AttemptReport["phase"] | undefined {
  const name = AttemptPhaseSchema.value[phase]?.localName;
  switch (name) {
    case "PULLING":
    case "CREATING":
    case "RUNNING":
    case "STOPPING":
    case "ENDED":
    case "REMOVED":
      return name;
    case undefined:
    default:
      return undefined;
  }
}

function toReason(reason: Reason): InstanceReason {
  return reason === "" ? InstanceReason.UNSPECIFIED : InstanceReason[reason];
}

function fromReason(reason: InstanceReason): Reason {
  const name = InstanceReasonSchema.value[reason]?.localName;
  return name !== undefined && isReason(name) ? name : "";
}

function isReason(name: string): name is Exclude<Reason, ""> {
  return name !== "UNSPECIFIED" && Object.hasOwn(InstanceReason, name);
}
