// Paths of unix sockets end at 107 bytes, and a data folder can stand anywhere: sockets stand in a short folder
// that is named by a hash of the data folder's path.
import { createHash } from "node:crypto";
import { chmod, lstat, mkdir, readdir, readFile, realpath, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

/** The run folder of a data folder. Root's stands in /run, which is empty after a reboot. */
export async function runFolderOf(dataFolder: string): Promise<string> {
  const name = `clodei-${createHash("sha256")
    .update(await realpath(dataFolder))
    .digest("hex")
    .slice(0, 16)}`;
  if (process.getuid?.() === 0) return join("/run", name);
  return join(tmpdir(), name);
}

/** In a run folder: the data folder that it is for. */
const ownerFile = "data-folder";

/**
 * Makes the run folder of a data folder, or takes the one that stands, and removes those whose data folders are
 * gone: a process that was killed leaves its own behind, and nobody else ever comes for it.
 */
export async function openRunFolder(dataFolder: string): Promise<string> {
  const path = await runFolderOf(dataFolder);
  await removeAbandoned(dirname(path));
  await makeOwnFolder(path);
  await writeFile(join(path, ownerFile), await realpath(dataFolder));
  return path;
}

/** Removes a run folder, unless somebody else still has something in it. */
export async function closeRunFolder(path: string): Promise<void> {
  const left = await readdir(path).catch(() => []);
  if (left.every((name) => name === ownerFile)) await rm(path, { recursive: true, force: true });
}

async function removeAbandoned(parent: string): Promise<void> {
  const own = process.getuid?.();
  for (const name of await readdir(parent)) {
    const path = join(parent, name);
    if (!/^clodei-[0-9a-f]{16}$/.test(name) || (await lstat(path).catch(() => undefined))?.uid !== own) continue;
    const owner = await readFile(join(path, ownerFile), "utf8").catch(() => undefined);
    if (owner === undefined || owner === "") continue;
    const isGone = await lstat(owner).then(
      () => false,
      (error: unknown) => error instanceof Error && "code" in error && error.code === "ENOENT",
    );
    if (isGone) await rm(path, { recursive: true, force: true });
  }
}

/** One that another user made in our way is refused. Others may pass through: the server is another user. */
async function makeOwnFolder(path: string): Promise<void> {
  await mkdir(path, { recursive: true });
  const status = await lstat(path);
  const owner = process.getuid?.() ?? status.uid;
  if (!status.isDirectory() || status.uid !== owner) throw new Error(`${path} is not a folder of this user`);
  await chmod(path, 0o711);
}
