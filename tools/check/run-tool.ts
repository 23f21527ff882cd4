import { spawn } from "node:child_process";
import { join } from "node:path";

/** Longest output of one tool that is kept, in characters: a broken tree must not fill memory. */
const maxOutputCharacters = 200_000;
/** A tool that takes longer than this hangs: the slowest needs some seconds. */
const toolTimeoutMs = 180_000;

/** What a tool said and how it ended. */
export type ToolResult = { readonly ok: boolean; readonly output: string; readonly stdout: string };

/** The program of an installed npm package. */
export function packageProgram(root: string, name: string): string {
  return join(root, "node_modules", ".bin", name);
}

/** Runs a tool in the checkout; a tool that cannot be started or hangs is not ok and says so in its output. */
export function runTool(root: string, command: string, parameters: readonly string[]): Promise<ToolResult> {
  return new Promise((resolve) => {
    const child = spawn(command, parameters, {
      cwd: root,
      env: { ...process.env, NO_COLOR: "1", FORCE_COLOR: "0" },
      stdio: ["ignore", "pipe", "pipe"],
      timeout: toolTimeoutMs,
      killSignal: "SIGKILL",
    });
    let output = "";
    let stdout = "";
    child.stdout.setEncoding("utf8").on("data", (chunk: string) => {
      stdout += chunk;
      if (output.length < maxOutputCharacters) output += chunk;
    });
    child.stderr.setEncoding("utf8").on("data", (chunk: string) => {
      if (output.length < maxOutputCharacters) output += chunk;
    });
    child.once("error", (error) => resolve({ ok: false, output: `${command}: ${error.message}`, stdout: "" }));
    child.once("close", (code, signal) => {
      const end = signal === null ? "" : `\n${command} was ended by ${signal} after ${toolTimeoutMs / 1000} s at most`;
      resolve({ ok: code === 0, output: output + end, stdout });
    });
  });
}
