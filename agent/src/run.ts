// `clodei-agent run`: builds the agent's parts, starts them and ends them in order.

import { unlink } from "node:fs/promises";
import { getServers } from "node:dns";
import { isIPv4 } from "node:net";
import { join } from "node:path";
import type { GpuModel } from "@clodei/proto/gpu-models";
import { createValidator } from "@bufbuild/protovalidate";
import type { Logger } from "pino";
import type { InventoryConfig, RunConfig } from "./config.ts";
import { ContainerEngine } from "./containers/engine.ts";
import { RegistryAuth } from "./containers/registry-auth.ts";
import { messageOf } from "./error-reason.ts";
import { openJournal } from "./folder-owner.ts";
import { IdentityStore } from "./identity/identity-store.ts";
import type { Identity } from "./identity/identity-store.ts";
import { ignoreMissing, StateFolder, StateFolderError, writeFileAtomically } from "./identity/state-folder.ts";
import type { StatePaths } from "./identity/state-folder.ts";
import { readGpusByTool, simulateGpus } from "./inventory/gpu.ts";
import { readHost } from "./inventory/host.ts";
import { Inventory } from "./inventory/inventory.ts";
import type { GpuReadings } from "./inventory/readings.ts";
import { readSimulatedHealth } from "./inventory/simulated-health.ts";
import type { Standing } from "./journal/journal.ts";
import { Link } from "./link/link.ts";
import type { LinkEnd } from "./link/link.ts";
import { LogStore } from "./logs/log-store.ts";
import { sleep } from "./sleep.ts";
import { readBootClock } from "./worker/boot-clock.ts";
import { Judge } from "./worker/judge.ts";
import { Worker } from "./worker/worker.ts";

/** A revoked node waits so long for its containers to end: the longest stop grace and the engine's own time. */
const revokedStopMs = 180_000;

/** Reads the inventory once and makes it ready to be kept current. */
export async function openInventory(options: {
  readonly config: InventoryConfig & Partial<Pick<RunConfig, "simulatedGpuHealth" | "inventoryIntervalMs">>;
  readonly nodeName: string;
  readonly workspaceFolder: string;
  readonly dockerVersion: () => string;
}): Promise<Inventory> {
  const { simulatedGpus, nvidiaSmi, rocmSmi, searchPath, inventoryIntervalMs: intervalMs } = options.config;
  return await Inventory.open({
    host: await readHost(),
    readGpus: async (signal) =>
      simulatedGpus === undefined
        ? await readGpusByTool({ nvidiaSmi, rocmSmi, searchPath, ...(signal === undefined ? {} : { signal }) })
        : [await readSimulatedGpus(simulatedGpus, options.nodeName, options.config.simulatedGpuHealth)],
    workspaceFolder: options.workspaceFolder,
    dockerVersion: options.dockerVersion,
    ...(intervalMs === undefined ? {} : { intervalMs }),
  });
}

async function readSimulatedGpus(
  models: readonly GpuModel[],
  nodeName: string,
  healthFile: string | undefined,
): Promise<GpuReadings> {
  if (healthFile === undefined) return simulateGpus(models, nodeName);
  try {
    return simulateGpus(models, nodeName, await readSimulatedHealth(healthFile));
  } catch (error) {
    // As a tool that fails: the GPUs stay, and are not placed on.
    return { gpus: [], error: messageOf(error) };
  }
}

/** Runs until the signal, or until the control plane ends it for good. Containers that run go on. */
export async function runAgent(options: {
  readonly config: RunConfig;
  readonly agentVersion: string;
  readonly log: Logger;
  readonly signal: AbortSignal;
}): Promise<LinkEnd> {
  const { config, log, signal } = options;
  using state = await StateFolder.open(config.stateFolder);
  const readyPath = join(state.paths.run, "ready.json");
  await unlink(readyPath).catch(ignoreMissing);
  const store = new IdentityStore(state.paths.identity);
  const identity = await store.load();
  if (identity === undefined)
    throw new StateFolderError(`${config.stateFolder} holds no identity: run "clodei-agent enroll" first`);
  using journal = openJournal(state.paths, identity.nodeId);
  const clock = readBootClock();
  let engineVersion = (): string => "";
  const inventory = await openInventory({
    config,
    nodeName: identity.nodeId,
    workspaceFolder: state.paths.workspaces,
    dockerVersion: () => engineVersion(),
  });
  const engine = openEngine(config, identity, state.paths);
  const logs = new LogStore({ folder: state.paths.logs, engine });
  const validator = createValidator();
  const judge = new Judge({ validator, imageAllowlist: config.imageAllowlist, inventory: () => inventory.current() });
  const { minFreeMib, usageIntervalMs } = config;
  const parts = { engine, logs, journal, judge, clock, log, paths: state.paths };
  const worker = new Worker({ ...parts, minFreeMib, usageIntervalMs });
  engineVersion = () => worker.engineVersion;
  const onStanding = (standing: Standing): void => {
    worker.hold(standing);
    try {
      journal.saveStanding(identity.enrollmentId, standing);
    } catch (error) {
      log.warn({ error: messageOf(error) }, "the node's standing could not be journaled");
    }
  };
  // A node that was enrolled anew begins with a clean name; a restart alone does not clear it.
  const standing = journal.standing(identity.enrollmentId);
  worker.hold(standing);
  log.info(
    { nodeId: identity.nodeId, version: options.agentVersion, gpus: inventory.current().gpus.length },
    "agent starts",
  );

  const working = new AbortController();
  const tasks = [worker.run(working.signal), inventory.run(working.signal)];
  const link = new Link({
    store,
    identity,
    worker,
    journal,
    inventory,
    validator,
    logs,
    log,
    onStanding,
    agentVersion: options.agentVersion,
    bootId: clock.bootId,
    onWelcome: (sessionId) => {
      void writeReady(readyPath, { nodeId: identity.nodeId, sessionId }, log);
    },
  });
  let last = "agent ended; containers that run go on";
  try {
    const end = standing === "revoked" ? "revoked" : await link.run(signal);
    if (end === "revoked") {
      await untilEmpty(worker, signal);
      const left = worker.isEmpty ? "its containers are stopped" : "not all of its containers could be stopped";
      last = `agent ended: the node was revoked, and ${left}. Enroll the machine as a new node`;
    }
    return end;
  } finally {
    working.abort();
    await Promise.all(tasks);
    await unlink(readyPath).catch(ignoreMissing);
    log.info(last);
  }
}

/** Tells whoever started the agent that it is connected. */
async function writeReady(
  path: string,
  session: { readonly nodeId: string; readonly sessionId: string },
  log: Logger,
): Promise<void> {
  const ready = { ...session, pid: process.pid, welcomeTime: new Date().toISOString() };
  try {
    await writeFileAtomically(path, `${JSON.stringify(ready)}\n`);
  } catch (error) {
    log.warn({ error: messageOf(error) }, "ready.json could not be written");
  }
}

function openEngine(config: RunConfig, identity: Identity, paths: StatePaths): ContainerEngine {
  // Not from the inventory, which may not have them at first: no device is ever asked for one of these.
  const simulated = config.simulatedGpus === undefined ? [] : simulateGpus(config.simulatedGpus, identity.nodeId).gpus;
  return new ContainerEngine({
    socketPath: config.dockerSocket,
    nodeId: identity.nodeId,
    workspaceFolder: paths.workspaces,
    simulatedGpus: new Set(simulated.map(({ uuid }) => uuid)),
    registryAuth: config.registryAuthFile === undefined ? undefined : new RegistryAuth(config.registryAuthFile),
    pullSilenceMs: config.pullSilenceMs,
    dnsServers: config.dnsServers ?? nodeResolvers(),
    networkPool: config.networkPool,
  });
}

/** The node's own resolvers that a container can reach: not those on loopback. */
function nodeResolvers(): string[] {
  return getServers().filter((server) => isIPv4(server) && !server.startsWith("127."));
}

async function untilEmpty(worker: Worker, signal: AbortSignal): Promise<void> {
  const deadlineMs = performance.now() + revokedStopMs;
  while (!signal.aborted && performance.now() < deadlineMs && !worker.isEmpty) await sleep(200, signal);
}
