// The agent's state folder: everything that must outlive the process. It is 0700, because the key stands in it, and
// locked, because two agents with one identity would fight over the same containers. The lock is a transaction of
// SQLite: the kernel drops it with the process, however that ends, so a lock never has to be judged stale.

import { constants } from "node:fs";
import { chmod, lstat, mkdir, open, rename, unlink } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { DatabaseSync } from "node:sqlite";

/** Where things stand in a state folder. */
export interface StatePaths {
  readonly folder: string;
  readonly identity: string;
  readonly journal: string;
  readonly workspaces: string;
  readonly logs: string;
  readonly run: string;
}

/** The state folder cannot be used. The message says why and what to do. */
export class StateFolderError extends Error {
  override readonly name = "StateFolderError";
}

/** Where things stand in `folder`. */
export function statePaths(folder: string): StatePaths {
  return {
    folder,
    identity: join(folder, "identity"),
    journal: join(folder, "journal.db"),
    workspaces: join(folder, "workspaces"),
    logs: join(folder, "logs"),
    run: join(folder, "run"),
  };
}

/** A state folder that is this process's alone until it is disposed of. */
export class StateFolder implements Disposable {
  readonly paths: StatePaths;
  readonly #lock: DatabaseSync;

  private constructor(paths: StatePaths, lock: DatabaseSync) {
    this.paths = paths;
    this.#lock = lock;
  }

  /** Makes the folder if it is missing, checks it and locks it. Throws StateFolderError. */
  static async open(folder: string): Promise<StateFolder> {
    const paths = statePaths(folder);
    await mkdir(folder, { recursive: true, mode: 0o700 });
    await checkOwner(folder);
    // A folder that others may enter is closed rather than refused: mkdir with another umask made it so.
    await chmod(folder, 0o700);
    const lock = takeLock(join(folder, "lock"), folder);
    try {
      for (const path of [paths.identity, paths.logs, paths.run]) await mkdir(path, { recursive: true, mode: 0o700 });
      // Containers' users enter their own workspace by its mount, never through this folder.
      await mkdir(paths.workspaces, { recursive: true, mode: 0o711 });
    } catch (error) {
      lock.close();
      throw error;
    }
    return new StateFolder(paths, lock);
  }

  [Symbol.dispose](): void {
    this.#lock.close();
  }
}

async function checkOwner(folder: string): Promise<void> {
  const stat = await lstat(folder);
  if (!stat.isDirectory()) throw new StateFolderError(`${folder} is no folder (a link is not followed)`);
  const user = process.getuid?.();
  if (user !== undefined && stat.uid !== user) {
    throw new StateFolderError(`${folder} belongs to user ${stat.uid}, and the agent runs as ${user}`);
  }
}

function takeLock(path: string, folder: string): DatabaseSync {
  const database = new DatabaseSync(path, { timeout: 0 });
  try {
    // The transaction is never committed: it is the lock.
    database.exec("pragma journal_mode = memory; begin exclusive");
    return database;
  } catch (error) {
    database.close();
    if (error instanceof Error && "errcode" in error && error.errcode === sqliteBusy) {
      throw new StateFolderError(`another agent uses ${folder}: two agents on one state never run side by side`);
    }
    throw error;
  }
}

const sqliteBusy = 5;

/**
 * Writes a file so that a crash leaves the old content or the new, never a part: a new file is written, flushed and
 * renamed over the old one, and the folder is flushed, because the rename itself is in the folder.
 */
export async function writeFileAtomically(path: string, content: string | Uint8Array, mode = 0o600): Promise<void> {
  const temporary = `${path}.new`;
  await unlink(temporary).catch(ignoreMissing);
  const file = await open(
    temporary,
    constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW,
    mode,
  );
  try {
    await file.writeFile(content);
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(temporary, path);
  await syncFolder(dirname(path));
}

/** Renames within a folder, durably. */
export async function renameDurably(from: string, to: string): Promise<void> {
  await rename(from, to);
  await syncFolder(dirname(to));
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, constants.O_RDONLY);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Passes "no such file" and throws everything else. */
export function ignoreMissing(error: unknown): undefined {
  if (error instanceof Error && "code" in error && error.code === "ENOENT") return undefined;
  throw error;
}

/** The key file must be the agent's alone: one that others could read is a key that others may have. */
export async function assertPrivateFile(path: string): Promise<void> {
  const stat = await lstat(path);
  if (!stat.isFile() || (stat.mode & 0o077) !== 0) {
    throw new StateFolderError(`${basename(path)} must be a file that nobody else may read (0600): ${path}`);
  }
}
