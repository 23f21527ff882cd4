// Takes away what a start made outside of its data folder: processes, and what stands in an engine that is not ours.
// A private engine is taken away by tools/engine.
import { setTimeout as wait } from "node:timers/promises";
import { callEngine, callEngineJson, EngineCallError } from "../engine/api.ts";
import { isAlive, killAll, type ProcessIdentity } from "../engine/processes.ts";
import { dockerAnswers } from "../setup/docker-socket.mjs";
import type { StartNote } from "./note.ts";

/** A control plane drains, and an agent flushes its journal, before they end. */
const endTimeoutMs = 30_000;
const alreadyToldMs = 10_000;
const pollMs = 50;
const nodeLabel = "clodei.node_id";

async function endsWithin(identity: ProcessIdentity, timeoutMs: number): Promise<boolean> {
  const deadlineMs = performance.now() + timeoutMs;
  while (await isAlive(identity)) {
    if (performance.now() > deadlineMs) return false;
    await wait(pollMs);
  }
  return true;
}

async function endProcess(identity: ProcessIdentity): Promise<void> {
  // It was told to end when its parent died; a second word would make it skip what it still has to do.
  if (await endsWithin(identity, alreadyToldMs)) return;
  process.kill(identity.pid, "SIGTERM");
  if (!(await endsWithin(identity, endTimeoutMs))) await killAll([identity.pid]);
}

function stringsOf(answer: unknown, field: string): string[] {
  if (!Array.isArray(answer)) return [];
  return answer.flatMap((entry: unknown) => {
    const value = typeof entry === "object" && entry !== null ? (entry as Record<string, unknown>)[field] : undefined;
    return typeof value === "string" ? [value] : [];
  });
}

async function ignoreNotFound(work: Promise<unknown>): Promise<void> {
  try {
    await work;
  } catch (error) {
    if (!(error instanceof EngineCallError && error.status === 404)) throw error;
  }
}

/** Removes a node's containers, their networks and volumes, and an image, from an engine that is not ours. */
export async function clearForeignEngine(note: StartNote): Promise<void> {
  const { foreignSocket: socket, nodeId, image } = note;
  if (socket === undefined || !(await dockerAnswers(socket))) return;
  if (nodeId !== undefined) {
    const filters = JSON.stringify({ label: [`${nodeLabel}=${nodeId}`] });
    const containers = await callEngineJson(socket, { path: "/containers/json", query: { all: "true", filters } });
    for (const id of stringsOf(containers, "Id")) {
      const query = { force: "true", v: "true" };
      await ignoreNotFound(callEngine(socket, { method: "DELETE", path: `/containers/${id}`, query }));
    }
    const networks = await callEngineJson(socket, { path: "/networks", query: { filters } });
    for (const id of stringsOf(networks, "Id")) {
      await ignoreNotFound(callEngine(socket, { method: "DELETE", path: `/networks/${id}` }));
    }
  }
  if (image !== undefined) {
    await ignoreNotFound(callEngine(socket, { method: "DELETE", path: `/images/${image}` }));
  }
}

/** Takes away all that a note tells of. */
export async function clearPredecessor(note: StartNote): Promise<void> {
  await Promise.all(note.processes.map(endProcess));
  await clearForeignEngine(note);
}
