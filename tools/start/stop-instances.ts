// The end of a start takes the containers away. The demo organization's instances are stopped before, so that they end
// by request, and not as failed: at the next start they can be started again, with their workspaces. Those of other
// organizations fail: a start has no key to stop them with.
import { setTimeout as wait } from "node:timers/promises";
import { durationMs } from "@bufbuild/protobuf/wkt";
import {
  type ClodeiClient,
  createClient,
  type Instance,
  type InstanceHandle,
  type InstanceStateName,
} from "@clodei/sdk";

/** Every state but those in which nothing more happens by itself. */
const activeStates: readonly InstanceStateName[] = [
  "PENDING",
  "SCHEDULED",
  "PULLING",
  "CREATING",
  "RUNNING",
  "STOPPING",
];
/** The schema's default. */
const usualGraceMs = 10_000;
/** What a stop takes besides the grace of its container. */
const marginMs = 20_000;
const pollMs = 200;
/** How many stops are asked for at once. */
const maxCalls = 8;

/** How to reach the organization. */
export type StopOptions = {
  readonly endpoint: string;
  readonly ca: string;
  readonly apiKey: string;
  /** Whether control plane and agent run: without one of them no stop comes to its end. */
  readonly isUp: () => boolean;
  readonly progress: (line: string) => void;
};

/**
 * Stops the instances of the organization and waits until they have stopped, at most 20 s longer than the longest
 * grace among them. Never throws: what did not stop is told.
 */
export async function stopInstances(options: StopOptions): Promise<void> {
  const { endpoint, ca, apiKey, progress } = options;
  using client = createClient({ endpoint, apiKey, ca });
  try {
    const left = await stopAll(client, options);
    if (left.length > 0) progress(`did not stop in time and will be FAILED: ${left.map(({ id }) => id).join(", ")}`);
  } catch (error) {
    progress(`instances could not be stopped: ${error instanceof Error ? error.message : String(error)}`);
  }
}

/** Returns what did not stop. */
async function stopAll(client: ClodeiClient, { isUp, progress }: StopOptions): Promise<readonly InstanceHandle[]> {
  const asked = new Set<string>();
  let deadlineMs: number | undefined;
  while (isUp()) {
    const active = await client.instances.list({ states: activeStates, pageSize: 500 }).toArray();
    if (active.length === 0) {
      if (asked.size > 0) progress(`stopped ${instances(asked.size)}: after the next start, start them again`);
      return [];
    }
    if (deadlineMs === undefined) {
      const graceMs = Math.max(...active.map(({ instance }) => graceMsOf(instance)));
      deadlineMs = performance.now() + graceMs + marginMs;
      const seconds = Math.ceil(graceMs / 1000);
      progress(`stopping ${instances(active.length)}, which may take ${seconds} s and keeps their workspaces`);
    }
    if (performance.now() > deadlineMs) return active;
    // Also what was created since the last look.
    await askAll(active.filter(({ id }) => !asked.has(id)));
    for (const { id } of active) asked.add(id);
    await wait(pollMs);
  }
  return [];
}

async function askAll(handles: readonly InstanceHandle[]): Promise<void> {
  for (let from = 0; from < handles.length; from += maxCalls) {
    await Promise.all(handles.slice(from, from + maxCalls).map((handle) => handle.stop()));
  }
}

function graceMsOf({ spec }: Instance): number {
  return spec?.stopGrace === undefined ? usualGraceMs : durationMs(spec.stopGrace);
}

function instances(number: number): string {
  return `${number} ${number === 1 ? "instance" : "instances"}`;
}
