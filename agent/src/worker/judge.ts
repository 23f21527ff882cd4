// The agent's own judgment of a container, whatever the control plane asked for: the schema's rules, the policy of
// this node's configuration, and the GPUs that this node really has.

import type { Validator } from "@bufbuild/protovalidate";
import { checkContainer } from "@clodei/proto/container-policy";
import {
  ContainerSpecSchema,
  DesiredInstanceSchema,
  DesiredSetSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { ContainerSpec, DesiredSet } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { GpuHealth, MigMode } from "@clodei/proto/gen/clodei/v1/inventory";
import type { NodeInventory } from "@clodei/proto/gen/clodei/v1/inventory";
import { parseId } from "@clodei/proto/ids";
import { create } from "@bufbuild/protobuf";
import type { Capacity } from "./model.ts";

/** Why an attempt will not run. */
export interface Refusal {
  readonly reason: InstanceReason;
  readonly message: string;
}

// The contract's longest message; a specification may break many rules at once.
const maxMessageLength = 2048;
/** The control plane's own column holds no more. A node that names a higher one is not understood any more. */
const maxGeneration = 2n ** 63n - 1n;
/**
 * A set's generation may be so far ahead of the highest that was seen: a change a second for 136 years. Without a bound
 * one forged set would make a node take every later set for an old one.
 */
const maxGenerationStep = 2n ** 32n;
/** The contract's longest time between SIGTERM and SIGKILL. */
export const maxStopGraceSeconds = 120;

/** Judges specifications and desired sets. */
export class Judge {
  readonly #validator: Validator;
  readonly #imageAllowlist: readonly string[];
  readonly #inventory: () => NodeInventory;

  constructor(options: {
    readonly validator: Validator;
    readonly imageAllowlist: readonly string[];
    readonly inventory: () => NodeInventory;
  }) {
    this.#validator = options.validator;
    this.#imageAllowlist = options.imageAllowlist;
    this.#inventory = options.inventory;
    // The first validation compiles the rules for up to 270 ms: not on the way of the first customer.
    this.#validator.validate(ContainerSpecSchema, create(ContainerSpecSchema));
    this.#validator.validate(DesiredSetSchema, create(DesiredSetSchema, { instances: [{}] }));
  }

  /** Why this must not run here; undefined if it may. */
  refusalOf(spec: ContainerSpec): Refusal | undefined {
    const { gpus } = this.#inventory();
    const { cpuMillis, memoryMib } = this.capacity();
    const violations = checkContainer(spec, {
      imageAllowlist: this.#imageAllowlist,
      maxCpuMillis: cpuMillis,
      maxMemoryMib: memoryMib,
      maxStopGraceSeconds,
      knownGpuUuids: new Set(gpus.map(({ uuid }) => uuid)),
    });
    const image = violations.find(({ rule }) => rule === "image_allowed");
    if (image !== undefined) return refusal(InstanceReason.IMAGE_NOT_ALLOWED, `image: ${image.message}`);
    const [first] = violations;
    if (first !== undefined) {
      return refusal(
        InstanceReason.POLICY_VIOLATION,
        violations.map(({ field, message }) => `${field}: ${message}`).join("; "),
      );
    }
    const result = this.#validator.validate(ContainerSpecSchema, spec);
    if (result.kind !== "valid") return refusal(InstanceReason.POLICY_VIOLATION, result.error.message);
    return this.#refusalOfGpus(spec);
  }

  /** What containers may have of this node, one alone and all together. */
  capacity(): Capacity {
    const { host } = this.#inventory();
    return { cpuMillis: (host?.cpuCount ?? 0) * 1000, memoryMib: host?.memoryMib ?? 0 };
  }

  /**
   * Why the set cannot be understood; undefined if it can. Specifications are judged one by one, when they shall run.
   *
   * @param highestGeneration The highest that was seen.
   */
  faultOf(set: DesiredSet, highestGeneration: bigint): string | undefined {
    if (set.generation > maxGeneration || set.generation > highestGeneration + maxGenerationStep)
      return `generation: ${set.generation} is too far ahead of ${highestGeneration}`;
    const instances = set.instances.map(({ instanceId, attempt, state }) =>
      create(DesiredInstanceSchema, { instanceId, attempt, state }),
    );
    const result = this.#validator.validate(DesiredSetSchema, create(DesiredSetSchema, { instances }));
    if (result.kind !== "valid") return result.error.message;
    const seen = new Set<string>();
    for (const { instanceId } of instances) {
      // The schema's pattern lets ids pass that no UUID has; such a one would be passed over in silence.
      if (parseId("ins", instanceId) === undefined) return `${instanceId} is no instance's id`;
      if (seen.has(instanceId)) return `${instanceId} stands in the set twice`;
      seen.add(instanceId);
    }
    return undefined;
  }

  #refusalOfGpus(spec: ContainerSpec): Refusal | undefined {
    const { gpus } = this.#inventory();
    for (const [index, uuid] of spec.gpuUuids.entries()) {
      const gpu = gpus.find((candidate) => candidate.uuid === uuid);
      if (gpu?.health === GpuHealth.UNHEALTHY) {
        return refusal(InstanceReason.NODE_ERROR, `gpu_uuids[${index}]: the GPU is not healthy: ${gpu.healthMessage}`);
      }
      if (gpu?.migMode === MigMode.ENABLED) {
        return refusal(
          InstanceReason.POLICY_VIOLATION,
          `gpu_uuids[${index}]: the GPU is split by MIG and is not given as a whole`,
        );
      }
    }
    return undefined;
  }
}

function refusal(reason: InstanceReason, message: string): Refusal {
  return { reason, message: message.slice(0, maxMessageLength) };
}
