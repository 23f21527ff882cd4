/**
 * What a container may be. The control plane checks a specification when it places it, and the agent checks it
 * again against its own configuration: an agent runs nothing merely because it was told to.
 *
 * The message has no field for what no container may have (privileges, host folders, devices, networks); this
 * file judges the fields that there are, also against messages that passed no schema validation.
 */
import { isUnknownEnum } from "@bufbuild/protobuf";
import type { ContainerSpec } from "../gen/clodei/node/v1/node_link_service_pb.ts";
import { PullPolicySchema } from "../gen/clodei/v1/instance_pb.ts";
import { formatImageReference, isImageAllowed, parseImageReference } from "./image-reference.ts";

/** What this place admits. */
export type ContainerPolicy = {
  /** See image-reference.ts. Empty admits nothing. */
  readonly imageAllowlist: readonly string[];
  /** CPU that one container may have, in thousandths of a core. */
  readonly maxCpuMillis: number;
  /** Memory that one container may have, in MiB. */
  readonly maxMemoryMib: number;
  /** Longest time between SIGTERM and SIGKILL, in seconds. */
  readonly maxStopGraceSeconds: number;
  /** The GPUs that there are. A UUID outside it is a violation. */
  readonly knownGpuUuids: ReadonlySet<string>;
};

/** A rule that a specification breaks. */
export type PolicyViolation = {
  /** The field, as the schema names it: "image", "env[\"NAME\"]", "gpu_uuids[2]". */
  readonly field: string;
  /** A stable name of the rule: "image_allowed". */
  readonly rule: PolicyRule;
  /** For a person; says what is allowed. Holds no value of a variable or argument. */
  readonly message: string;
};

/** The rules, by name. */
export type PolicyRule =
  | "image_malformed"
  | "image_not_normalized"
  | "image_allowed"
  | "too_many"
  | "too_long"
  | "no_nul"
  | "env_name"
  | "env_reserved"
  | "gpu_unknown"
  | "gpu_twice"
  | "cpu_range"
  | "memory_range"
  | "stop_grace_range"
  | "max_run_time_range"
  | "pull_policy_unknown";

// The same limits as the schema's rules on InstanceSpec and ContainerSpec.
const maxImageLength = 512;
const maxArguments = 128;
const maxArgumentBytes = 8192;
const maxVariables = 128;
const maxNameLength = 256;
const maxValueBytes = 4096;
const maxGpus = 16;
const minCpuMillis = 50;
const minMemoryMib = 16;
const maxRunTimeSeconds = 31_536_000;
/**
 * Arguments and environment together. The lists' own limits add up to 2.5 MiB and the kernel refuses more than
 * about 2 MiB at exec: fail here, with a reason. What the image brings counts there too, hence half of it.
 */
const maxArgumentsAndEnvBytes = 1024 * 1024;

const namePattern = /^[A-Za-z_][A-Za-z0-9_]*$/;

/**
 * Variables by which the NVIDIA container runtime grants devices and driver parts: a customer who sets one
 * could reach a GPU that is not the instance's. The agent grants GPUs by device request alone. CUDA_VERSION
 * is among them because its presence alone makes the runtime grant every GPU ("legacy images"), and
 * DOCKER_RESOURCE_* because the runtime can be configured to read devices from it.
 */
const reservedNamePattern =
  /^NVIDIA_(?:VISIBLE_DEVICES|DRIVER_CAPABILITIES|REQUIRE_.*|DISABLE_REQUIRE|MIG_.*|IMEX_CHANNELS|GDS|MOFED|NVSWITCH|GDRCOPY|CTK_.*)$|^CUDA_VERSION$|^DOCKER_RESOURCE_/;

/**
 * Checks a specification. Returns every rule that it breaks, the first violation of each list; empty means
 * that it may run.
 *
 * @example checkContainer(spec, policy).map((violation) => violation.message)
 */
export function checkContainer(spec: ContainerSpec, policy: ContainerPolicy): PolicyViolation[] {
  return [
    ...checkImage(spec.image, policy.imageAllowlist),
    ...checkStrings("command", spec.command),
    ...checkStrings("args", spec.args),
    ...checkEnv(spec.env),
    ...checkSizeInAll(spec),
    ...checkGpus(spec.gpuUuids, policy.knownGpuUuids),
    ...checkNumbers(spec, policy),
  ];
}

function checkImage(image: string, allowlist: readonly string[]): PolicyViolation[] {
  const field = "image";
  if (image.length > maxImageLength) {
    return [{ field, rule: "too_long", message: `the image has more than ${maxImageLength} characters` }];
  }
  const reference = parseImageReference(image);
  if (reference === undefined) {
    return [{ field, rule: "image_malformed", message: `"${image}" is no image reference` }];
  }
  const normalized = formatImageReference(reference);
  if (normalized !== image) {
    return [{ field, rule: "image_not_normalized", message: `the image must be written in full, as "${normalized}"` }];
  }
  if (!isImageAllowed(reference, allowlist)) {
    return [{ field, rule: "image_allowed", message: `"${image}" is outside the allowlist: ${allowlist.join(", ")}` }];
  }
  return [];
}

function checkStrings(field: "command" | "args", values: readonly string[]): PolicyViolation[] {
  if (values.length > maxArguments) {
    return [{ field, rule: "too_many", message: `${field} has ${values.length} items; at most ${maxArguments}` }];
  }
  for (const [index, value] of values.entries()) {
    const item = `${field}[${index}]`;
    if (value.includes("\0")) return [{ field: item, rule: "no_nul", message: `${item} holds a NUL character` }];
    if (byteLength(value) > maxArgumentBytes) {
      return [{ field: item, rule: "too_long", message: `${item} has more than ${maxArgumentBytes} bytes` }];
    }
  }
  return [];
}

function checkEnv(env: Readonly<Record<string, string>>): PolicyViolation[] {
  const entries = Object.entries(env);
  if (entries.length > maxVariables) {
    const message = `env has ${entries.length} variables; at most ${maxVariables}`;
    return [{ field: "env", rule: "too_many", message }];
  }
  for (const [name, value] of entries) {
    // JSON, so that a name with line breaks or quotes does no harm in a log.
    const field = `env[${JSON.stringify(name.slice(0, maxNameLength))}]`;
    if (!namePattern.test(name) || name.length > maxNameLength) {
      return [
        { field, rule: "env_name", message: `${field}: a name is letters, digits and _, and begins with no digit` },
      ];
    }
    if (reservedNamePattern.test(name)) {
      return [{ field, rule: "env_reserved", message: `${field} is reserved: it is how the platform grants devices` }];
    }
    if (value.includes("\0")) return [{ field, rule: "no_nul", message: `${field} holds a NUL character` }];
    if (byteLength(value) > maxValueBytes) {
      return [{ field, rule: "too_long", message: `${field} has more than ${maxValueBytes} bytes` }];
    }
  }
  return [];
}

function checkSizeInAll(spec: ContainerSpec): PolicyViolation[] {
  let bytes = 0;
  for (const value of [...spec.command, ...spec.args]) bytes += byteLength(value) + 1;
  for (const [name, value] of Object.entries(spec.env)) bytes += byteLength(name) + byteLength(value) + 2;
  if (bytes <= maxArgumentsAndEnvBytes) return [];
  const message = `command, args and env have ${bytes} bytes together; at most ${maxArgumentsAndEnvBytes}`;
  return [{ field: "args", rule: "too_long", message }];
}

function checkGpus(uuids: readonly string[], known: ReadonlySet<string>): PolicyViolation[] {
  if (uuids.length > maxGpus) {
    return [{ field: "gpu_uuids", rule: "too_many", message: `${uuids.length} GPUs; at most ${maxGpus}` }];
  }
  for (const [index, uuid] of uuids.entries()) {
    const field = `gpu_uuids[${index}]`;
    // "all", "none", indexes and "void" mean something to Docker and are in no inventory.
    if (!known.has(uuid)) return [{ field, rule: "gpu_unknown", message: `${field} is no GPU of this node` }];
    if (uuids.indexOf(uuid) !== index) return [{ field, rule: "gpu_twice", message: `${field} was named before` }];
  }
  return [];
}

function checkNumbers(spec: ContainerSpec, policy: ContainerPolicy): PolicyViolation[] {
  const violations: PolicyViolation[] = [];
  const check = (field: string, rule: PolicyRule, value: number, low: number, high: number, unit: string) => {
    // Written so that NaN is a violation.
    if (value >= low && value <= high) return;
    violations.push({ field, rule, message: `${field} is ${value}; allowed are ${low} to ${high} ${unit}` });
  };
  check("cpu_millis", "cpu_range", spec.cpuMillis, minCpuMillis, policy.maxCpuMillis, "thousandths of a core");
  check("memory_mib", "memory_range", spec.memoryMib, minMemoryMib, policy.maxMemoryMib, "MiB");
  if (spec.stopGrace !== undefined) {
    const seconds = secondsOf(spec.stopGrace);
    check("stop_grace", "stop_grace_range", seconds, 0, policy.maxStopGraceSeconds, "seconds");
  }
  if (spec.maxRunTime !== undefined) {
    check("max_run_time", "max_run_time_range", secondsOf(spec.maxRunTime), 1, maxRunTimeSeconds, "seconds");
  }
  if (isUnknownEnum(PullPolicySchema, spec.pullPolicy)) {
    const message = `pull_policy ${Number(spec.pullPolicy)} is unknown; allowed are IF_NOT_PRESENT, ALWAYS and NEVER`;
    violations.push({ field: "pull_policy", rule: "pull_policy_unknown", message });
  }
  return violations;
}

function secondsOf(duration: { readonly seconds: bigint; readonly nanos: number }): number {
  return Number(duration.seconds) + duration.nanos / 1e9;
}

function byteLength(text: string): number {
  return new TextEncoder().encode(text).length;
}
