// Started by the shell that waits on a pipe to an engine's owner, once the owner is dead without having stopped its
// engine: removes the engine, so that a killed test or start leaves nothing running.
import { readNote } from "./layout.ts";
import { removeLeftovers } from "./leftovers.ts";
import { isAlive } from "./processes.ts";

const folder = process.argv[2];
if (folder === undefined) throw new Error("usage: watchdog.ts FOLDER");
const note = await readNote(folder);
// A new owner has stopped this process already; the look at it costs nothing.
if (note !== undefined && !(await isAlive(note.owner))) await removeLeftovers(note);
