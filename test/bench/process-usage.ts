// What a process uses, as the kernel counts it.
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { quantile } from "./figures.ts";

/** What a process used over a time. */
export interface Usage {
  /** The median of what was resident. */
  readonly rssMib: number;
  /** Of one core. */
  readonly cpuPercent: number;
}

/** The kernel's unit of CPU time in /proc, on every architecture that Node runs on. */
const ticksPerSecond = 100;
const sampleEveryMs = 1000;

/** What is resident of a process now. */
export async function rssMib(pid: number): Promise<number> {
  const kib = /^VmRSS:\s+(\d+) kB$/m.exec(await readFile(`/proc/${pid}/status`, "utf8"))?.[1];
  if (kib === undefined) throw new Error(`process ${pid} has no memory`);
  return Number(kib) / 1024;
}

/** CPU time of all threads of a process since its start. */
async function cpuSeconds(pid: number): Promise<number> {
  // The name, in parentheses, may hold spaces. User and system time are the 12th and 13th after it.
  const fields = (await readFile(`/proc/${pid}/stat`, "utf8")).replace(/^.*\) /s, "").split(" ");
  return (Number(fields[11]) + Number(fields[12])) / ticksPerSecond;
}

/** Watches processes over the same time. */
export async function usageOf(pids: readonly number[], windowMs: number): Promise<Usage[]> {
  const beginMs = performance.now();
  const before = await Promise.all(pids.map(cpuSeconds));
  const samples = pids.map((): number[] => []);
  while (performance.now() - beginMs < windowMs) {
    await sleep(sampleEveryMs);
    for (const [index, rss] of (await Promise.all(pids.map(rssMib))).entries()) samples[index]?.push(rss);
  }
  const after = await Promise.all(pids.map(cpuSeconds));
  const seconds = (performance.now() - beginMs) / 1000;
  return pids.map((_pid, index) => ({
    rssMib: quantile(samples[index] ?? [], 0.5),
    cpuPercent: (((after[index] ?? 0) - (before[index] ?? 0)) / seconds) * 100,
  }));
}
