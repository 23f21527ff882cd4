// What a start made outside of its data folder, written down before it is made, so that the next start can take away
// what a killed one left.
import { mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { ProcessIdentity } from "../engine/processes.ts";

/** What there may be to take away. */
export type StartNote = {
  /** Control plane and agent. */
  readonly processes: readonly ProcessIdentity[];
  /** The Docker socket that the agent used, where the engine is not of our own. */
  readonly foreignSocket: string | undefined;
  /** The node whose containers and networks are ours in that engine. */
  readonly nodeId: string | undefined;
  /** The image that was made in that engine. */
  readonly image: string | undefined;
};

/** Nothing was made. */
export const emptyNote: StartNote = {
  processes: [],
  foreignSocket: undefined,
  nodeId: undefined,
  image: undefined,
};

const noteFile = (dataFolder: string): string => join(dataFolder, "run", "start.json");

/** The note of the start before, or an empty one. */
export async function readNote(dataFolder: string): Promise<StartNote> {
  try {
    return { ...emptyNote, ...(JSON.parse(await readFile(noteFile(dataFolder), "utf8")) as Partial<StartNote>) };
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === "ENOENT") return emptyNote;
    throw error;
  }
}

/** Writes the note at once as a whole. */
export async function writeNote(dataFolder: string, note: StartNote): Promise<void> {
  const file = noteFile(dataFolder);
  await mkdir(join(dataFolder, "run"), { recursive: true, mode: 0o700 });
  await writeFile(`${file}.new`, JSON.stringify(note), { mode: 0o600 });
  await rename(`${file}.new`, file);
}

/** Forgets what was taken away. */
export async function removeNote(dataFolder: string): Promise<void> {
  await rm(noteFile(dataFolder), { force: true });
}
