// Where a private engine keeps what it makes, and the note by which a later start finds what a killed one left.
import { createHash } from "node:crypto";
import { readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { OutsideLink } from "./outside.ts";
import type { ProcessIdentity } from "./processes.ts";

/** Names and paths of one engine. All follow from its folder, so that a crash loses none of them. */
export interface EngineLayout {
  readonly folder: string;
  readonly dataRoot: string;
  /** Short, because a socket's path ends at 107 bytes. */
  readonly runFolder: string;
  readonly execRoot: string;
  readonly socketPath: string;
  readonly namespace: string;
  /** Every container's control group is under it. */
  readonly controlGroup: string;
  readonly logFile: string;
  readonly id: string;
}

/** What an engine's starter writes down before it makes anything. */
export interface EngineNote {
  readonly owner: ProcessIdentity;
  readonly layout: EngineLayout;
  readonly watchdog: ProcessIdentity | undefined;
  readonly outside: OutsideLink | undefined;
  /** Whether the folder goes with the engine. */
  readonly temporary: boolean;
}

/** @param folder An absolute path without symbolic links. */
export function layoutOf(folder: string, name: string): EngineLayout {
  const id = createHash("sha256").update(folder).digest("hex").slice(0, 12);
  const runFolder = `/run/clodei-${id}`;
  return {
    folder,
    dataRoot: join(folder, "data"),
    runFolder,
    execRoot: join(runFolder, "exec"),
    socketPath: join(runFolder, "docker.sock"),
    namespace: `${name}-${id}`,
    controlGroup: `clodei-engine-${id}`,
    logFile: join(folder, "engine.log"),
    id,
  };
}

/** Where an engine's starter writes its note. */
export function noteFile(folder: string): string {
  return join(folder, "engine.json");
}

export async function readNote(folder: string): Promise<EngineNote | undefined> {
  const text = await readFile(noteFile(folder), "utf8").catch(() => undefined);
  return text === undefined ? undefined : (JSON.parse(text) as EngineNote);
}

export async function writeNote(note: EngineNote): Promise<void> {
  const path = noteFile(note.layout.folder);
  await writeFile(`${path}.new`, JSON.stringify(note), { mode: 0o600 });
  await rename(`${path}.new`, path);
}
