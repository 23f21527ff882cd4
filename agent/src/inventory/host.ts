// The machine around the GPUs, by systeminformation. Every fact may be missing: one that cannot be read is empty and
// the others stand. CPU count and memory come from Node itself, since placement needs them in any case.

import { availableParallelism, arch, hostname, release, totalmem, cpus } from "node:os";
import { statfs } from "node:fs/promises";
import { create } from "@bufbuild/protobuf";
import { DiskSchema, HostSchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Disk, Host } from "@clodei/proto/gen/clodei/v1/inventory";
import systeminformation from "systeminformation";

const bytesPerMib = 1024 * 1024;
const maxDisks = 128;

/** systeminformation starts tools (lsblk, dmidecode, …); one that hangs must not hold the agent up. */
const factTimeoutMs = 10_000;

/** Reads what changes only with the machine. `workspaceFree` and the engine's version are the caller's to add. */
export async function readHost(): Promise<Host> {
  const [os, disks, system] = await Promise.all([
    fact(systeminformation.osInfo()),
    fact(systeminformation.diskLayout()),
    fact(systeminformation.system()),
  ]);
  return create(HostSchema, {
    hostname: hostname().slice(0, 255),
    // Not cpus().length alone: a container or cpuset may leave the agent fewer.
    cpuCount: Math.max(1, Math.min(availableParallelism(), 4096)),
    cpuModel: (cpus()[0]?.model ?? "").trim().slice(0, 256),
    memoryMib: Math.max(1, Math.floor(totalmem() / bytesPerMib)),
    disks: (disks ?? []).slice(0, maxDisks).map(diskOf),
    os: osName(os).slice(0, 256),
    kernel: release().slice(0, 256),
    architecture: arch().slice(0, 32),
    virtualization: virtualizationOf(system).slice(0, 64),
  });
}

/** Free space in MiB of the file system that holds `folder`, for a process without privileges; undefined if unknown. */
export async function freeMib(folder: string): Promise<number | undefined> {
  try {
    const { bavail, bsize } = await statfs(folder);
    return Math.floor((bavail * bsize) / bytesPerMib);
  } catch {
    return undefined;
  }
}

async function fact<T>(reading: Promise<T>): Promise<T | undefined> {
  const deadline = Promise.withResolvers<undefined>();
  const timer = setTimeout(() => deadline.resolve(undefined), factTimeoutMs);
  try {
    return await Promise.race([reading.catch(() => undefined), deadline.promise]);
  } finally {
    clearTimeout(timer);
  }
}

function diskOf(disk: systeminformation.Systeminformation.DiskLayoutData): Disk {
  return create(DiskSchema, {
    device: disk.device.slice(0, 128),
    type: disk.type.slice(0, 32),
    sizeMib: BigInt(Math.max(0, Math.floor((Number.isFinite(disk.size) ? disk.size : 0) / bytesPerMib))),
    model: disk.name.slice(0, 128),
  });
}

function osName(os: systeminformation.Systeminformation.OsData | undefined): string {
  if (os === undefined) return "";
  const codename = os.codename === "" ? "" : ` (${os.codename})`;
  return `${os.distro} ${os.release}${codename}`.trim();
}

function virtualizationOf(system: systeminformation.Systeminformation.SystemData | undefined): string {
  if (system?.virtual !== true) return "";
  return system.virtualHost === undefined || system.virtualHost === "" ? "unknown hypervisor" : system.virtualHost;
}
