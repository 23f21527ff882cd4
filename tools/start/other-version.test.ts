import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { startEmbeddedPostgres } from "../../control-plane/src/platform/embedded-postgres.ts";
import { createLog } from "../../control-plane/src/platform/log.ts";
import { migrate } from "../../control-plane/src/platform/migrations.ts";
import { startControlPlane } from "./control-plane.ts";

const root = dirname(dirname(import.meta.dirname));

test("a start on the data folder of another version says how to go on without it", async () => {
  const dataFolder = await mkdtemp(join(tmpdir(), "clodei-other-version-"));
  await using stack = new AsyncDisposableStack();
  stack.defer(() => rm(dataFolder, { recursive: true, force: true }));
  {
    await using postgres = await startEmbeddedPostgres({ dataFolder, log: createLog("error") });
    await migrate(postgres.migrator, [{ version: 9000, name: "9000_later.sql", sha256: "", sql: "select 1" }]);
  }
  const start = startControlPlane(
    { root, dataFolder },
    (child) => Promise.resolve(stack.defer(() => child.stop())),
    new AbortController().signal,
  );
  await assert.rejects(start, (error: Error) => {
    assert.match(error.message, /the database's schema is newer than this program: it has 9000_later\.sql/u);
    assert.ok(error.message.endsWith(`npm start -- --data ${dataFolder} --reset`), error.message);
    return true;
  });
});
