// What one look at the node's GPUs told.

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
