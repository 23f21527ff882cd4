// Agents of a machine that is not there: the real agent's identity, link and journal, and in place of its worker one
// that takes every desired set and runs nothing. Many in one process, which its parent tells what to do.
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { createValidator } from "@bufbuild/protovalidate";
import { parseSimulatedGpus } from "@clodei/proto/gpu-models";
import { enroll } from "../../agent/src/identity/enroll.ts";
import { IdentityStore } from "../../agent/src/identity/identity-store.ts";
import { simulateGpus } from "../../agent/src/inventory/gpu.ts";
import { readHost } from "../../agent/src/inventory/host.ts";
import { Inventory } from "../../agent/src/inventory/inventory.ts";
import { Journal } from "../../agent/src/journal/journal.ts";
import { Link, type LinkOptions } from "../../agent/src/link/link.ts";
import { LogStore } from "../../agent/src/logs/log-store.ts";
import { createLog } from "../../agent/src/log.ts";
import { readBootClock } from "../../agent/src/worker/boot-clock.ts";
import type { AgentRange, SimulatorCommand, SimulatorState } from "./simulator.ts";

/** Of one process at once. A machine that has the fleet and the control plane on two cores takes no more. */
const enrollmentsAtOnce = 8;
const connectsAtOnce = 10;
/** A machine that is so busy that this passes cannot be measured on. */
const welcomeTimeoutMs = 60_000;
const gpus = parseSimulatedGpus("8xH100-SXM");

const host = await readHost();
const clock = readBootClock();
const validator = createValidator();
const log = createLog("warn");
const stop = new AbortController();
const counts = { connected: 0, welcomes: 0 };

/** Runs the work for each agent of the range, some at once. */
async function forEach(range: AgentRange, atOnce: number, work: (index: number) => Promise<void>): Promise<void> {
  const waiting = Array.from({ length: range.count }, (_, index) => range.first + index).values();
  const worker = async (): Promise<void> => {
    for (const index of waiting) await work(index);
  };
  await Promise.all(Array.from({ length: atOnce }, worker));
}

async function storeOf(range: AgentRange, index: number): Promise<{ store: IdentityStore; folder: string }> {
  const folder = join(range.folder, String(index));
  await mkdir(join(folder, "identity"), { recursive: true, mode: 0o700 });
  return { store: new IdentityStore(join(folder, "identity")), folder };
}

async function enrollOne(range: AgentRange, index: number, controlPlaneUrl: string, token: string): Promise<void> {
  const { store } = await storeOf(range, index);
  await enroll({ store, controlPlaneUrl, token, agentVersion: "bench", signal: stop.signal });
}

/** Starts an agent's link, and resolves at its first Welcome. */
async function connectOne(range: AgentRange, index: number, nodeEndpoint: string | undefined): Promise<void> {
  const { store, folder } = await storeOf(range, index);
  const identity = await store.load();
  if (identity === undefined) throw new Error(`agent ${index} is not enrolled`);
  // A journal is of one control plane, and in use by one link.
  const journal = Journal.open(join(folder, nodeEndpoint === undefined ? "journal.db" : "echo-journal.db"));
  const inventory = await Inventory.open({
    host,
    readGpus: () => Promise.resolve([simulateGpus(gpus, identity.nodeId)]),
    workspaceFolder: folder,
    dockerVersion: () => "",
  });
  const welcomed = Promise.withResolvers<void>();
  const link = new Link({
    store,
    identity: nodeEndpoint === undefined ? identity : { ...identity, nodeEndpoint },
    worker: simulatedWorker(journal),
    journal,
    inventory,
    validator,
    logs: new LogStore({ folder: join(folder, "logs"), engine: noEngine }),
    log,
    agentVersion: "bench",
    bootId: clock.bootId,
    onStanding: () => undefined,
    onWelcome: () => {
      counts.welcomes += 1;
      welcomed.resolve();
    },
  });
  const run = async (): Promise<void> => {
    counts.connected += 1;
    const end = await link.run(stop.signal);
    counts.connected -= 1;
    throw new Error(`the link of agent ${index} ended: ${end}`);
  };
  run().catch((error: unknown) => welcomed.reject(error));
  const late = setTimeout(() => welcomed.reject(new Error(`agent ${index} was not welcomed`)), welcomeTimeoutMs);
  await welcomed.promise.finally(() => clearTimeout(late));
}

const noEngine = {
  logSource: () => Promise.resolve(undefined),
  waitEnd: () => Promise.reject(new Error("nothing runs here")),
};

function simulatedWorker(journal: Journal): LinkOptions["worker"] {
  let observedGeneration = 0n;
  return {
    get observedGeneration() {
      return observedGeneration;
    },
    acceptance: () => ({ accepting: true, message: "" }),
    applyDesiredSet: (set) => {
      journal.saveDesiredSet(set);
      observedGeneration = set.generation;
      return true;
    },
    beginSession: () => undefined,
    containers: () => [],
    onAcceptance: () => ({ [Symbol.dispose]: () => undefined }),
    setServerTime: () => undefined,
  };
}

async function obey(command: SimulatorCommand): Promise<SimulatorState> {
  if (command.do === "enroll") {
    await forEach(command, enrollmentsAtOnce, (index) => enrollOne(command, index, command.url, command.token));
  } else if (command.do === "connect") {
    await forEach(command, connectsAtOnce, (index) => connectOne(command, index, command.endpoint));
  }
  return counts;
}

process.on("message", (command: SimulatorCommand) => {
  obey(command).then(
    (state) => process.send?.(state),
    (error: unknown) => process.send?.({ error: error instanceof Error ? error.stack : String(error) }),
  );
});
process.once("disconnect", () => process.exit());
