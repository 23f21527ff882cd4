// A whole system on a database that an operator gives: its roles made by `init-database`, its schema by the first start,
// and an instance's life on it from creation to deletion, watched and followed.
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { eventually } from "../harness/eventually.ts";
import { runProgram } from "../harness/process.ts";
import { controlPlaneProgram, testImage, TestSystem } from "../harness/system.ts";

const patienceMs = 60_000;

/** The variables that `init-database` prints. */
export type DatabaseUrls = {
  readonly DATABASE_URL: string;
  readonly DATABASE_SYSTEM_URL: string;
  readonly DATABASE_MIGRATION_URL: string;
};

/**
 * Runs a whole system on the database of an administrator's URL.
 * @param lead leads what a control plane is given elsewhere, such as through a pooler.
 * @returns what the control plane printed.
 */
export async function checkOwnDatabase(
  adminUrl: string,
  lead: (urls: DatabaseUrls) => Promise<DatabaseUrls>,
): Promise<string> {
  const urls = await lead(await initDatabase(adminUrl));
  await using system = await TestSystem.start({
    controlPlaneEnv: urls,
    agents: [{ name: "mad-1", simulateGpus: "2xH100-SXM" }],
  });
  const { client } = system;
  const watching = new AbortController();
  const states = new Set<string>();
  const watch = (async () => {
    for await (const event of client.instances.watch({ signal: watching.signal })) {
      if ("value" in event) states.add(event.value.state.toString());
    }
  })().catch((error: unknown) => {
    if (!watching.signal.aborted) throw error;
  });
  const instance = await client.instances.run({
    image: testImage,
    command: ["sh", "-c", "trap 'echo second; exit 0' TERM; echo first; while :; do sleep 0.1; done"],
    gpu: { model: "H100-SXM", count: 1 },
    cpuMillis: 100,
    memoryMib: 32,
  });
  const lines: string[] = [];
  for await (const line of instance.logs({ follow: true }).lines()) {
    lines.push(line.text);
    if (lines.length === 1) await instance.stop();
  }
  assert.deepEqual(lines, ["first", "second"]);
  await instance.delete();
  await instance.waitUntilDeleted({ timeoutMs: patienceMs });
  await eventually(patienceMs, () => assert.ok(states.size > 2, [...states].join(" ")));
  watching.abort();
  await watch;
  return system.controlPlane.program.output;
}

async function initDatabase(adminUrl: string): Promise<DatabaseUrls> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-init-"));
  try {
    const printed = await runProgram({
      name: "init-database",
      args: [controlPlaneProgram, "init-database", "--data", folder],
      env: { CLODEI_DATABASE_ADMIN_URL: adminUrl },
    });
    const urlOf = (name: keyof DatabaseUrls): string => {
      const url = printed.split("\n").find((line) => line.startsWith(`${name}=`));
      assert.ok(url !== undefined, `init-database printed no ${name}`);
      return url.slice(name.length + 1);
    };
    return {
      DATABASE_URL: urlOf("DATABASE_URL"),
      DATABASE_SYSTEM_URL: urlOf("DATABASE_SYSTEM_URL"),
      DATABASE_MIGRATION_URL: urlOf("DATABASE_MIGRATION_URL"),
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
