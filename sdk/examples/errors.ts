// What goes wrong, and how a program tells it apart: by `reason`, never by the text of a message.
// After `npm start`, in the checkout:
//
//   node_modules/.bin/node --env-file=.data/keys/sdk.env sdk/examples/errors.ts
import { readFileSync } from "node:fs";
import { ClodeiError, createClient, InstanceEndedError, type RunSpec } from "@clodei/sdk";

const {
  CLODEI_ENDPOINT: endpoint = "https://localhost:8443",
  CLODEI_API_KEY: apiKey,
  CLODEI_CA_FILE: caFile,
} = process.env;
const client = createClient({ endpoint, apiKey, ca: caFile && readFileSync(caFile, "utf8") });
const image = process.env["CLODEI_IMAGE"] ?? "busybox";

async function attempt(title: string, spec: RunSpec): Promise<void> {
  try {
    const instance = await client.instances.run(spec, { timeoutMs: 10_000 });
    try {
      await instance.waitUntilRunning({ timeoutMs: 60_000 });
      console.log(`${title}: runs`);
      const { exitCode } = await instance.waitUntilStopped({ timeoutMs: 60_000 });
      console.log(`${title}: ${instance.state}, ${instance.reason}, exit code ${exitCode ?? "none"}`);
    } finally {
      await instance.delete();
    }
  } catch (error) {
    if (error instanceof InstanceEndedError) {
      console.log(`${title}: ${error.state}, ${error.instanceReason}: ${error.message}`);
    } else if (error instanceof ClodeiError) {
      console.log(`${title}: ${error.reason} (${error.code}): ${error.message}`);
      for (const { field, message } of error.fieldViolations) console.log(`  ${field}: ${message}`);
    } else {
      throw error;
    }
  }
}

await attempt("an image outside the allowlist", { image: "evil.example/miner" });
await attempt("a wrong number", { image, memoryMib: 1 });
await attempt("a GPU that nobody has", {
  image,
  gpu: { model: "ZX-81", count: 1 },
  placementTimeoutSeconds: 1,
});
await attempt("a program that fails", { image, args: ["sh", "-c", "sleep 1; exit 3"] });
