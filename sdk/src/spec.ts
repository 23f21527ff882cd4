/** What a customer writes, and what the schema wants: units in names, no enums, no well-known types. */
import { create } from "@bufbuild/protobuf";
import { type Duration, DurationSchema } from "@bufbuild/protobuf/wkt";
import {
  GpuRequestSchema,
  type InstanceSpec,
  InstanceSpecSchema,
  type InstanceState,
  PullPolicy,
  RestartPolicy,
} from "@clodei/proto/gen/clodei/v1/instance";
import {
  type LocationConstraint as LocationConstraintMessage,
  LocationConstraintSchema,
} from "@clodei/proto/gen/clodei/v1/location";
import { ClodeiError, type FieldViolation } from "./errors.ts";

/** The names of an enum's values. */
export type EnumName<E> = Exclude<keyof E & string, "UNSPECIFIED">;

/** The states of an instance: "PENDING", "SCHEDULED", "PULLING", "CREATING", "RUNNING", "STOPPING", "STOPPED", "FAILED", "DELETED". */
export type InstanceStateName = EnumName<typeof InstanceState>;

/** Where something may be. An absent field allows every value. */
export type LocationConstraint = {
  /** ISO 3166-1 alpha-2 in upper case: "ES". */
  readonly country?: string | undefined;
  readonly region?: string | undefined;
  readonly datacenter?: string | undefined;
};

/** What to run. Only the image must be given. */
export type RunSpec = {
  /** "busybox", "ghcr.io/clodei/hello:v1", "pytorch/pytorch@sha256:…". Must be inside the allowlist. */
  readonly image: string;
  /** Replaces the image's entrypoint. */
  readonly command?: readonly string[] | undefined;
  /** Replaces the image's arguments. */
  readonly args?: readonly string[] | undefined;
  /** Environment variables, at most 128 of 4 KiB each. In plain text: not for secrets. */
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** GPUs that are the instance's alone while it runs. None where absent. */
  readonly gpu?:
    | {
        /** As `client.catalog.offers()` names it: "H100-SXM". Any where absent. */
        readonly model?: string | undefined;
        /** 1 to 16, all on one node. 1 where absent. */
        readonly count?: number | undefined;
        /** Least memory of each GPU in MiB. */
        readonly minMemoryMib?: number | undefined;
      }
    | undefined;
  /** CPU time in thousandths of a core. 1000 where absent. */
  readonly cpuMillis?: number | undefined;
  /** Memory in MiB; there is no swap. 1024 where absent. */
  readonly memoryMib?: number | undefined;
  /** Where it may run. Everywhere where absent. */
  readonly location?: LocationConstraint | undefined;
  /** Your own labels, for filters. At most 32. */
  readonly labels?: Readonly<Record<string, string>> | undefined;
  /** What happens when the container ends by itself. "NEVER" where absent. */
  readonly restartPolicy?: EnumName<typeof RestartPolicy> | undefined;
  /** When the image is pulled. "IF_NOT_PRESENT" where absent. */
  readonly pullPolicy?: EnumName<typeof PullPolicy> | undefined;
  /** How long it may wait for capacity before it fails, 1 second to 1 day. 600 where absent. */
  readonly placementTimeoutSeconds?: number | undefined;
  /** How long an attempt may run before it is stopped, 1 second to 1 year. Without limit where absent. */
  readonly maxRunTimeSeconds?: number | undefined;
  /** Time between SIGTERM and SIGKILL at a stop, 0 to 120. 10 where absent. */
  readonly stopGraceSeconds?: number | undefined;
};

/**
 * Writes a specification as the schema has it. Values that no message can hold (fractions, NaN) are refused
 * here; every other rule is the server's.
 *
 * @throws ClodeiError with INVALID_ARGUMENT and the fields.
 */
export function toInstanceSpec(spec: RunSpec): InstanceSpec {
  refuseUnwritable(spec);
  const { gpu, location } = spec;
  const message = create(InstanceSpecSchema, {
    image: spec.image,
    command: [...(spec.command ?? [])],
    args: [...(spec.args ?? [])],
    env: { ...spec.env },
    labels: { ...spec.labels },
    restartPolicy: RestartPolicy[spec.restartPolicy ?? "UNSPECIFIED"],
    pullPolicy: PullPolicy[spec.pullPolicy ?? "UNSPECIFIED"],
  });
  if (gpu !== undefined) {
    const { model = "", count = 1, minMemoryMib = 0 } = gpu;
    message.gpu = create(GpuRequestSchema, { model, count, minMemoryMib });
  }
  if (spec.cpuMillis !== undefined) message.cpuMillis = spec.cpuMillis;
  if (spec.memoryMib !== undefined) message.memoryMib = spec.memoryMib;
  if (location !== undefined) message.location = toLocationConstraint(location);
  if (spec.placementTimeoutSeconds !== undefined) message.placementTimeout = toDuration(spec.placementTimeoutSeconds);
  if (spec.maxRunTimeSeconds !== undefined) message.maxRunTime = toDuration(spec.maxRunTimeSeconds);
  if (spec.stopGraceSeconds !== undefined) message.stopGrace = toDuration(spec.stopGraceSeconds);
  return message;
}

function refuseUnwritable(spec: RunSpec): void {
  const fieldViolations: FieldViolation[] = [];
  const refuse = (field: string, rule: string, message: string) => {
    fieldViolations.push({ field: `spec.${field}`, rule, message });
  };
  const wholes = {
    "gpu.count": spec.gpu?.count,
    "gpu.min_memory_mib": spec.gpu?.minMemoryMib,
    cpu_millis: spec.cpuMillis,
    memory_mib: spec.memoryMib,
  };
  for (const [field, value = 0] of Object.entries(wholes)) {
    if (!isUint32(value)) refuse(field, "uint32", `${value} is no whole number from 0`);
  }
  const durations = {
    placement_timeout: spec.placementTimeoutSeconds,
    max_run_time: spec.maxRunTimeSeconds,
    stop_grace: spec.stopGraceSeconds,
  };
  for (const [field, value = 0] of Object.entries(durations)) {
    if (!Number.isFinite(value) || Math.abs(value) > maxSeconds)
      refuse(field, "duration", `${value} is no number of seconds`);
  }
  if (fieldViolations.length === 0) return;
  const text = fieldViolations.map(({ field, message }) => `${field}: ${message}`).join("; ");
  throw new ClodeiError("invalid_argument", "INVALID_ARGUMENT", text, { fieldViolations });
}

/** The longest duration that a message holds: about 10,000 years. */
const maxSeconds = 315_576_000_000;

/** Whether a uint32 field holds this number. */
function isUint32(value: number): boolean {
  return Number.isInteger(value) && value >= 0 && value <= 0xffffffff;
}

/** Seconds, to the millisecond. */
export function toDuration(seconds: number): Duration {
  const ms = Math.round(seconds * 1000);
  return create(DurationSchema, { seconds: BigInt(Math.trunc(ms / 1000)), nanos: (ms % 1000) * 1_000_000 });
}

/** A constraint as a message, without its absent fields. */
export function toLocationConstraint(constraint: LocationConstraint): LocationConstraintMessage {
  const message = create(LocationConstraintSchema);
  if (constraint.country !== undefined) message.country = constraint.country;
  if (constraint.region !== undefined) message.region = constraint.region;
  if (constraint.datacenter !== undefined) message.datacenter = constraint.datacenter;
  return message;
}
