// The machine itself: what its kernel grants, how much room there is.

import { readFile, statfs } from "node:fs/promises";
import { dirname } from "node:path";
import { freeMib } from "../inventory/host.ts";
import type { Finding } from "./finding.ts";
import { findingsOf } from "./finding.ts";

/** A session, its containers' logs and the engine's answers each take some. 1,024 are gone at some hundred containers. */
const fewOpenFiles = 4096;
/** With fewer free than that on a file system, a node of small files is full long before its bytes are. */
const leastFreeFiles = 10_000;

/** User namespaces, which isolation beyond Docker's own needs. */
export async function checkUserNamespaces(): Promise<Finding> {
  const { ok, warning } = findingsOf("user-namespaces");
  const text = await readFile("/proc/sys/user/max_user_namespaces", "latin1").catch(() => "");
  if (Number(text) > 0) return ok(`up to ${text.trim()}`);
  return warning(
    text === "" ? "the kernel has none" : "the kernel allows none",
    "set `user.max_user_namespaces` to 15000 by sysctl: stronger isolation will need them",
  );
}

/** Open files of this process, as the service manager gave them. */
export async function checkFileDescriptors(): Promise<Finding> {
  const { ok, warning, skipped } = findingsOf("file-descriptors");
  const limits = await readFile("/proc/self/limits", "latin1").catch(() => "");
  const hard = /^Max open files\s+\S+\s+(\S+)/m.exec(limits)?.[1];
  if (hard === undefined) return skipped("the limit cannot be read here");
  return hard === "unlimited" || Number(hard) >= fewOpenFiles
    ? ok(`up to ${hard}`)
    : warning(`no more than ${hard} files can be open`, `set LimitNOFILE=65536 in the agent's service`);
}

/** Room where workspaces, logs and the journal are. */
export async function checkDisk(stateFolder: string, minFreeMib: number): Promise<Finding> {
  const { ok, failed, skipped } = findingsOf("disk");
  // Before an enrollment the folder may not be there: its file system is its parent's.
  const folder = (await freeMib(stateFolder)) === undefined ? dirname(stateFolder) : stateFolder;
  const free = await freeMib(folder);
  if (free === undefined) return skipped(`${folder} cannot be looked at`);
  const remedy = `remove what is not needed on its file system, or move --state to a larger one`;
  if (free < minFreeMib)
    return failed(`${free} MiB are free below ${folder}, and ${minFreeMib} are needed: the node takes no work`, remedy);
  const { ffree, files } = await statfs(folder);
  // Some file systems count no files.
  if (files > 0 && ffree < leastFreeFiles) return failed(`only ${ffree} more files fit below ${folder}`, remedy);
  return ok(`${free} MiB are free below ${folder}`);
}
