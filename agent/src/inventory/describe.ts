// The inventory for a person at a terminal.

import { GpuHealth, MigMode } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Gpu, Host, NetworkInterface, NodeInventory } from "@clodei/proto/gen/clodei/v1/inventory";

/** A few lines of text. */
export function describeInventory({ gpus, host, gpuError }: NodeInventory): string {
  const lines = [
    `Host     ${host?.hostname ?? ""}: ${host?.os ?? ""}, kernel ${host?.kernel ?? ""}, ${host?.architecture ?? ""}`,
    `CPU      ${host?.cpuCount ?? 0} × ${host?.cpuModel ?? ""}${describeTopology(host)}`,
    `Memory   ${host?.memoryMib ?? 0} MiB`,
    `Machine  ${host === undefined || host.virtualization === "" ? "bare metal" : host.virtualization}`,
    ...(host?.disks ?? []).map((disk) => `Disk     ${disk.device} ${disk.type} ${disk.sizeMib} MiB ${disk.model}`),
    ...(host?.networkInterfaces ?? []).map(describeInterface),
    ...gpus.map(describeGpu),
  ];
  if (gpus.length === 0 && gpuError === "") lines.push("GPU      none");
  if (gpuError !== "") lines.push(`GPU      ${gpuError}`);
  return lines.join("\n");
}

function describeTopology(host: Host | undefined): string {
  const { cpuSockets, cpuCores, numaNodes = [] } = host ?? {};
  const parts = [
    cpuSockets === undefined ? "" : `sockets: ${cpuSockets}`,
    cpuCores === undefined ? "" : `cores: ${cpuCores}`,
    numaNodes.length === 0 ? "" : `NUMA nodes: ${numaNodes.length}`,
  ].filter((part) => part !== "");
  return parts.length === 0 ? "" : ` (${parts.join(", ")})`;
}

function describeInterface({ name, speedMbps, up }: NetworkInterface): string {
  return `Network  ${name} ${up ? "up" : "down"}${speedMbps === undefined ? "" : ` ${speedMbps} Mbit/s`}`;
}

function describeGpu(gpu: Gpu): string {
  const notes = [
    gpu.simulated ? "simulated" : "",
    gpu.migMode === MigMode.ENABLED ? "MIG on" : "",
    gpu.health === GpuHealth.HEALTHY ? "" : `not healthy: ${gpu.healthMessage}`,
  ].filter((note) => note !== "");
  const model = gpu.model === "" ? `${gpu.productName} (unknown model)` : gpu.model;
  return `GPU ${gpu.index}    ${model} ${gpu.memoryMib} MiB ${gpu.uuid}${notes.length === 0 ? "" : ` (${notes.join("; ")})`}`;
}
