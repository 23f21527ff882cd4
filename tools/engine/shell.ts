// Runs the system's tools (ip, iptables, umount) with an argument list and no shell.
import { execFile } from "node:child_process";
import { promisify } from "node:util";

const toolTimeoutMs = 20_000;

/** Where administrators' tools stand; a user's PATH may lack them. */
const toolPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/** Runs a tool and returns its standard output. Throws what it wrote to standard error. */
export async function runTool(name: string, ...args: readonly string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(name, args, {
    timeout: toolTimeoutMs,
    env: { PATH: toolPath, LC_ALL: "C" },
  });
  return stdout;
}

/** Runs a tool whose failure means that there is nothing to undo. */
export async function tryTool(name: string, ...args: readonly string[]): Promise<boolean> {
  try {
    await runTool(name, ...args);
    return true;
  } catch {
    return false;
  }
}
