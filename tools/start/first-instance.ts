// The first instance: what a customer does first, done once, so that a start proves what it promises.
import { randomBytes } from "node:crypto";
import { createClient, type Instance, type InstanceHandle } from "@clodei/sdk";
import { demoImage } from "./engine.ts";

const runTimeoutMs = 120_000;
const logsTimeoutMs = 30_000;
const deleteTimeoutMs = 60_000;

/** What the first instance showed. */
export type FirstRun = { readonly instanceId: string; readonly output: string; readonly place: string };

/** How it is run. */
export type FirstRunOptions = {
  readonly endpoint: string;
  readonly ca: string;
  readonly apiKey: string;
  readonly simulatedGpus: string | undefined;
  readonly signal: AbortSignal;
};

/** Where an instance runs, from its state while it ran: it gives its GPUs back when it ends. */
function placeOf({ location, gpus }: Instance): string {
  const names = gpus.map(({ model, simulated }) => `${model}${simulated ? ", simulated" : ""}`);
  const place = location === undefined ? [] : [location.datacenter, location.region, location.country];
  return [...place, ...names].join(", ");
}

async function readOutput(instance: InstanceHandle, signal: AbortSignal): Promise<string> {
  const deadline = AbortSignal.timeout(logsTimeoutMs);
  try {
    return await instance.logs({ signal: AbortSignal.any([signal, deadline]) }).text();
  } catch (error) {
    if (!deadline.aborted) throw error;
    throw new Error(`the output of ${instance.id} did not end within ${logsTimeoutMs / 1000} s`, { cause: error });
  }
}

/** Runs an instance with one GPU that prints a nonce, and reads it back from its logs. Throws where it did not run. */
export async function runFirstInstance(options: FirstRunOptions): Promise<FirstRun> {
  const { endpoint, ca, apiKey, signal } = options;
  const nonce = randomBytes(8).toString("hex");
  using client = createClient({ endpoint, apiKey, ca });
  const instance = await client.instances.run(
    {
      image: demoImage,
      // It stays a moment, so that we see it run, with its GPU.
      command: ["sh", "-c", 'echo "hello from $(hostname): $NONCE"; sleep 1'],
      env: { NONCE: nonce },
      gpu: { count: 1 },
      memoryMib: 64,
      pullPolicy: "NEVER",
      labels: { demo: "first-instance" },
      placementTimeoutSeconds: 60,
    },
    { signal },
  );
  try {
    const running = await instance.waitUntilRunning({ timeoutMs: runTimeoutMs, signal });
    const ended = await instance.waitUntilStopped({ timeoutMs: runTimeoutMs, signal });
    if (instance.state !== "STOPPED" || instance.reason !== "COMPLETED") {
      throw new Error(`${instance.id} is ${instance.state}, ${instance.reason}: ${ended.message}`);
    }
    const output = await readOutput(instance, signal);
    if (!output.includes(nonce)) throw new Error(`the output of ${instance.id} lacks ${nonce}: ${output}`);
    return { instanceId: instance.id, output: output.trimEnd(), place: placeOf(running) };
  } finally {
    await instance.delete({ timeoutMs: deleteTimeoutMs });
    await instance.waitUntilDeleted({ timeoutMs: deleteTimeoutMs });
  }
}
