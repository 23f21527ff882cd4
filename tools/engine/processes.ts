// Finds and ends the processes of an engine, whoever started them: by an argument that only they carry, and by the
// control group that the engine puts its containers in. Process ids alone prove nothing after a crash.
import { readdir, readFile, readlink, rmdir } from "node:fs/promises";
import { basename, join } from "node:path";
import { setTimeout as wait } from "node:timers/promises";

const controlGroupRoot = "/sys/fs/cgroup";
const killTimeoutMs = 15_000;
const pollMs = 20;

/** A process that can be told from a later one with the same number. */
export interface ProcessIdentity {
  readonly pid: number;
  /** When it started, in clock ticks since the boot. */
  readonly startTicks: string;
}

/** Who that process is; undefined where it is gone or only waits to be reaped. */
export async function identify(pid: number): Promise<ProcessIdentity | undefined> {
  const stat = await readFile(`/proc/${pid}/stat`, "latin1").catch(() => "");
  // The name in parentheses may hold blanks and parentheses itself.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const [state, startTicks] = [fields[0], fields[19]];
  if (state === undefined || startTicks === undefined || state === "Z" || state === "X") return undefined;
  return { pid, startTicks };
}

/** Whether that very process still runs. */
export async function isAlive(identity: ProcessIdentity): Promise<boolean> {
  return (await identify(identity.pid))?.startTicks === identity.startTicks;
}

/** Processes one of whose arguments holds the text. */
export async function pidsByArgument(text: string): Promise<number[]> {
  const pids: number[] = [];
  for (const name of await readdir("/proc")) {
    if (!/^[1-9][0-9]*$/.test(name) || Number(name) === process.pid) continue;
    const line = await readFile(`/proc/${name}/cmdline`, "utf8").catch(() => "");
    if (line.includes(text)) pids.push(Number(name));
  }
  return pids;
}

/** The file name of the program that a process runs, which its arguments do not decide; "" where it is gone. */
export async function programName(pid: number): Promise<string> {
  const path = await readlink(`/proc/${pid}/exe`).catch(() => "");
  // The kernel adds this where the file was replaced since, as an update of the package does.
  return basename(path.replace(/ \(deleted\)$/, ""));
}

/** Kills them, and waits until they are gone. */
export async function killAll(pids: readonly number[]): Promise<void> {
  for (const pid of pids) {
    try {
      process.kill(pid, "SIGKILL");
    } catch {
      // It ended by itself.
    }
  }
  const deadline = performance.now() + killTimeoutMs;
  for (const pid of pids) {
    while ((await identify(pid)) !== undefined) {
      if (performance.now() > deadline) throw new Error(`process ${pid} does not end after SIGKILL`);
      await wait(pollMs);
    }
  }
}

/** Kills every process in the control group of that name, in every hierarchy, and removes the groups. */
export async function destroyControlGroup(name: string): Promise<void> {
  const groups = await controlGroups(name);
  // A process can fork between being listed and being killed: look again until nobody is left.
  for (let round = 0; round < 100; round += 1) {
    const pids = new Set<number>();
    for (const group of groups) {
      const text = await readFile(join(group, "cgroup.procs"), "latin1").catch(() => "");
      for (const line of text.split("\n")) if (line !== "" && line !== "0") pids.add(Number(line));
    }
    if (pids.size === 0) break;
    await killAll([...pids]);
  }
  // The deepest first: a group with children cannot be removed.
  for (const group of groups.toReversed()) await rmdir(group).catch(() => {});
}

async function controlGroups(name: string): Promise<string[]> {
  const hierarchies = (await readdir(controlGroupRoot, { withFileTypes: true }).catch(() => []))
    .filter((entry) => entry.isDirectory())
    .map((entry) => join(controlGroupRoot, entry.name));
  const found: string[] = [];
  for (const parent of [controlGroupRoot, ...hierarchies]) await addGroups(join(parent, name), found);
  return found;
}

async function addGroups(group: string, found: string[]): Promise<void> {
  const entries = await readdir(group, { withFileTypes: true }).catch(() => undefined);
  if (entries === undefined) return;
  found.push(group);
  for (const entry of entries) if (entry.isDirectory()) await addGroups(join(group, entry.name), found);
}
