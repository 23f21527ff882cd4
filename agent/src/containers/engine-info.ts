// What the Docker engine says of itself, and what of it decides whether it can hold untrusted containers. The agent
// asks before it trusts an engine, the doctor says it to a person: both by the same rules.
import { access, constants } from "node:fs/promises";
import { join } from "node:path";
import type { DockerClient } from "./docker-client.ts";

/** The engine behind the socket. */
export interface EngineInfo {
  readonly version: string;
  /** Empty where it names none. */
  readonly rootFolder: string;
  readonly storageDriver: string;
  readonly cgroupVersion: string;
  readonly securityOptions: readonly string[];
  readonly runtimes: readonly string[];
  /** Limits that the kernel lets the engine set. */
  readonly limits: Readonly<Record<"memory" | "swap" | "cpu" | "pids", boolean>>;
}

/** Asks the engine. Throws EngineError where it does not answer. */
export async function readEngineInfo(client: DockerClient, signal: AbortSignal): Promise<EngineInfo> {
  const answer: unknown = await client.get("answer", "/info", signal);
  const info = typeof answer === "object" && answer !== null ? (answer as Record<string, unknown>) : {};
  const text = (name: string): string => (typeof info[name] === "string" ? info[name] : "");
  const options = info["SecurityOptions"];
  const runtimes = info["Runtimes"];
  return {
    version: text("ServerVersion"),
    rootFolder: text("DockerRootDir"),
    storageDriver: text("Driver"),
    cgroupVersion: text("CgroupVersion") || "1",
    securityOptions: Array.isArray(options) ? options.map(String) : [],
    runtimes: typeof runtimes === "object" && runtimes !== null ? Object.keys(runtimes) : [],
    limits: {
      memory: info["MemoryLimit"] === true,
      swap: info["SwapLimit"] === true,
      cpu: info["CpuCfsQuota"] === true,
      pids: info["PidsLimit"] === true,
    },
  };
}

/** Its own default is what containers get, since none is named for them. "builtin" from version 23 on. */
export function hasDefaultSeccomp({ securityOptions }: EngineInfo): boolean {
  return securityOptions.some((option) => /^name=seccomp,profile=(default|builtin)$/.test(option));
}

/** Whether the output of its containers can be read, where it writes it. */
export async function canReadOutput({ rootFolder }: EngineInfo): Promise<boolean> {
  if (rootFolder === "") return false;
  return access(join(rootFolder, "containers"), constants.R_OK | constants.X_OK).then(
    () => true,
    () => false,
  );
}
