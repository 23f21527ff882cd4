// Keeps the node's inventory current: GPUs are read again and again (their health moves), the host once. Whoever needs
// the inventory reads the last one and never waits for a tool.

import { create, equals } from "@bufbuild/protobuf";
import { GpuStatusSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { GpuStatus } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { GpuHealth, GpuSchema, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu, Host, NodeInventory } from "@clodei/proto/gen/clodei/v1/inventory";
import { sleep } from "../sleep.ts";
import { freeMib } from "./host.ts";
import { joinReadings, maxGpus } from "./readings.ts";
import type { GpuReadings } from "./readings.ts";

/** How often GPUs are read, if nothing else is said: as often as heartbeats carry their health. */
const defaultIntervalMs = 10_000;

/** Free space is told in steps, so that a log line does not make a new inventory. */
const freeStepMib = 1024;

/** The node's inventory, current to within an interval. */
export class Inventory {
  readonly #readGpus: InventoryOptions["readGpus"];
  readonly #host: Host;
  readonly #workspaceFolder: string;
  readonly #dockerVersion: () => string;
  readonly #intervalMs: number;
  #readings: readonly GpuReadings[];
  #current: NodeInventory;
  readonly #listeners = new Set<() => void>();

  private constructor(options: InventoryOptions, readings: readonly GpuReadings[], free: number | undefined) {
    this.#readGpus = options.readGpus;
    this.#host = options.host;
    this.#workspaceFolder = options.workspaceFolder;
    this.#dockerVersion = options.dockerVersion;
    this.#intervalMs = options.intervalMs ?? defaultIntervalMs;
    this.#readings = readings;
    this.#current = this.#compose(readings, free);
  }

  /** Reads everything once. */
  static async open(options: InventoryOptions): Promise<Inventory> {
    const [readings, free] = await Promise.all([options.readGpus(), freeMib(options.workspaceFolder)]);
    return new Inventory(options, readings, free);
  }

  /** The last inventory. Not to be changed. */
  current(): NodeInventory {
    return this.#current;
  }

  /** Health and use of each GPU, for a heartbeat. */
  gpuStatuses(): GpuStatus[] {
    return this.#current.gpus.map(({ uuid, health, healthMessage, telemetry }) =>
      create(GpuStatusSchema, {
        uuid,
        health,
        healthMessage,
        ...(telemetry?.utilizationPercent === undefined ? {} : { utilizationPercent: telemetry.utilizationPercent }),
        ...(telemetry?.memoryUsedMib === undefined ? {} : { memoryUsedMib: telemetry.memoryUsedMib }),
      }),
    );
  }

  /** Calls `listener` after each change. */
  onChange(listener: () => void): Disposable {
    this.#listeners.add(listener);
    return { [Symbol.dispose]: () => void this.#listeners.delete(listener) };
  }

  /** Reads everything that may change again. */
  async refresh(signal?: AbortSignal): Promise<void> {
    const [readings, free] = await Promise.all([this.#readGpus(signal), freeMib(this.#workspaceFolder)]);
    this.#readings = readings.map((part, tool) => withLost(part, this.#readings[tool]?.gpus ?? []));
    const next = this.#compose(this.#readings, free);
    const isSame = equals(NodeInventorySchema, withoutTelemetry(next), withoutTelemetry(this.#current));
    this.#current = next;
    if (isSame) return;
    for (const listener of this.#listeners) listener();
  }

  /** Refreshes until the signal. */
  async run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      await sleep(this.#intervalMs, signal);
      if (!signal.aborted) await this.refresh(signal).catch(() => undefined);
    }
  }

  #compose(readings: readonly GpuReadings[], free: number | undefined): NodeInventory {
    const { gpus, error } = joinReadings(readings);
    const workspaceFreeMib = Math.min(Math.floor((free ?? 0) / freeStepMib) * freeStepMib, 0xffff_ffff);
    return create(NodeInventorySchema, {
      gpus: [...gpus],
      gpuError: error,
      host: { ...this.#host, dockerVersion: this.#dockerVersion().slice(0, 64), workspaceFreeMib },
    });
  }
}

/** What an inventory is made of. */
export interface InventoryOptions {
  /** What each tool tells, the tools always in the same order. */
  readonly readGpus: (signal?: AbortSignal) => Promise<readonly GpuReadings[]>;
  readonly host: Host;
  readonly workspaceFolder: string;
  /** The engine's version as last seen; empty while it does not answer. */
  readonly dockerVersion: () => string;
  /** How often GPUs are read. */
  readonly intervalMs?: number;
}

/**
 * A device that was there and of which the tool no longer tells stays, with the tool's words for it: one that fell off the
 * bus is to be seen, and a tool that fails says nothing about any. What was taken out of the machine is forgotten by the
 * agent's next start.
 */
function withLost({ gpus, error }: GpuReadings, before: readonly Gpu[]): GpuReadings {
  const present = new Set(gpus.map(({ uuid }) => uuid));
  const why = error === "" ? "the driver's tool no longer tells of it" : error;
  const missing = before.filter(({ uuid }) => !present.has(uuid)).map((gpu) => lost(gpu, why));
  // One that shows others each time must not fill the memory.
  return { gpus: [...gpus, ...missing].slice(0, maxGpus), error };
}

function lost(gpu: Gpu, error: string): Gpu {
  const { telemetry: _, ...rest } = gpu;
  return create(GpuSchema, { ...rest, health: GpuHealth.UNHEALTHY, healthMessage: error });
}

/** What is compared: that a temperature moved makes no new inventory. */
function withoutTelemetry(inventory: NodeInventory): NodeInventory {
  return create(NodeInventorySchema, {
    ...inventory,
    gpus: inventory.gpus.map(({ telemetry: _, ...gpu }) => create(GpuSchema, gpu)),
  });
}
