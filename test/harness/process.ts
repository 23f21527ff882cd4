// A program under test as a real process: its output is kept, and it ends with the test whatever happens.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";

const endWithParent = new URL("end-with-parent.mjs", import.meta.url).href;

/** How much of a process's output is kept for the message of a failed test. */
const keptOutputCharacters = 64_000;

/** How long a process may take to end after SIGTERM before it is killed. */
const stopTimeoutMs = 35_000;

export interface ProgramOptions {
  readonly name: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** Written to its standard input, which is then closed. */
  readonly input?: string;
}

/** A Node program that runs. */
export class Program implements AsyncDisposable {
  readonly name: string;
  readonly #child: ChildProcess;
  #output = "";
  #stdout = "";

  constructor(options: ProgramOptions) {
    this.name = options.name;
    this.#child = spawn(process.execPath, ["--import", endWithParent, ...options.args], {
      // Nothing of the surrounding environment but what a program needs to be found and to be readable.
      env: { PATH: process.env["PATH"] ?? "", HOME: process.env["HOME"] ?? "/root", ...options.env },
      stdio: ["pipe", "pipe", "pipe"],
    });
    this.#child.stdin?.on("error", () => {});
    this.#child.stdin?.end(options.input ?? "");
    const keep = (text: string): void => {
      this.#output = (this.#output + text).slice(-keptOutputCharacters);
    };
    this.#child.stdout?.setEncoding("utf8").on("data", (text: string) => {
      this.#stdout = (this.#stdout + text).slice(-keptOutputCharacters);
      keep(text);
    });
    this.#child.stderr?.setEncoding("utf8").on("data", keep);
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error(`${this.name} did not start`);
    return this.#child.pid;
  }

  get running(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** The last part of what it printed, both streams as they came. */
  get output(): string {
    return this.#output;
  }

  /** The last part of what it printed to standard output. */
  get stdout(): string {
    return this.#stdout;
  }

  /** Waits until `ready` returns a value, and fails when the process ends first or the time is over. */
  async until<T>(what: string, ready: () => T | undefined | Promise<T | undefined>, timeoutMs = 30_000): Promise<T> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const value = await ready();
      if (value !== undefined) return value;
      if (!this.running) throw new Error(`${this.name} ended before ${what}:\n${this.#output}`);
      if (performance.now() > deadline)
        throw new Error(`${this.name}: no ${what} in ${timeoutMs} ms:\n${this.#output}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  /** Waits for its end and returns its exit code; a signal's end is -1. */
  async exit(timeoutMs = 60_000): Promise<number> {
    if (this.running) {
      const timer = setTimeout(() => this.#child.kill("SIGKILL"), timeoutMs);
      await once(this.#child, "exit");
      clearTimeout(timer);
    }
    return this.#child.exitCode ?? -1;
  }

  /** Kills it at once, as a power cut would. */
  async kill(): Promise<void> {
    if (!this.running) return;
    const ended = once(this.#child, "exit");
    this.#child.kill("SIGKILL");
    await ended;
  }

  /** Ends it in order. */
  async stop(): Promise<void> {
    if (!this.running) return;
    this.#child.kill("SIGTERM");
    await this.exit(stopTimeoutMs);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

/** Runs a Node program to its end and returns its standard output; anything but exit code 0 is an error. */
export async function runProgram(options: ProgramOptions): Promise<string> {
  const program = new Program(options);
  const code = await program.exit();
  if (code !== 0) throw new Error(`${options.name} ended with ${code}:\n${program.output}`);
  return program.stdout;
}
