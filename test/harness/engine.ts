// A Docker engine for a test: its own, with nothing outside in reach, and gone with the test.
import { accessSync, constants } from "node:fs";
import { chmod, mkdtemp } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  type PrivateEngine,
  type PrivateEngineOptions,
  startPrivateEngine,
} from "../../tools/engine/private-engine.ts";

/** Why no engine can be started here; undefined where one can. For `test(name, {skip: engineUnavailable}, …)`. */
export const engineUnavailable: string | undefined = whyNot([
  ["dockerd", "Debian's docker.io"],
  ["ip", "Debian's iproute2"],
  ["iptables", "Debian's iptables"],
  ["nsenter", "Debian's util-linux"],
  ["busybox", "Debian's busybox-static"],
]);

/** Why no registry can be started here; undefined where one can. */
export const registryUnavailable: string | undefined =
  engineUnavailable ?? whyNot([["docker-registry", "Debian's docker-registry"]]);

/** Starts an engine in a temporary folder. Loads no image: see `importBusybox`. */
export async function startTestEngine(
  options: Pick<PrivateEngineOptions, "daemonArguments" | "prelude"> = {},
): Promise<PrivateEngine> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-engine-"));
  // The engine refuses some of its features below a folder that others cannot enter.
  await chmod(folder, 0o755);
  return startPrivateEngine({ folder, name: "clodei-test", internet: false, temporary: true, ...options });
}

function whyNot(programs: readonly (readonly [string, string])[]): string | undefined {
  if (process.platform !== "linux") return "needs Linux: a Docker engine of its own";
  if (process.getuid?.() !== 0) return "needs root: a Docker engine of its own";
  for (const [program, source] of programs) {
    if (!isInstalled(program)) return `needs ${program} (${source})`;
  }
  return undefined;
}

function isInstalled(program: string): boolean {
  return ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].some((folder) => {
    try {
      accessSync(join(folder, program), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}
