/** What a customer writes, and what the schema wants: units in names, no enums, no well-known types. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Duration, DurationSchema } from "@bufbuild/protobuf/wkt";
import {
  InstanceSpecSchema,
  type InstanceState,
  PullPolicy,
  RestartPolicy,
} from "@clodei/proto/gen/clodei/v1/instance";
import { isObject, optionNames, refuseFields, unknownFields, unwritable, violationsOf } from "./request-check.ts";

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

/** The fields of a RunSpec. */
const specFields = optionNames<RunSpec>({
  image: true,
  command: true,
  args: true,
  env: true,
  gpu: true,
  cpuMillis: true,
  memoryMib: true,
  location: true,
  labels: true,
  restartPolicy: true,
  pullPolicy: true,
  placementTimeoutSeconds: true,
  maxRunTimeSeconds: true,
  stopGraceSeconds: true,
});

/**
 * Writes a specification as the schema has it. What no message can hold (fractions, NaN, fields that do not exist)
 * is refused here; every other rule is the server's.
 *
 * @throws ClodeiError with INVALID_ARGUMENT and the fields.
 */
export function toInstanceSpec(spec: RunSpec): InstanceSpecInit {
  const init = isObject(spec) ? toInit(spec) : unwritable(spec);
  refuseFields([...unknownFields(spec, specFields, "spec"), ...violationsOf(InstanceSpecSchema, init, "spec")]);
  return init;
}

type InstanceSpecInit = MessageInitShape<typeof InstanceSpecSchema>;

function toInit(spec: RunSpec): InstanceSpecInit {
  const { gpu, placementTimeoutSeconds, maxRunTimeSeconds, stopGraceSeconds } = spec;
  return {
    image: spec.image,
    // Messages have no readonly lists; nobody writes to this one.
    command: (spec.command ?? []) as string[],
    args: (spec.args ?? []) as string[],
    env: spec.env ?? {},
    gpu: isObject(gpu)
      ? { ...gpu, model: gpu.model ?? "", count: gpu.count ?? 1, minMemoryMib: gpu.minMemoryMib ?? 0 }
      : gpu,
    cpuMillis: spec.cpuMillis,
    memoryMib: spec.memoryMib,
    location: spec.location,
    labels: spec.labels ?? {},
    restartPolicy: valueOf(RestartPolicy, spec.restartPolicy ?? "UNSPECIFIED"),
    pullPolicy: valueOf(PullPolicy, spec.pullPolicy ?? "UNSPECIFIED"),
    placementTimeout: toDuration(placementTimeoutSeconds),
    maxRunTime: toDuration(maxRunTimeSeconds),
    stopGrace: toDuration(stopGraceSeconds),
  };
}

/** The enum's value of this name. Another name stays as it is: the check of the request refuses it. */
function valueOf<E extends Readonly<Record<string, number>>>(enumObject: E, name: keyof E & string): E[keyof E] {
  return Object.hasOwn(enumObject, name) ? enumObject[name] : unwritable(name);
}

/** The enum's values of these names. */
export function valuesOf<E extends Readonly<Record<string, number>>>(
  enumObject: E,
  names: readonly (keyof E & string)[] | undefined,
): E[keyof E][] {
  return Array.isArray(names) ? names.map((name: keyof E & string) => valueOf(enumObject, name)) : unwritable(names);
}

/** The longest duration that a message holds: about 10,000 years. */
const maxSeconds = 315_576_000_000;

/** Seconds, to the millisecond. What is no number of seconds stays as it is: the check of the request refuses it. */
export function toDuration(seconds: number | undefined): Duration | undefined {
  if (typeof seconds !== "number" || !(Math.abs(seconds) <= maxSeconds)) return unwritable(seconds);
  const ms = Math.round(seconds * 1000);
  return create(DurationSchema, { seconds: BigInt(Math.trunc(ms / 1000)), nanos: (ms % 1000) * 1_000_000 });
}
