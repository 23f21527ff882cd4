// Reads the document that `nvidia-smi -q -x` prints. Its shape moved over the years (nvsmi_device_v9 … v13), and a
// sick driver prints "ERR!", "[Unknown Error]" or nothing where a value was: such a field becomes unknown and the
// rest of the device is kept, because operators need to see a half-dead GPU most of all.

import { XMLParser, XMLValidator } from "fast-xml-parser";
import { create } from "@bufbuild/protobuf";
import { gpuModelOf } from "@clodei/proto/gpu-models";
import { GpuHealth, GpuSchema, MigMode } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu } from "@clodei/proto/gen/clodei/v1/inventory";

/** A GPU with the values that move. */
export interface GpuReading {
  readonly gpu: Gpu;
  /** Share of time in which it worked; undefined where the tool does not say. */
  readonly utilizationPercent: number | undefined;
  readonly memoryUsedMib: number | undefined;
}

/** What one run of the tool told. */
export interface GpuReadings {
  readonly readings: readonly GpuReading[];
  /** Why GPUs could not be read, in the tool's own words; empty where all could be. */
  readonly error: string;
}

// Newest data center boards have 16 GPUs a host; the contract takes 64.
const maxGpus = 64;

/** Texts by which the tool says that it does not know. Bracketed on older drivers. */
const unknownValues = new Set([
  "",
  "n/a",
  "not available",
  "not supported",
  "err!",
  "unknown error",
  "unknown",
  "requested functionality has been deprecated",
  "insufficient permissions",
  "gpu is lost",
  "gpu requires reset",
]);

/** Texts that stand where a value would be when the device itself is in trouble. */
const troubleValues = new Set(["err!", "unknown error", "gpu is lost", "gpu requires reset"]);

/** Parses the tool's XML. Never throws: what cannot be read is told in `error`. */
export function parseNvidiaSmi(xml: string): GpuReadings {
  const root = parseDocument(xml);
  if (root === undefined) return { readings: [], error: "nvidia-smi printed no valid XML" };
  // An empty element is parsed as an empty text.
  const log = root["nvidia_smi_log"] === "" ? {} : child(root, "nvidia_smi_log");
  if (log === undefined) return { readings: [], error: "nvidia-smi printed a document of another kind" };
  const driverVersion = known(textOf(log, "driver_version")) ?? "";
  const cudaVersion = known(textOf(log, "cuda_version")) ?? "";
  const readings: GpuReading[] = [];
  const errors: string[] = [];
  const seen = new Set<string>();
  for (const [index, node] of elements(log, "gpu").entries()) {
    if (readings.length >= maxGpus) {
      errors.push(`more than ${maxGpus} GPUs`);
      break;
    }
    const reading = readGpu(node, index, driverVersion, cudaVersion);
    if (typeof reading === "string") errors.push(reading);
    else if (seen.has(reading.gpu.uuid)) errors.push(`GPU ${index}: its UUID appears twice`);
    else {
      seen.add(reading.gpu.uuid);
      readings.push(reading);
    }
  }
  return { readings, error: errors.join("; ").slice(0, 1024) };
}

type XmlNode = Readonly<Record<string, unknown>>;

function parseDocument(xml: string): XmlNode | undefined {
  // The parser alone takes broken documents without a word.
  if (XMLValidator.validate(xml) !== true) return undefined;
  try {
    // Values stay text: "0x0001" and "00000000:1B:00.0" are not numbers here. Entities are none of this document's.
    const parsed: unknown = new XMLParser({
      ignoreAttributes: false,
      parseTagValue: false,
      parseAttributeValue: false,
      processEntities: false,
      trimValues: true,
    }).parse(xml);
    return isNode(parsed) ? parsed : undefined;
  } catch {
    return undefined;
  }
}

function isNode(value: unknown): value is XmlNode {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function elements(node: XmlNode, name: string): XmlNode[] {
  const value = node[name];
  return (Array.isArray(value) ? value : [value]).filter(isNode);
}

function child(node: XmlNode | undefined, ...path: readonly string[]): XmlNode | undefined {
  let current = node;
  for (const name of path) current = current === undefined ? undefined : elements(current, name)[0];
  return current;
}

function textOf(node: XmlNode | undefined, name: string): string {
  const value = node?.[name];
  return typeof value === "string" ? value.trim() : "";
}

function bare(value: string): string {
  return value
    .replace(/^\[(.*)\]$/, "$1")
    .trim()
    .toLowerCase();
}

/** The value, or undefined where the tool says that it has none. */
function known(value: string): string | undefined {
  return unknownValues.has(bare(value)) ? undefined : value;
}

function numberIn(value: string, unit: string): number | undefined {
  const match = /^([0-9]{1,9})(?:\.[0-9]+)? ?([A-Za-z%]*)$/.exec(value);
  return match !== null && match[2] === unit ? Number(match[1]) : undefined;
}

function readGpu(node: XmlNode, index: number, driverVersion: string, cudaVersion: string): GpuReading | string {
  const pciAddress = known(textOf(child(node, "pci"), "pci_bus_id")) ?? known(textOf(node, "@_id")) ?? "";
  const uuid = textOf(node, "uuid");
  if (!/^GPU-[A-Za-z0-9-]{1,80}$/.test(uuid)) {
    return `GPU ${index}${pciAddress === "" ? "" : ` at ${pciAddress}`}: no UUID (${JSON.stringify(uuid.slice(0, 64))})`;
  }
  // A made-up one is kept for simulated devices; a driver that prints it is not to be believed.
  if (uuid.startsWith("GPU-SIM-")) return `GPU ${index}: its UUID begins as a simulated one's`;
  const memory = child(node, "fb_memory_usage");
  const productName = known(textOf(node, "product_name")) ?? "";
  const memoryMib = numberIn(textOf(memory, "total"), "MiB");
  const troubles = findTroubles(node, memoryMib);
  const gpu = create(GpuSchema, {
    uuid,
    productName: productName.slice(0, 128),
    model: gpuModelOf(productName) ?? "",
    memoryMib: memoryMib ?? 0,
    driverVersion: driverVersion.slice(0, 64),
    cudaVersion: cudaVersion.slice(0, 64),
    pciAddress: pciAddress.slice(0, 64),
    migMode: migModeOf(node),
    health: troubles.length === 0 ? GpuHealth.HEALTHY : GpuHealth.UNHEALTHY,
    healthMessage: troubles.join("; ").slice(0, 1024),
    simulated: false,
    index,
  });
  return {
    gpu,
    utilizationPercent: numberIn(textOf(child(node, "utilization"), "gpu_util"), "%"),
    memoryUsedMib: numberIn(textOf(memory, "used"), "MiB"),
  };
}

function migModeOf(node: XmlNode): MigMode {
  const mig = child(node, "mig_mode");
  if (mig === undefined) return MigMode.UNSPECIFIED;
  switch (bare(textOf(mig, "current_mig"))) {
    case "enabled":
      return MigMode.ENABLED;
    case "disabled":
      return MigMode.DISABLED;
    case "n/a":
    case "not supported":
      return MigMode.UNSUPPORTED;
    case undefined:
    default:
      return MigMode.UNSPECIFIED;
  }
}

/**
 * What the driver itself says is wrong with the device. Corrected errors are the hardware doing its work and no
 * reason; an uncorrected one since the last reset, memory that waits for a reset, and a failed repair are.
 */
function findTroubles(node: XmlNode, memoryMib: number | undefined): string[] {
  const troubles: string[] = [];
  if (memoryMib === undefined)
    troubles.push(`memory: ${textOf(child(node, "fb_memory_usage"), "total") || "not reported"}`);
  const action = known(textOf(node, "gpu_recovery_action"));
  if (action !== undefined && bare(action) !== "none") troubles.push(`recovery action: ${action}`);
  for (const name of ["product_name", "performance_state", "gpu_temp"]) {
    const value = textOf(name === "gpu_temp" ? child(node, "temperature") : node, name);
    if (troubleValues.has(bare(value))) troubles.push(`${name}: ${value}`);
  }
  const remapped = child(node, "remapped_rows");
  const retired = child(node, "retired_pages");
  const errors = child(node, "ecc_errors");
  const flags: [XmlNode | undefined, string, string][] = [
    [remapped, "remapped_row_failure", "row remapping failed"],
    [remapped, "remapped_row_pending", "row remapping waits for a reset"],
    [retired, "pending_retirement", "page retirement waits for a reset"],
    [retired, "pending_blacklist", "page retirement waits for a reset"],
    [errors, "channel_repair_pending", "channel repair waits for a reset"],
    [errors, "tpc_repair_pending", "TPC repair waits for a reset"],
  ];
  for (const [parent, name, message] of flags) {
    if (bare(textOf(parent, name)) === "yes" && !troubles.includes(message)) troubles.push(message);
  }
  const volatile = child(errors, "volatile");
  // From v10 on the counters stand under volatile; before, under volatile/double_bit/total.
  const counters: [string, string][] = Object.entries(volatile ?? {}).flatMap(([name, value]): [string, string][] =>
    typeof value === "string" && name.includes("uncorrectable") ? [[name, value]] : [],
  );
  const doubleBit = textOf(child(volatile, "double_bit"), "total");
  if (doubleBit !== "") counters.push(["double_bit", doubleBit]);
  for (const [name, value] of counters) {
    if ((numberIn(value, "") ?? 0) > 0)
      troubles.push(`${value} uncorrected memory errors since the last reset (${name})`);
  }
  return troubles;
}
