// What one look at the node's GPUs told.

import { create } from "@bufbuild/protobuf";
import { GpuHealth, GpuSchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu } from "@clodei/proto/gen/clodei/v1/inventory";

/** Newest data center boards have 16 GPUs a host; the contract takes 64. */
export const maxGpus = 64;

/** The GPUs, with the values that move as of then. */
export interface GpuReadings {
  readonly gpus: readonly Gpu[];
  /** Why GPUs could not be read, in the tools' own words; empty where all could be. */
  readonly error: string;
}

/** A node that has none. */
export const noGpus: GpuReadings = { gpus: [], error: "" };

/** What several tools told, as one. One count for the node: a tool's devices follow those of the tool before. */
export function joinReadings(parts: readonly GpuReadings[]): GpuReadings {
  const gpus: Gpu[] = [];
  for (const part of parts) {
    const before = gpus.length;
    gpus.push(
      ...part.gpus.map((gpu) => (before === 0 ? gpu : create(GpuSchema, { ...gpu, index: gpu.index + before }))),
    );
  }
  const errors = parts.map(({ error }) => error).filter((error) => error !== "");
  // What is left out where there are too many is not what works.
  const works = ({ health }: Gpu): boolean => health !== GpuHealth.UNHEALTHY;
  const all = gpus.length <= maxGpus ? gpus : [...gpus.filter(works), ...gpus.filter((gpu) => !works(gpu))];
  return { gpus: all.slice(0, maxGpus), error: errors.join("; ").slice(0, 1024) };
}
