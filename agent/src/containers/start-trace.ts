// What a start left behind that the engine knows nothing of. An engine that was killed in the middle of a start comes
// back with a container that was never started, as far as it can tell; the program may run all the same, may have run
// to its end, or may never have begun. Only the kernel and containerd's shim can still tell, and what they cannot tell
// stays unknown: a program that may have run is not run again.
//
// Debian's engine, killed at 34 random moments of a start: mostly the runtime was cut off before the program could be
// let go, and only a shim was left, which made every later start of that container fail ("already exists").
import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { basename, join } from "node:path";

/** `running` processes of the program are there; `unknown` means that it may have run to its end. */
export type StartTrace = "not_begun" | "running" | "unknown";

const pollMs = 10;
/** How long processes may take to stop or to end after a signal that they cannot refuse. */
const signalTimeoutMs = 5000;
/** What containerd writes into a task's folder once the container is made and its program waits for its start. */
const createdMark = "init.pid";

/**
 * Whether the program of a container began that the engine says it never started. Must not be asked while a start may
 * be under way. A program that waits for its start is halted, so that the answer stays true.
 *
 * @param outputFile Where the engine writes the container's output: it makes that file before anything can run.
 */
export async function traceOfStart(containerId: string, outputFile: string): Promise<StartTrace> {
  const halted = await haltedProcesses(containerId);
  // What waits for its start has neither the filter of system calls nor the name of the customer's program.
  if (halted.length > 0) return halted.every(isWaitingForStart) ? "not_begun" : "running";
  if (!existsSync(outputFile)) return "not_begun";
  const [shim] = shimsOf(containerId);
  if (shim === undefined) return "unknown";
  // A shim works in its task's folder. Nothing runs there before the mark is written.
  const folder = linkTarget(`/proc/${shim}/cwd`);
  const isTaskFolder = folder !== undefined && basename(folder) === containerId;
  return isTaskFolder && !existsSync(join(folder, createdMark)) ? "not_begun" : "unknown";
}

/** Kills the container's processes and its shim, which containerd then clears away after. */
export async function clearStart(containerId: string): Promise<void> {
  const deadline = performance.now() + signalTimeoutMs;
  for (;;) {
    const left = [...processesOf(containerId), ...shimsOf(containerId)];
    if (left.length === 0) return;
    if (performance.now() > deadline) throw new Error(`processes ${left.join(", ")} do not end`);
    for (const pid of left) signal(pid, "SIGKILL");
    await new Promise((resolve) => setTimeout(resolve, pollMs));
  }
}

/**
 * The node's containers of which a shim is there: those that are known, and those whose workspace can be seen to lie
 * below the folder. A shim that a killed engine was about to start can appear after everything of its container was
 * cleared away, and would stay for ever, with whatever it starts.
 */
export function shimsOfNode(workspaceFolder: string, known: ReadonlySet<string>): string[] {
  return processes().flatMap((pid) => {
    const containerId = shimContainer(pid);
    if (containerId === undefined) return [];
    return known.has(containerId) || hasMountBelow(pid, workspaceFolder) ? [containerId] : [];
  });
}

/** Whether the task's configuration, which lies in the folder where its shim works, mounts something below the folder. */
function hasMountBelow(shim: number, folder: string): boolean {
  const taskFolder = linkTarget(`/proc/${shim}/cwd`);
  if (taskFolder === undefined) return false;
  return read(join(taskFolder, "config.json")).includes(`"source":${JSON.stringify(`${folder}/`).slice(0, -1)}`);
}

/** Halts the container's processes and returns them once none of them moves. */
async function haltedProcesses(containerId: string): Promise<number[]> {
  const deadline = performance.now() + signalTimeoutMs;
  for (;;) {
    const pids = processesOf(containerId);
    if (pids.every((pid) => isHalted(pid))) return pids;
    if (performance.now() > deadline) throw new Error(`processes ${pids.join(", ")} cannot be halted`);
    for (const pid of pids) signal(pid, "SIGSTOP");
    await new Promise((resolve) => setTimeout(resolve, pollMs));
  }
}

function isHalted(pid: number): boolean {
  return /^State:\s+[TX]/m.test(read(`/proc/${pid}/status`));
}

/** The runtime's own process, which becomes the customer's program when the container is started. */
function isWaitingForStart(pid: number): boolean {
  const [program = "", argument] = read(`/proc/${pid}/cmdline`).split("\0");
  return basename(program) === "runc" && argument === "init" && /^Seccomp:\s+0$/m.test(read(`/proc/${pid}/status`));
}

function processesOf(containerId: string): number[] {
  return processes().filter(
    (pid) => read(`/proc/${pid}/cgroup`).includes(containerId) && !/^State:\s+Z/m.test(read(`/proc/${pid}/status`)),
  );
}

function shimsOf(containerId: string): number[] {
  return processes().filter((pid) => shimContainer(pid) === containerId);
}

/** The container that the process is a shim of; undefined where it is none. */
function shimContainer(pid: number): string | undefined {
  const [program = "", ...args] = read(`/proc/${pid}/cmdline`).split("\0");
  if (!basename(program).startsWith("containerd-shim")) return undefined;
  const id = args[args.indexOf("-id") + 1];
  return id !== undefined && /^[0-9a-f]{64}$/.test(id) ? id : undefined;
}

function processes(): number[] {
  return readdirSync("/proc")
    .filter((name) => /^[0-9]+$/.test(name))
    .map(Number);
}

/** Empty for a process that has ended. */
function read(path: string): string {
  try {
    return readFileSync(path, "latin1");
  } catch (error) {
    if (isGone(error)) return "";
    throw error;
  }
}

function linkTarget(path: string): string | undefined {
  try {
    return readlinkSync(path);
  } catch (error) {
    if (isGone(error)) return undefined;
    throw error;
  }
}

function signal(pid: number, name: "SIGSTOP" | "SIGKILL"): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if (!isGone(error)) throw error;
  }
}

function isGone(error: unknown): boolean {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  return code === "ENOENT" || code === "ESRCH";
}
