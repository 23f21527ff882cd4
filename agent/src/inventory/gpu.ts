// The node's GPUs: from nvidia-smi, or simulated by an explicit flag and never else. A tool that hangs (a GPU that
// fell off the bus does that to it) is killed at a deadline and told as an error, so the agent itself never hangs.

import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { create } from "@bufbuild/protobuf";
import type { GpuModel } from "@clodei/proto/gpu-models";
import { GpuHealth, GpuSchema, MigMode } from "@clodei/proto/gen/clodei/v1/inventory";
import { parseNvidiaSmi } from "./nvidia-smi.ts";
import type { GpuReadings } from "./nvidia-smi.ts";

/** Eight H100 print 230 kB; 64 GPUs with long process lists stay below this. */
const maxOutputBytes = 16 * 1024 * 1024;

/** A healthy tool answers in under a second; with 8 GPUs and persistence mode off it takes up to 6. */
const defaultTimeoutMs = 15_000;

/** Reads the node's GPUs. No tool means no GPUs; a tool that fails means an error. Never throws but for an abort. */
export async function readGpus(options: {
  readonly nvidiaSmi: string;
  /** Where the tool is looked for, as PATH. Nothing else of the agent's environment reaches it. */
  readonly searchPath: string;
  readonly timeoutMs?: number;
  readonly signal?: AbortSignal;
}): Promise<GpuReadings> {
  const outcome = await runTool(
    options.nvidiaSmi,
    options.searchPath,
    options.timeoutMs ?? defaultTimeoutMs,
    options.signal,
  );
  options.signal?.throwIfAborted();
  switch (outcome.kind) {
    case "absent":
      return { readings: [], error: "" };
    case "failed":
      return { readings: [], error: outcome.message.slice(0, 1024) };
    case "printed": {
      const parsed = parseNvidiaSmi(outcome.stdout);
      // A driver that lost one device prints the others and fails: keep both facts.
      const error = [parsed.error, outcome.complaint].filter((part) => part !== "").join("; ");
      return { readings: parsed.readings, error: error.slice(0, 1024) };
    }
  }
}

type Outcome =
  | { readonly kind: "absent" }
  | { readonly kind: "failed"; readonly message: string }
  | { readonly kind: "printed"; readonly stdout: string; readonly complaint: string };

function runTool(
  path: string,
  searchPath: string,
  timeoutMs: number,
  signal: AbortSignal | undefined,
): Promise<Outcome> {
  const { promise, resolve } = Promise.withResolvers<Outcome>();
  let timedOut = false;
  const tool = execFile(
    path,
    ["-q", "-x"],
    {
      maxBuffer: maxOutputBytes,
      encoding: "utf8",
      env: { PATH: searchPath, LC_ALL: "C" },
      ...(signal === undefined ? {} : { signal }),
    },
    (error, stdout, stderr) => {
      clearTimeout(timer);
      if (timedOut) return;
      resolve(judge(error, stdout, stderr));
    },
  );
  // Not execFile's own timeout: a process stuck in the driver does not even die of SIGKILL, and execFile would wait
  // for its pipes. The answer is given at the deadline, whatever becomes of the process.
  const timer = setTimeout(() => {
    timedOut = true;
    tool.kill("SIGKILL");
    tool.stdout?.destroy();
    tool.stderr?.destroy();
    tool.unref();
    resolve({ kind: "failed", message: `nvidia-smi did not answer within ${timeoutMs} ms` });
  }, timeoutMs);
  return promise;
}

function judge(error: (Error & { code?: unknown }) | null, stdout: string, stderr: string): Outcome {
  if (error === null) return { kind: "printed", stdout, complaint: "" };
  if (error.code === "ENOENT") return { kind: "absent" };
  const words = `${stdout.includes("<nvidia_smi_log") ? "" : stdout} ${stderr}`.replaceAll(/\s+/g, " ").trim();
  const message = `nvidia-smi failed (${describeExit(error)})${words === "" ? "" : `: ${words}`}`;
  // Exit 6 with these words is the tool's way to say "none"; a driver that failed says other words.
  if (words === "No devices were found") return { kind: "printed", stdout: "<nvidia_smi_log/>", complaint: "" };
  return stdout.includes("</nvidia_smi_log>")
    ? { kind: "printed", stdout, complaint: message }
    : { kind: "failed", message };
}

function describeExit(error: Error & { code?: unknown; signal?: unknown }): string {
  if (typeof error.code === "number") return `exit ${error.code}`;
  if (typeof error.signal === "string") return error.signal;
  return typeof error.code === "string" ? error.code : "unknown";
}

/** GPUs that do not exist. The name of each says so, and derives from the node, so that two nodes never share one. */
export function simulateGpus(models: readonly GpuModel[], nodeName: string): GpuReadings {
  const readings = models.map((details, index) => {
    const gpu = create(GpuSchema, {
      uuid: simulatedGpuUuid(nodeName, index),
      productName: details.productName,
      model: details.model,
      memoryMib: details.memoryMib,
      migMode: MigMode.DISABLED,
      health: GpuHealth.HEALTHY,
      simulated: true,
      index,
    });
    return { gpu, utilizationPercent: 0, memoryUsedMib: 0 };
  });
  return { readings, error: "" };
}

/** `GPU-SIM-<hash of node and index>`: the same after a restart. */
export function simulatedGpuUuid(nodeName: string, index: number): string {
  return `GPU-SIM-${createHash("sha256").update(`${nodeName}/${index}`).digest("hex").slice(0, 32)}`;
}
