// Prints every change of the organization's instances until Ctrl-C. Goes on by itself after breaks.
// After `npm start`, in the checkout:
//
//   node_modules/.bin/node --env-file=.data/keys/sdk.env sdk/examples/watch.ts
import { readFileSync } from "node:fs";
import { ClodeiError, createClient, InstanceState } from "@clodei/sdk";

const {
  CLODEI_ENDPOINT: endpoint = "https://localhost:8443",
  CLODEI_API_KEY: apiKey,
  CLODEI_CA_FILE: caFile,
} = process.env;
const client = createClient({ endpoint, apiKey, ca: caFile && readFileSync(caFile, "utf8") });

const stateNames = new Map<number, string>(Object.entries(InstanceState).map(([name, value]) => [value, name]));
const controller = new AbortController();
process.once("SIGINT", () => controller.abort());

try {
  for await (const event of client.instances.watch({ signal: controller.signal })) {
    switch (event.type) {
      case "reset":
        console.log("from the beginning:");
        break;
      case "snapshot":
      case "change":
        console.log(event.value.id, stateNames.get(event.value.state), event.value.message);
        break;
      case "bookmark":
        // Keep event.cursor to go on from here in another process.
        break;
    }
  }
} catch (error) {
  if (!(error instanceof ClodeiError && error.reason === "CANCELED")) throw error;
}
