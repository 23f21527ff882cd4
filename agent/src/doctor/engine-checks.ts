// Whether the Docker engine is one that can hold untrusted containers, by what it says of itself.

import { access, constants } from "node:fs/promises";
import { join } from "node:path";
import { DockerClient } from "../containers/docker-client.ts";
import { messageOf } from "../error-reason.ts";
import type { Finding } from "./finding.ts";
import { findingsOf } from "./finding.ts";

/** The oldest release that the agent was run on. */
const leastVersion = [20, 10] as const;
const answerTimeoutMs = 10_000;

/** What the engine says of itself, as far as is looked at. */
export interface EngineFacts {
  readonly version: string;
  readonly rootFolder: string;
  readonly cgroupVersion: string;
  readonly securityOptions: readonly string[];
  readonly runtimes: readonly string[];
  /** Limits that the kernel lets the engine set. */
  readonly limits: Readonly<Record<"memory" | "swap" | "cpu" | "pids", boolean>>;
}

/** Asks the engine. A finding where it does not answer. */
export async function readEngine(socketPath: string): Promise<EngineFacts | Finding> {
  const { failed } = findingsOf("docker");
  try {
    await access(socketPath, constants.R_OK | constants.W_OK);
  } catch (error) {
    const isMissing = error instanceof Error && "code" in error && error.code === "ENOENT";
    return isMissing
      ? failed(`there is no socket ${socketPath}`, "start the Docker engine, or name its socket by --docker-socket")
      : failed(`the socket ${socketPath} may not be used`, "run the agent as root, or as a member of the group docker");
  }
  try {
    const client = new DockerClient(socketPath);
    const info: unknown = await client.get("answer", "/info", AbortSignal.timeout(answerTimeoutMs));
    return factsOf(typeof info === "object" && info !== null ? (info as Record<string, unknown>) : {});
  } catch (error) {
    const message = error instanceof Error && error.name === "TimeoutError" ? "no answer in 10 s" : messageOf(error);
    return failed(`the engine at ${socketPath} does not answer: ${message}`, "look at `journalctl -u docker`");
  }
}

function factsOf(info: Record<string, unknown>): EngineFacts {
  const text = (name: string): string => (typeof info[name] === "string" ? info[name] : "");
  const list = (value: unknown): string[] => (Array.isArray(value) ? value.map(String) : []);
  const runtimes = info["Runtimes"];
  return {
    version: text("ServerVersion"),
    rootFolder: text("DockerRootDir"),
    cgroupVersion: text("CgroupVersion") || "1",
    securityOptions: list(info["SecurityOptions"]),
    runtimes: typeof runtimes === "object" && runtimes !== null ? Object.keys(runtimes) : [],
    limits: {
      memory: info["MemoryLimit"] === true,
      swap: info["SwapLimit"] === true,
      cpu: info["CpuCfsQuota"] === true,
      pids: info["PidsLimit"] === true,
    },
  };
}

/** All that an answering engine is judged by. */
export async function checkEngine(facts: EngineFacts): Promise<Finding[]> {
  return [checkVersion(facts), checkLimits(facts), checkSeccomp(facts), await checkLogs(facts)];
}

function checkVersion({ version }: EngineFacts): Finding {
  const { ok, failed } = findingsOf("docker");
  const [major = 0, minor = 0] = version.split(".").map(Number);
  const isOld = major < leastVersion[0] || (major === leastVersion[0] && minor < leastVersion[1]);
  return isOld
    ? failed(`Docker ${version} is too old`, `install Docker ${leastVersion.join(".")} or newer`)
    : ok(`Docker ${version} answers`);
}

function checkLimits({ limits, cgroupVersion }: EngineFacts): Finding {
  const { ok, warning, failed } = findingsOf("cgroups");
  const missing = (["memory", "cpu", "pids"] as const).filter((name) => !limits[name]);
  if (missing.length > 0) {
    return failed(
      `the engine cannot limit ${missing.join(", ")} of a container (cgroup v${cgroupVersion})`,
      "boot with the controllers: `cgroup_enable=memory`, and no `cgroup_disable=…`, on the kernel's command line",
    );
  }
  return limits.swap
    ? ok(`memory, swap, CPU and processes can be limited (cgroup v${cgroupVersion})`)
    : warning(
        `swap cannot be limited (cgroup v${cgroupVersion}): a container may use the node's`,
        "boot with `swapaccount=1`, or turn swap off: `swapoff -a`",
      );
}

function checkSeccomp({ securityOptions }: EngineFacts): Finding {
  const { ok, failed } = findingsOf("seccomp");
  const option = securityOptions.find((text) => text.startsWith("name=seccomp"));
  if (option === undefined)
    return failed("the engine filters no system calls", "boot a kernel with CONFIG_SECCOMP_FILTER");
  return /^name=seccomp,profile=(default|builtin)$/.test(option)
    ? ok("Docker's default profile")
    : failed(
        `the engine's profile is not Docker's default (${option})`,
        "remove `seccomp-profile` from /etc/docker/daemon.json, and restart the engine",
      );
}

async function checkLogs({ rootFolder }: EngineFacts): Promise<Finding> {
  const { ok, failed } = findingsOf("docker-logs");
  try {
    await access(join(rootFolder, "containers"), constants.R_OK | constants.X_OK);
    return ok(`output of containers can be read below ${rootFolder}`);
  } catch {
    return failed(
      `output of containers cannot be read below ${rootFolder}`,
      "run the agent as root on the engine's machine",
    );
  }
}
