// Reads back from the kernel what a container's processes really may do. What Docker was asked for and what it says
// it did prove nothing; /proc does.
//
// Every process of the container's control group is read, because one that was added later (`docker exec`) need not be
// like the first. Each is held by a descriptor on its folder in /proc: its number may be another process's by the next
// read, the descriptor's answers stop with the process.
import { closeSync, constants, openSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { type Isolation, IsolationSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";

import type { AllowedGroups } from "./image-user.ts";

/** The isolation is not what it must be. */
export class IsolationError extends Error {
  override readonly name = "IsolationError";
}

/** Whose isolation is read. */
export interface IsolationSubject {
  /** The container's first process, as the engine names it. */
  readonly pid: number;
  readonly containerId: string;
  /** The user that every process must be; undefined compares nothing. */
  readonly uid: number | undefined;
  /** The groups that the first process may be in; undefined compares nothing. The others must be in the same. */
  readonly groups: AllowedGroups | undefined;
}

const seccompFilterMode = 2;
/** PF_EXITING, in the flags of /proc/PID/stat. */
const exitingFlag = 0x4;
/** How often new processes are looked for. A container that forks without end shows different ones for ever. */
const maxRounds = 3;
const capabilitySets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] as const;
/** On version 1 each limit has a hierarchy of its own. */
const limitingControllers = ["pids", "memory", "cpu"] as const;
const ownNamespaces = ["pid", "mnt", "ipc", "uts", "net", "cgroup"] as const;

/**
 * Reads the isolation of all processes of a container and returns the first one's. Throws IsolationError for the first
 * process that may do more than it must.
 *
 * @returns `ended`: the container had ended before it could be read. `elsewhere`: the process is not in the container's
 * control groups, so that its number is another process's by now, or the container's limits do not hold for it.
 */
export function readIsolation(subject: IsolationSubject): Isolation | "ended" | "elsewhere" {
  const first = openProcess(subject.pid);
  if (first === undefined) return "ended";
  try {
    const groups = controlGroupsOf(first);
    const status = readStatus(first);
    // One that ended and was not fetched yet shows what is left of it, which is not what it ran with.
    if (groups === undefined || status === undefined || hasEnded(status)) return "ended";
    // On version 1 the kernel shows one that is ending in the root group, from before it is a zombie.
    if (!isIn(groups, subject.containerId)) return isEnding(first) ? "ended" : "elsewhere";
    checkStatus(subject, status, subject.pid);
    checkGroups(subject, status);
    checkNamespaces(first, subject.pid);
    checkOthers(subject, processGroupOf(groups), status);
    return create(IsolationSchema, {
      effectiveCapabilities: BigInt(`0x${status.get("CapEff") ?? "0"}`),
      noNewPrivileges: status.get("NoNewPrivs") === "1",
      seccompMode: Number(status.get("Seccomp")),
      seccompFilters: Number(status.get("Seccomp_filters") ?? "0"),
    });
  } finally {
    closeSync(first);
  }
}

function checkOthers(subject: IsolationSubject, group: string, first: ReadonlyMap<string, string>): void {
  const checked = new Set<number>([subject.pid]);
  for (let round = 0; round < maxRounds; round += 1) {
    const fresh = processesOf(group).filter((pid) => !checked.has(pid));
    if (fresh.length === 0) return;
    for (const pid of fresh) {
      checked.add(pid);
      const descriptor = openProcess(pid);
      if (descriptor === undefined) continue;
      try {
        const status = readStatus(descriptor);
        const groups = controlGroupsOf(descriptor);
        if (status === undefined || groups === undefined || isEnding(descriptor)) continue;
        // It ended since the list was read, and its number is another process's.
        if (!processGroupOf(groups).includes(subject.containerId)) continue;
        if (!isIn(groups, subject.containerId)) throw astray(pid);
        checkStatus(subject, status, pid);
        // Nothing in a container without capabilities can change its groups.
        for (const name of ["Gid", "Groups"]) if (status.get(name) !== first.get(name)) throw unlike(pid, name, status);
      } finally {
        closeSync(descriptor);
      }
    }
  }
}

function openProcess(pid: number): number | undefined {
  if (!Number.isSafeInteger(pid) || pid < 1) return undefined;
  return gone(() => openSync(`/proc/${pid}`, constants.O_RDONLY | constants.O_DIRECTORY));
}

function readStatus(descriptor: number): Map<string, string> | undefined {
  const text = readProcess(descriptor, "status");
  if (text === undefined) return undefined;
  return new Map(
    text.split("\n").map((line) => {
      const colon = line.indexOf(":");
      return [line.slice(0, colon), line.slice(colon + 1).trim()];
    }),
  );
}

function readProcess(descriptor: number, name: string): string | undefined {
  return gone(() => readFileSync(`/proc/self/fd/${descriptor}/${name}`, "latin1"));
}

/** A process that has ended is no violation: the reads of it fail in one of these ways. */
function gone<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch (error) {
    const code = error instanceof Error && "code" in error ? error.code : undefined;
    if (code === "ENOENT" || code === "ESRCH") return undefined;
    throw error;
  }
}

function checkStatus(subject: IsolationSubject, status: ReadonlyMap<string, string>, pid: number): void {
  // It has neither memory nor rights, and shows no seccomp mode.
  if (hasEnded(status)) return;
  const require = (name: string, holds: boolean): void => {
    if (!holds) throw unlike(pid, name, status);
  };
  for (const name of capabilitySets) require(name, /^0+$/.test(status.get(name) ?? ""));
  require("NoNewPrivs", status.get("NoNewPrivs") === "1");
  require("Seccomp", status.get("Seccomp") === String(seccompFilterMode));
  if (subject.uid === undefined) return;
  const uids = (status.get("Uid") ?? "").split(/\s+/);
  require("Uid", uids.length === 4 && uids.every((uid) => uid === String(subject.uid)));
}

function checkGroups(subject: IsolationSubject, status: ReadonlyMap<string, string>): void {
  const numbers = (name: string): number[] => (status.get(name) ?? "").split(/\s+/).filter(Boolean).map(Number);
  const gids = numbers("Gid");
  const allowed = subject.groups;
  const isOne = gids.length === 4 && gids.every((gid) => gid === gids[0]);
  if (!isOne || !(allowed?.primary.includes(gids[0] ?? -1) ?? true)) throw unlike(subject.pid, "Gid", status);
  if (allowed === undefined || numbers("Groups").every((gid) => allowed.supplementary.includes(gid))) return;
  throw unlike(subject.pid, "Groups", status);
}

function unlike(pid: number, name: string, status: ReadonlyMap<string, string>): IsolationError {
  return new IsolationError(`process ${pid} of the container has ${name} ${status.get(name) ?? "unknown"}`);
}

/** A process for which the container's limits do not hold. */
export function astray(pid: number): IsolationError {
  return new IsolationError(`process ${pid} of the container is not in the container's control group`);
}

/** Whether the process is on its way to its end, or past it. */
function isEnding(descriptor: number): boolean {
  const stat = readProcess(descriptor, "stat");
  if (stat === undefined) return true;
  // The name may hold anything, parentheses too; the flags are the seventh field after it.
  const flags = Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[6]);
  return (flags & exitingFlag) !== 0;
}

/** Whether the process has ended and was not fetched yet. */
function hasEnded(status: ReadonlyMap<string, string>): boolean {
  return /^[ZX]/.test(status.get("State") ?? "");
}

function checkNamespaces(descriptor: number, pid: number): void {
  for (const name of ownNamespaces) {
    const theirs = gone(() => readlinkSync(`/proc/self/fd/${descriptor}/ns/${name}`));
    const ours = readlinkSync(`/proc/self/ns/${name}`);
    if (theirs === ours) throw new IsolationError(`process ${pid} of the container is in the host's ${name} namespace`);
  }
}

/** A process's control groups: a path for each controller of version 1, and under "" that of version 2. */
function controlGroupsOf(descriptor: number): Map<string, string> | undefined {
  const text = readProcess(descriptor, "cgroup");
  if (text === undefined) return undefined;
  const groups = new Map<string, string>();
  for (const line of text.split("\n")) {
    const [, controllers = "", path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? [];
    if (path !== undefined) for (const controller of controllers.split(",")) groups.set(controller, path);
  }
  return groups;
}

/** Whether the groups that limit a process are the container's, whose id their paths hold. */
function isIn(groups: ReadonlyMap<string, string>, containerId: string): boolean {
  const limiting = groups.has("pids") ? limitingControllers.filter((name) => groups.has(name)) : [""];
  return limiting.every((name) => groups.get(name)?.includes(containerId) ?? false);
}

/** The folder in which a group's processes are listed: of the pids controller on version 1. */
function processGroupOf(groups: ReadonlyMap<string, string>): string {
  const pids = groups.get("pids");
  return pids === undefined ? join(hierarchyOf(undefined), groups.get("") ?? "") : join(hierarchyOf("pids"), pids);
}

/** Where the hierarchy of a controller is mounted; that of version 2 for no controller. */
function hierarchyOf(controller: string | undefined): string {
  for (const line of readFileSync("/proc/self/mountinfo", "utf8").split("\n")) {
    const [left = "", right = ""] = line.split(" - ");
    const [type, , options = ""] = right.split(" ");
    const matches =
      controller === undefined ? type === "cgroup2" : type === "cgroup" && options.split(",").includes(controller);
    if (matches) return left.split(" ")[4] ?? "";
  }
  throw new Error("the control groups are not mounted");
}

function processesOf(group: string): number[] {
  const text = gone(() => readFileSync(join(group, "cgroup.procs"), "latin1")) ?? "";
  const pids = text
    .split("\n")
    .filter((line) => line !== "")
    .map(Number);
  const below = gone(() => readdirSync(group, { withFileTypes: true })) ?? [];
  return [
    ...pids,
    ...below.filter((entry) => entry.isDirectory()).flatMap((entry) => processesOf(join(group, entry.name))),
  ];
}
