// Shows what can be rented in Spain, runs a job on one GPU there, and tells how it ended.
// Takes the model that is named, or the first that is offered. After `npm start`, in the checkout:
//
//   node_modules/.bin/node --env-file=.data/keys/sdk.env sdk/examples/gpu.ts [MODEL]
import { readFileSync } from "node:fs";
import { createClient, InstanceEndedError } from "@clodei/sdk";

const {
  CLODEI_ENDPOINT: endpoint = "https://localhost:8443",
  CLODEI_API_KEY: apiKey,
  CLODEI_CA_FILE: caFile,
} = process.env;
const client = createClient({ endpoint, apiKey, ca: caFile && readFileSync(caFile, "utf8") });
const location = { country: "ES" };

let model = process.argv[2];
for await (const offer of client.catalog.offers({ location })) {
  const where = `${offer.location?.datacenter}, tier ${offer.location?.tier}`;
  console.log(`${offer.gpuModel} ${offer.gpuMemoryMib} MiB at ${where}${offer.simulated ? " (simulated)" : ""}`);
  model ??= offer.gpuModel;
}
if (model === undefined) throw new Error("no GPU is offered there: name a model to wait for one");

const instance = await client.instances.run({
  image: process.env["CLODEI_IMAGE"] ?? "busybox",
  args: ["sh", "-c", "echo working; sleep 1; echo done"],
  gpu: { model, count: 1 },
  cpuMillis: 500,
  memoryMib: 256,
  location,
  maxRunTimeSeconds: 600,
  labels: { purpose: "example" },
});
try {
  const running = await instance.waitUntilRunning({ timeoutMs: 120_000 });
  const gpus = running.gpus.map((gpu) => `${gpu.model} ${gpu.uuid}`).join(", ");
  console.log(`runs in ${running.location?.datacenter} on ${gpus}`);
  for await (const line of instance.logs().lines()) console.log(`${line.stream}: ${line.text}`);
  const ended = await instance.waitUntilStopped();
  console.log(`ended with ${ended.exitCode}`);
} catch (error) {
  if (!(error instanceof InstanceEndedError)) throw error;
  console.error(`did not run: ${error.instanceReason}: ${error.message}`);
} finally {
  await instance.delete();
}
