// The node's GPUs: from the drivers' own tools, or simulated by an explicit flag and never else.

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { create } from "@bufbuild/protobuf";
import type { GpuModel } from "@clodei/proto/gpu-models";
import { GpuHealth, GpuLinkSchema, GpuSchema, MigMode } from "@clodei/proto/gen/clodei/v1/inventory";
import { parseNvidiaSmi } from "./nvidia-smi.ts";
import { parseTopology } from "./nvidia-topology.ts";
import { joinReadings, noGpus } from "./readings.ts";
import type { GpuReadings } from "./readings.ts";
import { parseRocmSmi } from "./rocm-smi.ts";
import { callTool, describeFailure } from "./tool.ts";

/** The tools, and how to call them. */
export interface GpuTools {
  readonly nvidiaSmi: string;
  readonly rocmSmi: string;
  /** Where tools are looked for, as PATH. */
  readonly searchPath: string;
  readonly timeoutMs?: number;
  readonly signal?: AbortSignal;
}

/** Reads the node's GPUs. No tool means no GPUs; a tool that fails means an error. Never throws but for an abort. */
export async function readGpus(tools: GpuTools): Promise<GpuReadings> {
  return joinReadings(await readGpusByTool(tools));
}

/** The same, each tool's by themselves and always in the same order: a tool that fails says nothing of another's GPUs. */
export function readGpusByTool(tools: GpuTools): Promise<readonly GpuReadings[]> {
  return Promise.all([readNvidiaGpus(tools), readAmdGpus(tools)]);
}

async function readNvidiaGpus({ nvidiaSmi: tool, ...how }: GpuTools): Promise<GpuReadings> {
  const outcome = await callTool({ ...how, tool, args: ["-q", "-x"] });
  if (outcome.kind === "absent") return noGpus;
  if (outcome.kind === "hung") return { gpus: [], error: outcome.message };
  const { stdout, failure } = outcome;
  if (failure === undefined) return withLinks(parseNvidiaSmi(stdout), { ...how, nvidiaSmi: tool });
  const isDocument = stdout.includes("<nvidia_smi_log");
  // Exit 6 with these words is the tool's way to say "none"; a driver that failed says other words.
  if (`${stdout} ${failure.stderr}`.trim() === "No devices were found") return noGpus;
  const message = describeFailure(tool, failure, isDocument ? "" : stdout);
  if (!isDocument) return { gpus: [], error: message };
  const { gpus, error } = await withLinks(parseNvidiaSmi(stdout), { ...how, nvidiaSmi: tool });
  return { gpus, error: error === "" ? message : `${error}; ${message}` };
}

async function readAmdGpus({ rocmSmi: tool, ...how }: GpuTools): Promise<GpuReadings> {
  const outcome = await callTool({ ...how, tool, args: ["--showallinfo", "--json"] });
  if (outcome.kind === "absent") return noGpus;
  if (outcome.kind === "hung") return { gpus: [], error: outcome.message };
  const { stdout, failure } = outcome;
  if (failure === undefined) return parseRocmSmi(stdout);
  if (!stdout.includes("{")) return { gpus: [], error: describeFailure(tool, failure, stdout) };
  const { gpus, error } = parseRocmSmi(stdout);
  const message = describeFailure(tool, failure, "");
  return { gpus, error: error === "" ? message : `${error}; ${message}` };
}

/**
 * Adds how each GPU is connected to the others, and its NUMA node. What cannot be told of that is left out, and is no
 * error: nothing is placed by it.
 */
async function withLinks(
  { gpus, error }: GpuReadings,
  { nvidiaSmi: tool, ...how }: Omit<GpuTools, "rocmSmi">,
): Promise<GpuReadings> {
  const topology = gpus.length < 2 ? undefined : await callTool({ ...how, tool, args: ["topo", "-m"] });
  const links = topology?.kind === "ended" ? parseTopology(topology.stdout) : [];
  const uuids = new Map(gpus.map(({ index, uuid }) => [index, uuid]));
  const linked = gpus.map(async (gpu) => {
    const numaNode = await numaNodeOf(gpu.pciAddress);
    const own = links.filter(({ from }) => from === gpu.index);
    return create(GpuSchema, {
      ...gpu,
      links: own.flatMap(({ to, kind }) => {
        const uuid = uuids.get(to);
        return uuid === undefined ? [] : create(GpuLinkSchema, { uuid, kind });
      }),
      ...(numaNode === undefined ? {} : { numaNode }),
    });
  });
  return { gpus: await Promise.all(linked), error };
}

/** The kernel's word. It writes -1 where the machine has one memory only, and writes addresses with a short domain. */
async function numaNodeOf(pciAddress: string): Promise<number | undefined> {
  const match = /^(?:0000)?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])$/.exec(pciAddress.toLowerCase());
  if (match === null) return undefined;
  const text = await readFile(`/sys/bus/pci/devices/${match[1]}/numa_node`, "latin1").catch(() => "");
  return /^[0-9]{1,4}\n?$/.test(text) ? Number(text) : undefined;
}

/**
 * GPUs that do not exist. The name of each says so, and derives from the node, so that two nodes never share one.
 *
 * @param troubles What is wrong with them, by index.
 */
export function simulateGpus(
  models: readonly GpuModel[],
  nodeName: string,
  troubles: ReadonlyMap<number, string> = new Map(),
): GpuReadings {
  const gpus = models.map((details, index) =>
    create(GpuSchema, {
      uuid: simulatedGpuUuid(nodeName, index),
      productName: details.productName,
      model: details.model,
      memoryMib: details.memoryMib,
      migMode: MigMode.DISABLED,
      health: troubles.has(index) ? GpuHealth.UNHEALTHY : GpuHealth.HEALTHY,
      healthMessage: troubles.get(index) ?? "",
      simulated: true,
      index,
      telemetry: { utilizationPercent: 0, memoryUsedMib: 0 },
    }),
  );
  return { gpus, error: "" };
}

/** `GPU-SIM-<hash of node and index>`: the same after a restart. */
export function simulatedGpuUuid(nodeName: string, index: number): string {
  return `GPU-SIM-${createHash("sha256").update(`${nodeName}/${index}`).digest("hex").slice(0, 32)}`;
}
