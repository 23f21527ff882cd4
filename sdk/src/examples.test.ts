import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";
import { create } from "@bufbuild/protobuf";
import { Code, type ServiceImpl } from "@connectrpc/connect";
import { CatalogService } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { InstanceReason, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import {
  InstanceService,
  LogStream,
  StreamLogsResponseSchema,
  WatchInstancesResponseSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { errorWith, startServerForClientTests } from "./server-for-client-tests.ts";

const examples = new URL("../examples/", import.meta.url);
const id = newId("ins");

/** Every instance runs at once, prints its last argument, and ends well. */
const instanceService: Partial<ServiceImpl<typeof InstanceService>> = {
  createInstance({ spec }) {
    if (spec?.image.startsWith("evil") === true) {
      throw errorWith(Code.InvalidArgument, "IMAGE_NOT_ALLOWED", { fields: { "spec.image": "outside the allowlist" } });
    }
    return { instance: { id, state: InstanceState.PENDING, version: 1n, spec } };
  },
  async *watchInstances() {
    const value = { id, state: InstanceState.STOPPED, reason: InstanceReason.COMPLETED, version: 2n, exitCode: 0 };
    yield create(WatchInstancesResponseSchema, { event: { case: "snapshot", value } });
    yield create(WatchInstancesResponseSchema, { event: { case: "bookmark", value: {} }, cursor: "c" });
    throw errorWith(Code.PermissionDenied, "PERMISSION_DENIED", { message: "enough" });
  },
  async *streamLogs() {
    const chunk = { attempt: 1, stream: LogStream.STDOUT, data: new TextEncoder().encode("it printed this\n") };
    yield create(StreamLogsResponseSchema, { event: { case: "chunk", value: chunk } });
    yield create(StreamLogsResponseSchema, { event: { case: "end", value: { attempt: 1 } } });
  },
  deleteInstance: () => ({ instance: { id, state: InstanceState.DELETED, version: 3n } }),
};

/** Runs a program against the server above: an example, or a text. */
async function run(
  program: string | { readonly text: string },
): Promise<{ stdout: string; methods: string[]; failed: boolean }> {
  await using server = await startServerForClientTests((router) => {
    router.service(InstanceService, instanceService);
    router.service(CatalogService, {
      listOffers: () => ({
        offers: [{ gpuModel: "L4", gpuMemoryMib: 23034, location: { datacenter: "kumo-1", tier: 4 } }],
      }),
    });
  });
  const folder = await mkdtemp(join(tmpdir(), "clodei-example-"));
  try {
    const caFile = join(folder, "ca.pem");
    await writeFile(caFile, server.ca);
    const env = {
      ...process.env,
      CLODEI_ENDPOINT: server.endpoint,
      CLODEI_API_KEY: server.apiKey,
      CLODEI_CA_FILE: caFile,
    };
    const file = typeof program === "string" ? new URL(program, examples).pathname : join(folder, "program.mts");
    if (typeof program !== "string") await writeFile(file, program.text);
    const outcome = await promisify(execFile)(process.execPath, [file], { env, timeout: 30_000 }).then(
      ({ stdout }) => ({ stdout, failed: false }),
      (error: unknown) => ({ stdout: String((error as { stdout?: string }).stdout), failed: true }),
    );
    return { ...outcome, methods: server.requests.map(({ method }) => method) };
  } finally {
    await rm(folder, { recursive: true });
  }
}

test("the first program runs a container, prints its output, deletes it, and ends by itself", async () => {
  const { stdout, methods, failed } = await run("first-instance.ts");
  assert.deepEqual([stdout, failed], ["it printed this\n", false]);
  assert.deepEqual(methods, ["CreateInstance", "WatchInstances", "StreamLogs", "DeleteInstance"]);
});

test("a program that leaves a stream whose end had arrived unread still ends by itself", async () => {
  const text = `
    import { readFileSync } from "node:fs";
    import { createClient } from ${JSON.stringify(new URL("./index.ts", import.meta.url).href)};
    const { CLODEI_ENDPOINT: endpoint, CLODEI_API_KEY: apiKey, CLODEI_CA_FILE: caFile } = process.env;
    const client = createClient({ endpoint, apiKey, ca: readFileSync(caFile, "utf8") });
    for await (const event of client.instances.watch()) {
      // Long enough for the rest of the stream and its end to arrive.
      await new Promise((resolve) => setTimeout(resolve, 300));
      console.log(event.type);
      break;
    }
  `;
  assert.deepEqual(await run({ text }), { stdout: "snapshot\n", failed: false, methods: ["WatchInstances"] });
});

test("the README shows the first program as it is", async () => {
  const program = await readFile(new URL("first-instance.ts", examples), "utf8");
  const readme = await readFile(new URL("../README.md", import.meta.url), "utf8");
  assert.ok(readme.includes(`\`\`\`ts\n${program.slice(program.indexOf("import"))}\`\`\`\n`));
});

test("the GPU example shows offers, output and exit code", async () => {
  const { stdout, failed } = await run("gpu.ts");
  assert.equal(failed, false);
  assert.match(stdout, /L4 23034 MiB at kumo-1, tier 4\n.*\nstdout: it printed this\nended with 0\n/);
});

test("the example of errors tells them apart", async () => {
  const { stdout, failed } = await run("errors.ts");
  assert.equal(failed, false);
  assert.match(stdout, /IMAGE_NOT_ALLOWED \(invalid_argument\)/);
  assert.match(stdout, /spec\.image: outside the allowlist/);
});

test("the example of a watch prints what it is told, and fails with what it cannot mend", async () => {
  const { stdout, failed } = await run("watch.ts");
  assert.equal(stdout.trim(), `${id} STOPPED`);
  assert.equal(failed, true);
});
