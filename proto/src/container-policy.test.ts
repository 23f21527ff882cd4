import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { type Duration, DurationSchema } from "@bufbuild/protobuf/wkt";
import { ContainerSpecSchema } from "../gen/clodei/node/v1/node_link_service_pb.ts";
import { PullPolicy } from "../gen/clodei/v1/instance_pb.ts";
import { checkContainer, type ContainerPolicy } from "./container-policy.ts";
import { defaultImageAllowlist } from "./image-reference.ts";

const policy: ContainerPolicy = {
  imageAllowlist: defaultImageAllowlist,
  maxCpuMillis: 8000,
  maxMemoryMib: 16384,
  maxStopGraceSeconds: 120,
  knownGpuUuids: new Set(["GPU-1", "GPU-2"]),
};

function duration(seconds: bigint, nanos = 0): Duration {
  return create(DurationSchema, { seconds, nanos });
}

/** The violations of a good specification with these changes, as "field rule". */
function violationsOf(changes: MessageInitShape<typeof ContainerSpecSchema>, asked = policy): string[] {
  const spec = create(ContainerSpecSchema, {
    image: "docker.io/library/busybox:latest",
    command: ["/bin/sh", "-c"],
    args: ["echo hello"],
    env: { HOME: "/workspace", NVIDIA_TF32_OVERRIDE: "0", CUDA_VISIBLE_DEVICES: "0", _a1: "ü\n" },
    gpuUuids: ["GPU-1"],
    cpuMillis: 8000,
    memoryMib: 16384,
    pullPolicy: PullPolicy.IF_NOT_PRESENT,
    stopGrace: duration(120n),
    maxRunTime: duration(1n),
    ...changes,
  });
  return checkContainer(spec, asked).map((violation) => {
    assert.ok(violation.message.length > 0);
    return `${violation.field} ${violation.rule}`;
  });
}

test("a good specification breaks no rule", () => {
  assert.deepEqual(violationsOf({}), []);
});

test("the absent fields of a bare specification are no violation, but for image, CPU and memory", () => {
  assert.deepEqual(
    checkContainer(create(ContainerSpecSchema), policy).map((violation) => violation.field),
    ["image", "cpu_millis", "memory_mib"],
  );
});

test("an image must be written in full and be inside the allowlist", () => {
  assert.deepEqual(violationsOf({ image: "" }), ["image image_malformed"]);
  assert.deepEqual(violationsOf({ image: "a/../b" }), ["image image_malformed"]);
  assert.deepEqual(violationsOf({ image: "busybox" }), ["image image_not_normalized"]);
  assert.deepEqual(violationsOf({ image: "index.docker.io/library/busybox:latest" }), ["image image_not_normalized"]);
  assert.deepEqual(violationsOf({ image: "docker.io/evil/x:latest" }), ["image image_allowed"]);
  assert.deepEqual(violationsOf({ image: `docker.io/library/${"a".repeat(600)}:latest` }), ["image too_long"]);
  assert.deepEqual(violationsOf({}, { ...policy, imageAllowlist: [] }), ["image image_allowed"]);
});

for (const field of ["command", "args"] as const) {
  test(`${field} is bounded in items and bytes, and holds no NUL`, () => {
    assert.deepEqual(violationsOf({ [field]: Array.from({ length: 128 }, () => "x") }), []);
    assert.deepEqual(violationsOf({ [field]: Array.from({ length: 129 }, () => "x") }), [`${field} too_many`]);
    assert.deepEqual(violationsOf({ [field]: ["x", "a\0b"] }), [`${field}[1] no_nul`]);
    assert.deepEqual(violationsOf({ [field]: ["é".repeat(4096)] }), []);
    assert.deepEqual(violationsOf({ [field]: ["é".repeat(4097)] }), [`${field}[0] too_long`]);
  });
}

test("variables are bounded in number and bytes, and hold no NUL", () => {
  const many = (count: number) => Object.fromEntries(Array.from({ length: count }, (_, index) => [`V${index}`, "x"]));
  assert.deepEqual(violationsOf({ env: many(128) }), []);
  assert.deepEqual(violationsOf({ env: many(129) }), ["env too_many"]);
  assert.deepEqual(violationsOf({ env: { A: "é".repeat(2048) } }), []);
  assert.deepEqual(violationsOf({ env: { A: "é".repeat(2049) } }), ['env["A"] too_long']);
  assert.deepEqual(violationsOf({ env: { A: "a\0b" } }), ['env["A"] no_nul']);
});

test("names of variables cannot smuggle anything", () => {
  for (const name of [
    "",
    "1A",
    "A-B",
    "A=B",
    "A B",
    "A\n",
    "A\0",
    "Ä",
    "LD_PRELOAD\nX",
    "__proto__ ",
    "A".repeat(257),
  ]) {
    assert.deepEqual(
      violationsOf({ env: { [name]: "x" } }).map((text) => text.split(" ").at(-1)),
      ["env_name"],
      name,
    );
  }
});

test("variables that grant devices are reserved", () => {
  const reserved = [
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_REQUIRE_CUDA",
    "NVIDIA_DISABLE_REQUIRE",
    "NVIDIA_MIG_CONFIG_DEVICES",
    "NVIDIA_MIG_MONITOR_DEVICES",
    "NVIDIA_IMEX_CHANNELS",
    "NVIDIA_GDS",
    "NVIDIA_MOFED",
    "NVIDIA_NVSWITCH",
    "NVIDIA_GDRCOPY",
    "CUDA_VERSION",
    "DOCKER_RESOURCE_GPU",
  ];
  for (const name of reserved)
    assert.deepEqual(violationsOf({ env: { [name]: "all" } }), [`env["${name}"] env_reserved`]);
});

test("values of variables never stand in a message", () => {
  const spec = create(ContainerSpecSchema, {
    env: { TOKEN: `geheim\0`, NVIDIA_VISIBLE_DEVICES: "geheim" },
    args: ["geheim\0"],
  });
  for (const violation of checkContainer(spec, policy))
    assert.ok(!violation.message.includes("geheim"), violation.message);
});

test("arguments and environment together stay below what exec takes", () => {
  assert.deepEqual(violationsOf({ args: Array.from({ length: 128 }, () => "x".repeat(8190)) }), []);
  assert.deepEqual(violationsOf({ args: Array.from({ length: 128 }, () => "x".repeat(8192)) }), ["args too_long"]);
});

test("GPUs must be known, different, and at most 16", () => {
  assert.deepEqual(violationsOf({ gpuUuids: ["GPU-1", "GPU-2"] }), []);
  for (const uuid of ["GPU-3", "all", "none", "0", "", "GPU-1,GPU-2", "gpu-1"]) {
    assert.deepEqual(violationsOf({ gpuUuids: [uuid] }), ["gpu_uuids[0] gpu_unknown"], uuid);
  }
  assert.deepEqual(violationsOf({ gpuUuids: ["GPU-1", "GPU-1"] }), ["gpu_uuids[1] gpu_twice"]);
  assert.deepEqual(violationsOf({ gpuUuids: Array.from({ length: 17 }, () => "GPU-1") }), ["gpu_uuids too_many"]);
});

test("CPU, memory and times have two ends", () => {
  assert.deepEqual(
    violationsOf({ cpuMillis: 50, memoryMib: 16, stopGrace: duration(0n), maxRunTime: duration(31_536_000n) }),
    [],
  );
  assert.deepEqual(violationsOf({ cpuMillis: 49 }), ["cpu_millis cpu_range"]);
  assert.deepEqual(violationsOf({ cpuMillis: 8001 }), ["cpu_millis cpu_range"]);
  assert.deepEqual(violationsOf({ cpuMillis: Number.NaN }), ["cpu_millis cpu_range"]);
  assert.deepEqual(violationsOf({ memoryMib: 15 }), ["memory_mib memory_range"]);
  assert.deepEqual(violationsOf({ memoryMib: 16385 }), ["memory_mib memory_range"]);
  assert.deepEqual(violationsOf({ stopGrace: duration(-1n) }), ["stop_grace stop_grace_range"]);
  assert.deepEqual(violationsOf({ stopGrace: duration(120n, 1) }), ["stop_grace stop_grace_range"]);
  assert.deepEqual(violationsOf({ maxRunTime: duration(0n) }), ["max_run_time max_run_time_range"]);
  assert.deepEqual(violationsOf({ maxRunTime: duration(31_536_001n) }), ["max_run_time max_run_time_range"]);
});

test("a pull policy that is not in the schema is refused", () => {
  assert.deepEqual(violationsOf({ pullPolicy: PullPolicy.UNSPECIFIED }), []);
  assert.deepEqual(violationsOf({ pullPolicy: 17 as PullPolicy }), ["pull_policy pull_policy_unknown"]);
});

test("every broken rule is named, not only the first", () => {
  const violations = violationsOf({ image: "evil", gpuUuids: ["x"], memoryMib: 0, env: { "1": "x" } });
  assert.deepEqual(violations, [
    "image image_not_normalized",
    'env["1"] env_name',
    "gpu_uuids[0] gpu_unknown",
    "memory_mib memory_range",
  ]);
});
