// A data folder is one that Clodei made. `--reset` empties it, so a folder of anybody else's must never be taken for one.
import { mkdir, readdir, realpath, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";

/** Stands in every data folder, and nowhere else. */
const marker = "clodei-data-folder";
const markerText = "This folder belongs to `npm start` of Clodei. `npm start -- --reset` removes everything in it.\n";

/** The folder is somebody else's. */
export class ForeignFolderError extends Error {
  override readonly name = "ForeignFolderError";
}

/**
 * Makes the folder, or finds one that was made so before, and returns its real path.
 * Throws ForeignFolderError for a folder that holds anything and was not made by this.
 */
export async function claimDataFolder(path: string): Promise<string> {
  // The engine refuses some of its features below folders that others cannot enter; what is secret has its own.
  await mkdir(path, { recursive: true, mode: 0o755 }).catch((error: unknown) => {
    const why = error instanceof Error ? error.message : String(error);
    throw new ForeignFolderError(`--data: ${path} cannot be a folder of ours: ${why}`);
  });
  const folder = await realpath(path);
  const names = await readdir(folder);
  if (names.includes(marker)) return folder;
  if (names.length > 0) {
    throw new ForeignFolderError(
      `${folder} holds files that Clodei did not make; name a new or an empty folder: npm start -- --data DIR`,
    );
  }
  await writeFile(join(folder, marker), markerText);
  return folder;
}

/** Removes everything in a claimed folder but the mark. */
export async function emptyDataFolder(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    if (name !== marker) await rm(join(folder, name), { recursive: true, force: true });
  }
}
