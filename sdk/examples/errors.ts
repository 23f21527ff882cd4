// What goes wrong, and how a program tells it apart: by `reason`, never by the text of a message.
//
//   CLODEI_ENDPOINT=… CLODEI_API_KEY=… CLODEI_CA_FILE=… node sdk/examples/errors.ts
import { readFileSync } from "node:fs";
import { ClodeiError, createClient, InstanceEndedError, type RunSpec } from "@clodei/sdk";

const {
  CLODEI_ENDPOINT: endpoint = "https://localhost:8443",
  CLODEI_API_KEY: apiKey,
  CLODEI_CA_FILE: caFile,
} = process.env;
const client = createClient({ endpoint, apiKey, ca: caFile && readFileSync(caFile, "utf8") });

async function attempt(title: string, spec: RunSpec): Promise<void> {
  try {
    const instance = await client.instances.run(spec, { timeoutMs: 10_000 });
    try {
      await instance.waitUntilRunning({ timeoutMs: 60_000 });
      console.log(`${title}: runs`);
    } finally {
      await instance.delete();
    }
  } catch (error) {
    if (error instanceof InstanceEndedError) {
      console.log(`${title}: ${error.state}, ${error.instanceReason}, exit code ${error.exitCode ?? "none"}`);
    } else if (error instanceof ClodeiError) {
      console.log(`${title}: ${error.reason} (${error.code}): ${error.message}`);
      for (const { field, message } of error.fieldViolations) console.log(`  ${field}: ${message}`);
    } else {
      throw error;
    }
  }
}

await attempt("an image outside the allowlist", { image: "evil.example/miner" });
await attempt("a wrong number", { image: "busybox", memoryMib: 1 });
await attempt("a GPU that nobody has", {
  image: "busybox",
  gpu: { model: "ZX-81", count: 1 },
  placementTimeoutSeconds: 1,
});
await attempt("a program that fails", { image: "busybox", args: ["sh", "-c", "exit 3"] });
