// Takes away everything outside of its folder that an engine made: processes, control groups, mounts, namespace,
// rules, sockets. For an ordered stop and after a crash alike, so there is one way that is always walked.
import { createHash } from "node:crypto";
import { readdir, readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { type EngineNote, noteFile } from "./layout.ts";
import { disconnectOutside } from "./outside.ts";
import { destroyControlGroup, killAll, pidsByArgument, programName } from "./processes.ts";
import { runTool, tryTool } from "./shell.ts";

/** What an engine consists of. */
const enginePrograms = /^(?:dockerd|containerd|containerd-shim.*|runc|docker-proxy)$/;

/** Removes what an engine left. Calling it again, or with nothing there, is fine. */
export async function removeLeftovers(note: EngineNote): Promise<void> {
  const { layout } = note;
  // Engine, containerd and shims carry the folder in their arguments; a second look finds what they started last.
  for (let round = 0; round < 2; round += 1) await killAll(await processesOf(note));
  await destroyControlGroup(layout.controlGroup);
  await unmountBelow([layout.dataRoot, layout.runFolder]);
  await removeShimSockets(note);
  if (note.outside !== undefined) await disconnectOutside(note.outside);
  const namespaces = await readdir("/run/netns").catch((): string[] => []);
  if (namespaces.includes(layout.namespace)) await runTool("ip", "netns", "delete", layout.namespace);
  await rm(layout.runFolder, { recursive: true, force: true });
  // Others that end with the engine's owner may still be writing into its folder.
  const retries = { maxRetries: 20, retryDelay: 100 };
  await rm(note.temporary ? layout.folder : noteFile(layout.folder), { recursive: true, force: true, ...retries });
}

/** Others name the folder, too: people are told where the socket is, and what they run with it is theirs. */
async function processesOf({ layout, temporary }: EngineNote): Promise<number[]> {
  const named = await pidsByArgument(`${layout.runFolder}/`);
  // Nobody is told of a test's engine: who names its folder is the test's as well, such as its registry.
  if (temporary) return named;
  const programs = await Promise.all(named.map(programName));
  return named.filter((_, index) => enginePrograms.test(programs[index] ?? ""));
}

async function unmountBelow(folders: readonly string[]): Promise<void> {
  const text = await readFile("/proc/self/mountinfo", "utf8");
  const points = text
    .split("\n")
    .map((line) => line.split(" ")[4] ?? "")
    // The kernel writes blanks and the like as octal numbers.
    .map((point) =>
      point.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8))),
    )
    .filter((point) => folders.some((folder) => point === folder || point.startsWith(`${folder}/`)));
  for (const point of points.toReversed()) {
    if (!(await tryTool("umount", point))) await tryTool("umount", "--lazy", point);
  }
}

/** containerd names the sockets of its shims by a hash, in a folder that all containerds of the machine share. */
async function removeShimSockets(note: EngineNote): Promise<void> {
  const address = join(note.layout.execRoot, "containerd", "containerd.sock");
  for (const container of await readdir(join(note.layout.dataRoot, "containers")).catch((): string[] => [])) {
    const name = createHash("sha256")
      .update(join(address, "moby", container))
      .digest("hex");
    await rm(`/run/containerd/s/${name}`, { force: true });
  }
}
