// The oldest PostgreSQL that we promise to run on, which is Debian's: what stands on SQL is tested on it again, and a
// whole system. Everything else runs on the embedded one, which is the newest.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { dirname, join } from "node:path";
import { describe, test } from "node:test";
import { findUnpacked } from "../../tools/setup/unpacked.mjs";
import {
  startTestDatabase,
  testPostgresLibrariesVariable,
  testPostgresVariable,
} from "../../control-plane/src/platform/test-database.ts";
import { serverUnavailable } from "../harness/debian-server.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { checkOwnDatabase } from "./own-database.ts";

const root = join(import.meta.dirname, "..", "..");
const fileTimeoutMs = 10 * 60_000;

/** The tests of each store, and of what stands right on PostgreSQL. */
const storeTests = [
  "platform/migrations",
  "platform/database",
  "platform/changes",
  "platform/idempotency",
  "platform/wakeups",
  "organizations/service",
  "nodes/service",
  "placement/store",
  "instances/scheduler",
  "dispatch/reports",
].map((name) => `control-plane/src/${name}.test.ts`);

const unavailable = serverUnavailable("postgresql-15");

function postgres15(): Readonly<Record<string, string>> {
  const found = findUnpacked("postgresql-15");
  if (found === undefined) throw new Error("postgresql-15 is missing");
  return {
    [testPostgresVariable]: dirname(dirname(found.path)),
    [testPostgresLibrariesVariable]: found.libraries ?? "",
  };
}

/** Runs a test file on PostgreSQL 15. @returns what it printed. */
function runOn15(file: string): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const { NODE_TEST_CONTEXT: _ofThisProcess, ...environment } = process.env;
  const options = { cwd: root, env: { ...environment, ...postgres15() }, timeout: fileTimeoutMs };
  execFile(process.execPath, ["--test-reporter=tap", file], options, (error, stdout, stderr) => {
    if (error === null) resolve(stdout);
    else reject(new Error(`${file} fails on PostgreSQL 15:\n${stdout}${stderr}`, { cause: error }));
  });
  return promise;
}

describe("on PostgreSQL 15", { skip: unavailable, concurrency: 2 }, () => {
  for (const file of storeTests) {
    test(`${file} passes`, async () => {
      assert.match(await runOn15(file), /^# pass [1-9]/m);
    });
  }
});

describe("a control plane with a database of its operator's", { skip: unavailable, timeout: 900_000 }, () => {
  test("runs a whole system on PostgreSQL 15", { skip: engineUnavailable }, async () => {
    Object.assign(process.env, postgres15());
    await using db = await startTestDatabase({ migrated: false });
    const [server] = await db.database.system((tx) => tx.query<{ server_version: string }>("show server_version"));
    assert.match(server?.server_version ?? "", /^15\./);
    await checkOwnDatabase(db.adminUrl, (urls) => Promise.resolve(urls));
  });
});
