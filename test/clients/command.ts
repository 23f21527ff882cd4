// Programs that others wrote, run as a person runs them.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";

/** buf's own program: its wrapper of npm does not hand signals down. */
const bufFolder = dirname(
  fileURLToPath(import.meta.resolve(`@bufbuild/buf-${process.platform}-${process.arch}/bin/buf`)),
);
const checkout = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** Patience with a program on a busy machine; then it is killed, and its end tells of the signal. */
const timeoutMs = 120_000;

/** How a program ended. */
export interface Ended {
  /** -1 where a signal ended it. */
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A program that runs, or that has ended. */
export class Command implements AsyncDisposable {
  readonly ended: Promise<Ended>;
  readonly #stop: (signal: NodeJS.Signals) => void;
  stdout = "";
  stderr = "";

  /** @param home What the program takes for its user's home. */
  constructor(program: string, args: readonly string[], home: string, env: Readonly<Record<string, string>> = {}) {
    const child = spawn(program, args, {
      cwd: checkout,
      env: { PATH: `${bufFolder}:${process.env["PATH"] ?? ""}`, HOME: home, ...env },
      stdio: ["ignore", "pipe", "pipe"],
      timeout: timeoutMs,
      killSignal: "SIGKILL",
    });
    child.stdout.setEncoding("utf8").on("data", (text: string) => (this.stdout += text));
    child.stderr.setEncoding("utf8").on("data", (text: string) => (this.stderr += text));
    this.#stop = (signal) => child.kill(signal);
    this.ended = (async () => {
      await once(child, "close");
      return { code: child.exitCode ?? -1, stdout: this.stdout, stderr: this.stderr };
    })();
  }

  /** Ends it as Ctrl-C does. */
  async interrupt(): Promise<Ended> {
    this.#stop("SIGINT");
    return this.ended;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop("SIGKILL");
    await this.ended;
  }
}
