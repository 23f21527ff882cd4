// A whole system on a database that an operator gives: its roles made by `init-database`, its schema by the first start,
// and an instance's life on it from creation to deletion, watched and followed.
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { runProgram } from "../harness/process.ts";
import { controlPlaneProgram, TestSystem } from "../harness/system.ts";
import { checkWatchedLife } from "../harness/watched-life.ts";

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
  await checkWatchedLife(system.client, { gpu: { model: "H100-SXM", count: 1 } });
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
