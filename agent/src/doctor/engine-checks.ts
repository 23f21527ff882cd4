// Whether the Docker engine is one that can hold untrusted containers, by what it says of itself.

import { access, constants } from "node:fs/promises";
import { DockerClient } from "../containers/docker-client.ts";
import { canReadOutput, type EngineInfo, hasDefaultSeccomp, readEngineInfo } from "../containers/engine-info.ts";
import { messageOf } from "../error-reason.ts";
import type { Finding } from "./finding.ts";
import { findingsOf } from "./finding.ts";

/** The oldest release that the agent was run on. */
const leastVersion = [20, 10] as const;
const answerTimeoutMs = 10_000;

/** Asks the engine. A finding where it does not answer. */
export async function readEngine(socketPath: string): Promise<EngineInfo | Finding> {
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
    return await readEngineInfo(new DockerClient(socketPath), AbortSignal.timeout(answerTimeoutMs));
  } catch (error) {
    const message = error instanceof Error && error.name === "TimeoutError" ? "no answer in 10 s" : messageOf(error);
    return failed(`the engine at ${socketPath} does not answer: ${message}`, "look at `journalctl -u docker`");
  }
}

/** All that an answering engine is judged by. */
export async function checkEngine(info: EngineInfo): Promise<Finding[]> {
  return [checkVersion(info), checkLimits(info), checkSeccomp(info), await checkLogs(info)];
}

function checkVersion({ version }: EngineInfo): Finding {
  const { ok, failed } = findingsOf("docker");
  const [major = 0, minor = 0] = version.split(".").map(Number);
  const isOld = major < leastVersion[0] || (major === leastVersion[0] && minor < leastVersion[1]);
  return isOld
    ? failed(`Docker ${version} is too old`, `install Docker ${leastVersion.join(".")} or newer`)
    : ok(`Docker ${version} answers`);
}

function checkLimits({ limits, cgroupVersion }: EngineInfo): Finding {
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

function checkSeccomp(info: EngineInfo): Finding {
  const { ok, failed } = findingsOf("seccomp");
  if (hasDefaultSeccomp(info)) return ok("Docker's default profile");
  const option = info.securityOptions.find((text) => text.startsWith("name=seccomp"));
  return option === undefined
    ? failed("the engine filters no system calls", "boot a kernel with CONFIG_SECCOMP_FILTER")
    : failed(
        `the engine's profile is not Docker's default (${option})`,
        "remove `seccomp-profile` from /etc/docker/daemon.json, and restart the engine",
      );
}

async function checkLogs(info: EngineInfo): Promise<Finding> {
  const { ok, failed } = findingsOf("docker-logs");
  return (await canReadOutput(info))
    ? ok(`output of containers can be read below ${info.rootFolder}`)
    : failed(
        `output of containers cannot be read below ${info.rootFolder}`,
        "run the agent as root on the engine's machine",
      );
}
