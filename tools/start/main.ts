// `npm start`: a control plane, this machine as a node, and a first instance, from nothing; and away again.
import { spawnSync } from "node:child_process";
import { dirname, join } from "node:path";
import { identify, type ProcessIdentity } from "../engine/processes.ts";
import { watchParent } from "../setup/child.mjs";
import { lockDataFolder } from "../setup/lock.mjs";
import { findProgram } from "../setup/system.mjs";
import type { Child } from "./child.ts";
import { startControlPlane } from "./control-plane.ts";
import { claimDataFolder, emptyDataFolder, ForeignFolderError } from "./data-folder.ts";
import { demoImage, type Engine, provideDemoImage, provideEngine } from "./engine.ts";
import { runFirstInstance } from "./first-instance.ts";
import { provideKeys } from "./keys.ts";
import { clearForeignEngine, clearPredecessor } from "./leftovers.ts";
import { enrollNode, startAgent } from "./node.ts";
import { emptyNote, readNote, removeNote, type StartNote, writeNote } from "./note.ts";
import { OptionError, readOptions, startHelp, type StartOptions } from "./options.ts";
import { screenOf } from "./screen.ts";
import { writeSdkSettings } from "./sdk-settings.ts";
import { stopInstances } from "./stop-instances.ts";

const root = dirname(dirname(import.meta.dirname));
const gpuListTimeoutMs = 15_000;

/** Prints a step and how long it took. */
async function step<T>(what: string, work: () => Promise<T>): Promise<T> {
  const startMs = performance.now();
  console.log(`· ${what}`);
  const value = await work();
  console.log(`  done in ${((performance.now() - startMs) / 1000).toFixed(1)} s`);
  return value;
}

/** Keeps the note of what this start made. */
class Notebook {
  readonly #dataFolder: string;
  #note: StartNote = emptyNote;

  constructor(dataFolder: string) {
    this.#dataFolder = dataFolder;
  }

  get note(): StartNote {
    return this.#note;
  }

  async add(change: Partial<StartNote>): Promise<void> {
    this.#note = { ...this.#note, ...change };
    await writeNote(this.#dataFolder, this.#note);
  }

  async addChild(child: Child): Promise<void> {
    const identity: ProcessIdentity | undefined = await identify(child.pid);
    if (identity !== undefined) await this.add({ processes: [...this.#note.processes, identity] });
  }
}

async function openDataFolder({ dataFolder, reset }: StartOptions): Promise<void> {
  const note = await readNote(dataFolder);
  if (note !== emptyNote) {
    await step("clearing what a killed start left", () => clearPredecessor(note));
    await removeNote(dataFolder);
  }
  if (reset) {
    await step(`emptying ${dataFolder}`, async () => {
      await removeOldEngine(dataFolder);
      await emptyDataFolder(dataFolder);
    });
  }
}

/** A killed start's engine may still have things mounted in the data folder. */
async function removeOldEngine(dataFolder: string): Promise<void> {
  const { readNote: readEngineNote } = await import("../engine/layout.ts");
  const { removeLeftovers } = await import("../engine/leftovers.ts");
  const note = await readEngineNote(join(dataFolder, "engine"));
  if (note !== undefined) await removeLeftovers(note);
}

/** Brings everything up; whatever was brought up is on `stack`. Returns the children, whose end is a failure. */
async function bringUp(
  options: StartOptions,
  stack: AsyncDisposableStack,
  signal: AbortSignal,
): Promise<readonly Child[]> {
  const { dataFolder, simulatedGpus } = options;
  const places = { root, dataFolder };
  const notebook = new Notebook(dataFolder);
  const engine: Engine = await step("Docker engine", () => provideEngine(dataFolder, (line) => console.log(line)));
  stack.defer(() => engine.close());
  if (!engine.isPrivate) {
    await notebook.add({ foreignSocket: engine.socketPath });
    stack.defer(() => clearForeignEngine(notebook.note));
  }
  await step(`image ${demoImage}`, async () => {
    const isMade = await provideDemoImage(engine.socketPath);
    if (isMade && !engine.isPrivate) await notebook.add({ image: demoImage });
  });
  const onChild = async (child: Child): Promise<void> => {
    stack.defer(() => child.stop());
    await notebook.addChild(child);
  };
  const plane = await step("control plane", () => startControlPlane(places, onChild, signal));
  const keys = await step("demo organization and operator", () => provideKeys(places, plane));
  const settingsFile = await writeSdkSettings(places, plane, keys);
  const { operatorKey } = keys;
  const { publicUrl: endpoint, ca } = plane;
  const nodeId = await step("enrolling this machine as a node", () => enrollNode(places, plane, operatorKey));
  if (!engine.isPrivate) await notebook.add({ nodeId });
  const onAgent = async (child: Child): Promise<void> => {
    await onChild(child);
    // Before the agent ends: without it no container stops in order.
    const isUp = (): boolean => plane.child.isRunning && child.isRunning;
    const progress = (line: string): void => console.log(`  ${line}`);
    stack.defer(() => stopInstances({ endpoint, ca, apiKey: keys.apiKey, isUp, progress }));
  };
  const agent = await step(`agent${simulatedGpus === undefined ? "" : ` with ${simulatedGpus} simulated`}`, () =>
    startAgent({ places, plane, operatorKey, nodeId, dockerSocket: engine.socketPath, simulatedGpus }, onAgent, signal),
  );
  const first = await step("first instance", () =>
    runFirstInstance({ endpoint, ca, apiKey: keys.apiKey, simulatedGpus, signal }),
  );
  console.log(screenOf({ plane, keys, engine, first, dataFolder, settingsFile }));
  return [plane.child, agent];
}

/** Runs a start to its end, and returns the exit status. */
async function run(options: StartOptions, stop: AbortSignal): Promise<number> {
  const dataFolder = await claimDataFolder(options.dataFolder);
  using lock = await lockDataFolder(dataFolder);
  if (lock === undefined) {
    console.error(`another start runs in ${dataFolder}; give this one a folder of its own: npm start -- --data DIR`);
    return 1;
  }
  await openDataFolder({ ...options, dataFolder });
  const stack = new AsyncDisposableStack();
  try {
    const children = await bringUp({ ...options, dataFolder }, stack, stop);
    if (options.once) return 0;
    console.log(
      "Ctrl-C stops it. The demo organization's instances stop with it and keep their workspaces; those of others fail.",
    );
    const stopped = new Promise<undefined>((resolve) => {
      stop.addEventListener("abort", () => resolve(undefined), { once: true });
    });
    const ended = await Promise.race([stopped, ...children.map((child) => child.ended())]);
    if (ended === undefined) return 0;
    console.error(`${ended}: see ${dataFolder}/logs`);
    return 1;
  } catch (error) {
    if (stop.aborted) return 130;
    console.error(error instanceof Error ? error.message : error);
    return 1;
  } finally {
    console.log("· stopping");
    await stack.disposeAsync();
    // Only now: what could not be taken away stays noted for the next start.
    await removeNote(dataFolder);
    console.log(`stopped; what was stored is in ${dataFolder}`);
  }
}

/** nvidia-smi can be installed on a machine without a GPU. */
function hasRealGpus(): boolean {
  const program = findProgram("nvidia-smi");
  if (program === undefined) return false;
  const { status, stdout } = spawnSync(program, ["--list-gpus"], { encoding: "utf8", timeout: gpuListTimeoutMs });
  return status === 0 && stdout.startsWith("GPU ");
}

/** What is wrong with the command line, for a person; undefined for a fault of ours. */
function usageError(error: unknown): string | undefined {
  if (error instanceof ForeignFolderError || error instanceof OptionError) return error.message;
  if (!(error instanceof TypeError) || !("code" in error) || !String(error.code).startsWith("ERR_PARSE_ARGS")) return;
  return `${error.message}\n\n${startHelp}`;
}

async function main(): Promise<number> {
  const options = readOptions(process.argv.slice(2), process.env, hasRealGpus);
  if (options === undefined) {
    console.log(startHelp);
    return 0;
  }
  const stopping = new AbortController();
  // A terminal that is gone must not end us before we have taken away what we made.
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});
  // A second signal is the same wish: on Ctrl-C one comes from the terminal and one from npm.
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => stopping.abort());
  watchParent(() => stopping.abort());
  return run(options, stopping.signal);
}

try {
  process.exitCode = await main();
} catch (error) {
  const usage = usageError(error);
  if (usage === undefined) throw error;
  console.error(usage);
  process.exitCode = 1;
}
