// The machine around the GPUs, by systeminformation. Every fact may be missing: one that cannot be read is empty and
// the others stand. CPU count and memory come from Node itself, since placement needs them in any case.

import { availableParallelism, arch, hostname, release, totalmem, cpus } from "node:os";
import { readdir, readFile, statfs } from "node:fs/promises";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { DiskSchema, HostSchema, NetworkInterfaceSchema, NumaNodeSchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { Disk, Host, NetworkInterface, NumaNode } from "@clodei/proto/gen/clodei/v1/inventory";
import systeminformation from "systeminformation";

const bytesPerMib = 1024 * 1024;
const maxDisks = 128;
const maxNumaNodes = 64;
const maxInterfaces = 64;

/** systeminformation starts tools (lsblk, dmidecode, …); one that hangs must not hold the agent up. */
const factTimeoutMs = 10_000;

/** Reads what changes only with the machine. `workspaceFree` and the engine's version are the caller's to add. */
export async function readHost(): Promise<Host> {
  const [os, disks, system, cpu, memory, interfaces, numaNodes] = await Promise.all([
    fact(systeminformation.osInfo()),
    fact(systeminformation.diskLayout()),
    fact(systeminformation.system()),
    fact(systeminformation.cpu()),
    fact(systeminformation.mem()),
    fact(systeminformation.networkInterfaces("*")),
    readNumaNodes(),
  ]);
  const [cpuSockets, cpuCores] = [count(cpu?.processors), count(cpu?.physicalCores)];
  // No swap is a fact; that it could not be read is none.
  const swapMib = memory === undefined ? undefined : mebibytes(memory.swaptotal);
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
    numaNodes,
    networkInterfaces: [interfaces ?? []].flat().filter(isOfMachine).slice(0, maxInterfaces).map(interfaceOf),
    ...(cpuSockets === undefined ? {} : { cpuSockets }),
    ...(cpuCores === undefined ? {} : { cpuCores }),
    ...(swapMib === undefined ? {} : { swapMib }),
  });
}

/** From the kernel: systeminformation does not know them. */
export async function readNumaNodes(folder = "/sys/devices/system/node"): Promise<NumaNode[]> {
  const names = await readdir(folder).catch(() => []);
  const indices = names.flatMap((name) => /^node([0-9]{1,4})$/.exec(name)?.[1] ?? []).map(Number);
  const first = indices.toSorted((left, right) => left - right).slice(0, maxNumaNodes);
  return Promise.all(
    first.map(async (index) => {
      const read = (file: string) => readFile(join(folder, `node${index}`, file), "latin1").catch(() => "");
      const [cpulist, meminfo] = await Promise.all([read("cpulist"), read("meminfo")]);
      const kib = /MemTotal:\s+([0-9]{1,15}) kB/.exec(meminfo)?.[1];
      return create(NumaNodeSchema, {
        index,
        cpus: cpulist.trim().slice(0, 256),
        ...(kib === undefined ? {} : { memoryMib: Math.floor(Number(kib) / 1024) }),
      });
    }),
  );
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

type Interface = systeminformation.Systeminformation.NetworkInterfacesData;

/** Bridges and their ends come and go with containers, and their number is nobody's business but the agent's. */
function isOfMachine({ iface, internal, virtual }: Interface): boolean {
  return !internal && !virtual && !/^(docker|br-|veth|clodei)/.test(iface);
}

function interfaceOf({ iface, type, speed, operstate }: Interface): NetworkInterface {
  const speedMbps = count(speed ?? undefined);
  return create(NetworkInterfaceSchema, {
    name: iface.slice(0, 64),
    type: type.slice(0, 32),
    up: operstate === "up",
    ...(speedMbps === undefined ? {} : { speedMbps }),
  });
}

/** A number of things of which there is at least one; undefined for everything else that a fact can be. */
function count(value: unknown): number | undefined {
  const isCount = typeof value === "number" && Number.isInteger(value) && value >= 1 && value <= 0xffff_ffff;
  return isCount ? value : undefined;
}

function mebibytes(bytes: number): number | undefined {
  return Number.isFinite(bytes) && bytes >= 0 ? Math.min(Math.floor(bytes / bytesPerMib), 0xffff_ffff) : undefined;
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
