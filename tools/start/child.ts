// A program of ours as a child: its output goes to a log file, it ends when we end, and it does not hear Ctrl-C.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { type FileHandle, mkdir, open, readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { setTimeout as wait } from "node:timers/promises";
import { findProgram } from "../setup/system.mjs";

/** After SIGTERM: the control plane's drain and some time to close its database. */
const stopTimeoutMs = 35_000;
const pollMs = 50;
/** How much of a log is shown when its program fails, in characters. */
const tailCharacters = 4000;

/** How a child is started. */
export type ChildOptions = {
  readonly name: string;
  /** A TypeScript program, absolute, and its parameters. */
  readonly parameters: readonly string[];
  readonly environment: NodeJS.ProcessEnv;
  readonly logFile: string;
};

/** A program that runs until it is stopped. */
export class Child {
  readonly name: string;
  readonly logFile: string;
  readonly #process: ChildProcess;

  private constructor(name: string, logFile: string, child: ChildProcess) {
    this.name = name;
    this.logFile = logFile;
    this.#process = child;
  }

  /** Starts a program under this Node. */
  static async start(options: ChildOptions): Promise<Child> {
    await mkdir(dirname(options.logFile), { recursive: true, mode: 0o700 });
    const log: FileHandle = await open(options.logFile, "w", 0o600);
    try {
      // Where setpriv is missing, the note of the start still lets the next one end an orphan.
      const setpriv = findProgram("setpriv");
      const command = [process.execPath, ...options.parameters];
      const [program = "", ...parameters] =
        setpriv === undefined ? command : [setpriv, "--pdeathsig", "TERM", "--", ...command];
      const child = spawn(program, parameters, {
        env: options.environment,
        stdio: ["ignore", log.fd, log.fd],
        // A session of its own: Ctrl-C reaches us alone, and we stop things in order.
        detached: true,
      });
      await Promise.race([
        once(child, "spawn"),
        once(child, "error").then(([error]) => Promise.reject(error as Error)),
      ]);
      return new Child(options.name, options.logFile, child);
    } finally {
      await log.close();
    }
  }

  get pid(): number {
    return this.#process.pid ?? 0;
  }

  get isRunning(): boolean {
    return this.#process.exitCode === null && this.#process.signalCode === null;
  }

  /** Settles with the reason once it ended. */
  async ended(): Promise<string> {
    if (this.isRunning) await once(this.#process, "exit");
    return `${this.name} ended with ${this.#process.signalCode ?? `status ${this.#process.exitCode}`}`;
  }

  /** An error that tells the end of its log. */
  async failure(what: string): Promise<Error> {
    const tail = (await readFile(this.logFile, "utf8").catch(() => "")).slice(-tailCharacters);
    return new Error(`${what}; the end of ${this.logFile}:\n${tail}`);
  }

  /** Polls until `ready` gives a value; throws with the log's end where the program ends or the time is over. */
  async waitFor<T>(
    what: string,
    timeoutMs: number,
    ready: () => Promise<T | undefined>,
    signal: AbortSignal,
  ): Promise<T> {
    const deadlineMs = performance.now() + timeoutMs;
    for (;;) {
      signal.throwIfAborted();
      const value = await ready();
      if (value !== undefined) return value;
      if (!this.isRunning) throw await this.failure(`${await this.ended()} before ${what}`);
      if (performance.now() > deadlineMs) throw await this.failure(`no ${what} within ${timeoutMs / 1000} s`);
      await wait(pollMs);
    }
  }

  /** Ends it in order, and by force where it does not end. */
  async stop(): Promise<void> {
    if (!this.isRunning) return;
    const exit = once(this.#process, "exit");
    this.#process.kill("SIGTERM");
    const timer = setTimeout(() => this.#process.kill("SIGKILL"), stopTimeoutMs);
    await exit;
    clearTimeout(timer);
  }
}
