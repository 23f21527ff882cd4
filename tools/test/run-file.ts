// Runs one test file in a process group of its own, with a limit of time, and sees that nothing of it stays behind.
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import type { Readable } from "node:stream";
import type { EndEvent, Failure, FileResult, TestEvent } from "./result.ts";

/** The last part of what a file prints, in characters: what it said before it failed. */
const maxPrintedCharacters = 64_000;
/** What a file's processes get to end by themselves after SIGTERM. */
const endGraceMs = 3000;
const pollMs = 50;

/** How a file is run. */
export type RunOptions = {
  readonly root: string;
  readonly timeoutMs: number;
  readonly namePattern: string | undefined;
};

type Started = { readonly name: string; readonly nesting: number };

/** Reads the events of one file and keeps count. */
class Tally {
  readonly failures: Failure[] = [];
  readonly skipped: { name: string; reason: string }[] = [];
  readonly running: Started[] = [];
  passed = 0;
  isComplete = false;
  private readonly root: string;

  constructor(root: string) {
    this.root = root;
  }

  get isEmpty(): boolean {
    return this.passed + this.failures.length + this.skipped.length + this.running.length === 0;
  }

  add(event: TestEvent | EndEvent): void {
    if (event.type === "end") {
      this.isComplete = true;
      return;
    }
    if (event.type === "dequeue") {
      this.running.push({ name: event.name, nesting: event.nesting });
      return;
    }
    const index = this.running.findLastIndex(({ name, nesting }) => name === event.name && nesting === event.nesting);
    const path = this.running.filter(({ nesting }, place) => place < index && nesting < event.nesting);
    if (index !== -1) this.running.splice(index, 1);
    const name = [...path.map((started) => started.name), event.name].join(" › ");
    // A parent that failed only through its subtests is told by them.
    if (event.type === "fail" && event.failure === "subtestsFailed") return;
    if (event.type === "fail" && (event.todo === undefined || event.todo === false)) {
      const place =
        event.file === undefined
          ? undefined
          : `${relative(this.root, event.file)}:${event.line ?? 1}:${event.column ?? 1}`;
      this.failures.push({ name, place, text: event.error ?? "failed" });
      return;
    }
    if (event.isSuite) return;
    const mark = event.skip ?? event.todo;
    if (mark === undefined || mark === false) this.passed += 1;
    else this.skipped.push({ name, reason: typeof mark === "string" ? mark : "no reason given" });
  }
}

/** Live processes of a process group; a zombie that waits for its parent is not alive. */
function groupMembers(group: number): { pid: number; command: string }[] {
  if (process.platform !== "linux") return [];
  return readdirSync("/proc").flatMap((name) => {
    if (!/^\d+$/u.test(name)) return [];
    try {
      const stat = readFileSync(`/proc/${name}/stat`, "utf8");
      const [state, , processGroup] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
      if (state === "Z" || Number(processGroup) !== group) return [];
      const command = readFileSync(`/proc/${name}/cmdline`, "utf8").replaceAll("\0", " ").trim();
      return [{ pid: Number(name), command: command.slice(0, 200) }];
    } catch {
      // It ended while we looked.
      return [];
    }
  });
}

function signalGroup(group: number, signal: NodeJS.Signals): void {
  try {
    process.kill(-group, signal);
  } catch {
    // Nobody is left in the group.
  }
}

/** Ends what is left of a group: first with SIGTERM, so that it may clean up. */
export async function endGroup(group: number): Promise<void> {
  signalGroup(group, "SIGTERM");
  const deadlineMs = performance.now() + endGraceMs;
  while (groupMembers(group).length > 0 && performance.now() < deadlineMs) {
    await new Promise((resolve) => setTimeout(resolve, pollMs));
  }
  signalGroup(group, "SIGKILL");
}

function collect(streams: readonly (Readable | null)[]): { text: string } {
  const printed = { text: "" };
  for (const stream of streams) {
    stream?.setEncoding("utf8").on("data", (chunk: string) => {
      printed.text = (printed.text + chunk).slice(-maxPrintedCharacters);
    });
  }
  return printed;
}

function readEvents(eventFile: string, tally: Tally): void {
  if (!existsSync(eventFile)) return;
  // A process that was killed may have left half a line.
  const lines = readFileSync(eventFile, "utf8").split("\n").slice(0, -1);
  for (const line of lines) tally.add(JSON.parse(line) as TestEvent | EndEvent);
}

function start(file: string, eventFile: string, { root, namePattern }: RunOptions): ChildProcess {
  const parameters = [
    "--import",
    join(import.meta.dirname, "end-with-parent.mjs"),
    `--test-reporter=${join(import.meta.dirname, "events.mjs")}`,
    `--test-reporter-destination=${eventFile}`,
    ...(namePattern === undefined ? [] : [`--test-name-pattern=${namePattern}`]),
    join(root, file),
  ];
  return spawn(process.execPath, parameters, {
    cwd: root,
    env: { ...process.env, NO_COLOR: "1" },
    stdio: ["ignore", "pipe", "pipe"],
    detached: true,
  });
}

type End = { readonly status: string; readonly isOk: boolean; readonly timedOut: boolean; readonly left: string[] };

async function waitForEnd(child: ChildProcess, group: number, timeoutMs: number): Promise<End> {
  let timedOut = false;
  const timer = setTimeout(() => {
    timedOut = true;
    void endGroup(group);
  }, timeoutMs);
  const [code, signal] = await new Promise<[number | null, string | null]>((resolve) => {
    child.once("exit", (...end) => resolve(end));
  });
  clearTimeout(timer);
  const left = timedOut ? [] : groupMembers(group).map(({ pid, command }) => `${pid} ${command}`);
  await endGroup(group);
  return { status: signal ?? `status ${code}`, isOk: code === 0, timedOut, left };
}

/** What is wrong with the file as a whole, beside its tests. */
function failureOfFile(file: string, end: End, tally: Tally, options: RunOptions): Failure | undefined {
  const running = tally.running.map(({ name }) => `"${name}"`).join(", ") || "no test";
  const failure = (name: string, text: string): Failure => ({ name, place: file, text });
  if (end.timedOut) {
    return failure("the file ends in time", `not finished after ${options.timeoutMs / 1000} s; running: ${running}`);
  }
  if (!end.isOk && tally.failures.length === 0) {
    return failure("the file can be run", `ended with ${end.status}; running: ${running}`);
  }
  // A file without a test, and one that ends the process in the middle of its tests, look alike.
  const isExpected = tally.isComplete || (tally.isEmpty && options.namePattern !== undefined);
  if (end.isOk && !isExpected) return failure("the file runs its tests to the end", `running: ${running}`);
  if (end.left.length > 0) return failure("the file leaves no process behind", end.left.join("\n"));
  return undefined;
}

/** Runs one test file to its end or its limit of time. `onStart` tells its process group. */
export async function runFile(
  file: string,
  options: RunOptions,
  onStart: (group: number) => void,
): Promise<FileResult> {
  const startMs = performance.now();
  const folder = mkdtempSync(join(tmpdir(), "clodei-test-events-"));
  try {
    const eventFile = join(folder, "events.jsonl");
    const child = start(file, eventFile, options);
    const group = child.pid;
    if (group === undefined) throw new Error(`${process.execPath} cannot be started`);
    onStart(group);
    const printed = collect([child.stdout, child.stderr]);
    const end = await waitForEnd(child, group, options.timeoutMs);
    const tally = new Tally(options.root);
    readEvents(eventFile, tally);
    const failure = failureOfFile(file, end, tally, options);
    const { passed, skipped } = tally;
    const failures = failure === undefined ? tally.failures : [...tally.failures, failure];
    return { file, passed, failures, skipped, printed: printed.text, durationMs: performance.now() - startMs };
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
