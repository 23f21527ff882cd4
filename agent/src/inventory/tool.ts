// Runs a tool of a GPU driver. One that hangs (a GPU that fell off the bus does that to it) is killed at a deadline and
// told as an error, so the agent itself never hangs.

import { execFile } from "node:child_process";
import { basename } from "node:path";

/** Eight H100 print 230 kB; 64 GPUs with long process lists stay below this. */
const maxOutputBytes = 16 * 1024 * 1024;

/** A healthy tool answers in under a second; with 8 GPUs and persistence mode off it takes up to 6. */
const defaultTimeoutMs = 15_000;

/** How to call a tool. */
export interface ToolCall {
  /** Its path, or its name, which is then looked for. */
  readonly tool: string;
  readonly args: readonly string[];
  /** Where tools are looked for, as PATH. Nothing else of the agent's environment reaches it. */
  readonly searchPath: string;
  readonly timeoutMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** What became of a call. A tool can print and fail: a driver that lost one device tells of the others. */
export type ToolOutcome =
  | { readonly kind: "absent" }
  | { readonly kind: "ended"; readonly stdout: string; readonly failure: ToolFailure | undefined }
  | { readonly kind: "hung"; readonly message: string };

/** How a tool failed. */
export interface ToolFailure {
  /** "exit 15", or the signal's name. */
  readonly how: string;
  readonly stderr: string;
}

/** Calls a tool. Never throws but for an abort. */
export async function callTool(call: ToolCall): Promise<ToolOutcome> {
  const { signal, timeoutMs = defaultTimeoutMs } = call;
  const { promise, resolve } = Promise.withResolvers<ToolOutcome>();
  let timedOut = false;
  const child = execFile(
    call.tool,
    [...call.args],
    {
      maxBuffer: maxOutputBytes,
      encoding: "utf8",
      env: { PATH: call.searchPath, LC_ALL: "C" },
      ...(signal === undefined ? {} : { signal }),
    },
    (error: (Error & { code?: unknown }) | null, stdout, stderr) => {
      clearTimeout(timer);
      if (timedOut) return;
      if (error?.code === "ENOENT") resolve({ kind: "absent" });
      else
        resolve({ kind: "ended", stdout, failure: error === null ? undefined : { how: describeExit(error), stderr } });
    },
  );
  // Not execFile's own timeout: a process stuck in the driver does not even die of SIGKILL, and execFile would wait
  // for its pipes. The answer is given at the deadline, whatever becomes of the process.
  const timer = setTimeout(() => {
    timedOut = true;
    child.kill("SIGKILL");
    child.stdout?.destroy();
    child.stderr?.destroy();
    child.unref();
    resolve({ kind: "hung", message: `${basename(call.tool)} did not answer within ${timeoutMs} ms` });
  }, timeoutMs);
  const outcome = await promise;
  signal?.throwIfAborted();
  return outcome;
}

/** A failure in one line: how, and the tool's own words. */
export function describeFailure(tool: string, { how, stderr }: ToolFailure, stdout: string): string {
  const words = `${stdout} ${stderr}`.replaceAll(/\s+/g, " ").trim();
  return `${basename(tool)} failed (${how})${words === "" ? "" : `: ${words}`}`;
}

function describeExit(error: Error & { code?: unknown; signal?: unknown }): string {
  if (typeof error.code === "number") return `exit ${error.code}`;
  if (typeof error.signal === "string") return error.signal;
  return typeof error.code === "string" ? error.code : "unknown";
}
