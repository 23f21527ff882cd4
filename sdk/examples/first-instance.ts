// Runs a container, waits for it, prints its output, and deletes it.
// After `npm start`, in the checkout:
//
//   node_modules/.bin/node --env-file=.data/keys/sdk.env sdk/examples/first-instance.ts
import { readFileSync } from "node:fs";
import { createClient } from "@clodei/sdk";

const {
  CLODEI_ENDPOINT: endpoint = "https://localhost:8443",
  CLODEI_API_KEY: apiKey,
  CLODEI_CA_FILE: caFile,
} = process.env;
const client = createClient({ endpoint, apiKey, ca: caFile && readFileSync(caFile, "utf8") });

const instance = await client.instances.run({
  image: process.env["CLODEI_IMAGE"] ?? "busybox",
  args: ["echo", process.argv[2] ?? "Hello from a container"],
});
await instance.waitUntilRunning();
for await (const chunk of instance.logs()) process.stdout.write(chunk.data);
await instance.delete();
