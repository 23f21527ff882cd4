// Reads the document that `nvidia-smi -q -x` prints. Its shape moved over the years (nvsmi_device_v9 … v13), and a
// sick driver prints "ERR!", "[Unknown Error]" or nothing where a value was: such a field becomes unknown and the
// rest of the device is kept, because operators need to see a half-dead GPU most of all.

import { create } from "@bufbuild/protobuf";
import { gpuModelOf } from "@clodei/proto/gpu-models";
import { GpuHealth, GpuSchema, MigMode } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu } from "@clodei/proto/gen/clodei/v1/inventory";
import { maxGpus } from "./readings.ts";
import type { GpuReadings } from "./readings.ts";
import { eccOf, migDevicesOf, remappedRowsOf, retiredPagesOf, telemetryOf } from "./nvidia-details.ts";
import {
  bare,
  child,
  elements,
  flagIn,
  isTrouble,
  known,
  numberIn,
  parseDocument,
  salvage,
  textOf,
} from "./nvidia-xml.ts";
import type { XmlNode } from "./nvidia-xml.ts";

const gpuUuid = /^GPU-[A-Za-z0-9-]{1,80}$/;

/** Parses the tool's XML. Never throws: what cannot be read is told in `error`. */
export function parseNvidiaSmi(xml: string): GpuReadings {
  const root = parseDocument(xml);
  if (root === undefined) return salvageReadings(xml);
  // An empty element is parsed as an empty text.
  const log = root["nvidia_smi_log"] === "" ? {} : child(root, "nvidia_smi_log");
  if (log === undefined) return { gpus: [], error: "nvidia-smi printed a document of another kind" };
  return readAll(elements(log, "gpu"), textOf(log, "driver_version"), textOf(log, "cuda_version"), []);
}

/** Of a document that broke off: every device that is whole. The one where it broke off is shown, and not used. */
function salvageReadings(xml: string): GpuReadings {
  const { whole, broken } = salvage(xml, "gpu");
  if (whole.length === 0 && broken === undefined) return { gpus: [], error: "nvidia-smi printed no valid XML" };
  const text = (name: string, from: string): string =>
    new RegExp(`<${name}>([^<]{1,128})</${name}>`).exec(from)?.[1] ?? "";
  const all = readAll(whole, text("driver_version", xml), text("cuda_version", xml), [
    "nvidia-smi's output is damaged",
  ]);
  const uuid = text("uuid", broken ?? "");
  if (broken === undefined || !gpuUuid.test(uuid) || all.gpus.some((gpu) => gpu.uuid === uuid)) return all;
  const damaged = readGpu({ uuid, product_name: text("product_name", broken) }, whole.length, "", "");
  if (typeof damaged === "string") return all;
  return { ...all, gpus: [...all.gpus, { ...damaged, healthMessage: "nvidia-smi's output about it is damaged" }] };
}

function readAll(
  nodes: readonly XmlNode[],
  driverVersion: string,
  cudaVersion: string,
  troubles: readonly string[],
): GpuReadings {
  const gpus: Gpu[] = [];
  const errors = [...troubles];
  const seen = new Set<string>();
  for (const [index, node] of nodes.entries()) {
    if (gpus.length >= maxGpus) {
      errors.push(`more than ${maxGpus} GPUs`);
      break;
    }
    const gpu = readGpu(node, index, known(driverVersion) ?? "", known(cudaVersion) ?? "");
    if (typeof gpu === "string") errors.push(gpu);
    else if (seen.has(gpu.uuid)) errors.push(`GPU ${index}: its UUID appears twice`);
    else {
      seen.add(gpu.uuid);
      gpus.push(gpu);
    }
  }
  return { gpus, error: errors.join("; ").slice(0, 1024) };
}

function readGpu(node: XmlNode, index: number, driverVersion: string, cudaVersion: string): Gpu | string {
  const pciAddress = known(textOf(child(node, "pci"), "pci_bus_id")) ?? known(textOf(node, "@_id")) ?? "";
  const uuid = textOf(node, "uuid");
  if (!gpuUuid.test(uuid)) {
    return `GPU ${index}${pciAddress === "" ? "" : ` at ${pciAddress}`}: no UUID (${JSON.stringify(uuid.slice(0, 64))})`;
  }
  // A made-up one is kept for simulated devices; a driver that prints it is not to be believed.
  if (uuid.startsWith("GPU-SIM-")) return `GPU ${index}: its UUID begins as a simulated one's`;
  const productName = known(textOf(node, "product_name")) ?? "";
  const memoryMib = numberIn(textOf(child(node, "fb_memory_usage"), "total"), "MiB");
  const troubles = findTroubles(node, memoryMib);
  const [ecc, retiredPages, remappedRows] = [eccOf(node), retiredPagesOf(node), remappedRowsOf(node)];
  const persistenceMode = flagIn(textOf(node, "persistence_mode"));
  return create(GpuSchema, {
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
    serial: (known(textOf(node, "serial")) ?? "").slice(0, 64),
    computeMode: (known(textOf(node, "compute_mode")) ?? "").slice(0, 32),
    migDevices: migDevicesOf(node),
    telemetry: telemetryOf(node),
    ...(ecc === undefined ? {} : { ecc }),
    ...(retiredPages === undefined ? {} : { retiredPages }),
    ...(remappedRows === undefined ? {} : { remappedRows }),
    ...(persistenceMode === undefined ? {} : { persistenceMode }),
  });
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
    if (isTrouble(value)) troubles.push(`${name}: ${value}`);
  }
  const remapped = child(node, "remapped_rows");
  const retired = child(node, "retired_pages");
  const errors = child(node, "ecc_errors");
  const flags: [XmlNode | undefined, string, string][] = [
    [remapped, "remapped_row_failure", "row remapping failed"],
    [remapped, "remapped_row_pending", "row remapping waits for a reset"],
    [retired, "pending_retirement", "page retirement waits for a reset"],
    [retired, "pending_blacklist", "page retirement waits for a reset"],
    [errors, "unrepairable_memory", "memory cannot be repaired"],
    [child(node, "gpu_reset_status"), "reset_required", "a reset is required"],
    [child(node, "gpu_reset_status"), "drain_and_reset_recommended", "the driver asks for a drain and a reset"],
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
