import assert from "node:assert/strict";
import { test } from "node:test";
import pg from "pg";
import { createLog, logConsole } from "./log.ts";
import { startTestDatabase } from "./test-database.ts";

function record(): { lines: string[]; log: ReturnType<typeof createLog> } {
  const lines: string[] = [];
  return { lines, log: createLog("info", { write: (line) => lines.push(line) }) };
}

test("what a library writes to the console is a line of the log, without the data that it adds", () => {
  const { lines, log } = record();
  {
    using _console = logConsole(log);
    console.error("handler for rpc StreamLogs failed", new Error("the stream is closed"), { env: "SECRET=1" });
  }
  assert.equal(lines.length, 1);
  const line = JSON.parse(lines[0] ?? "") as { msg: string; level: string; err: { message: string } };
  assert.deepEqual(
    [line.level, line.msg, line.err.message],
    ["warn", "handler for rpc StreamLogs failed", "the stream is closed"],
  );
  assert.ok(!lines[0]?.includes("SECRET"));
});

test("a log line is JSON with a level, a time and what was bound, and nothing below its level", () => {
  const { lines, log } = record();
  log.child({ requestId: "r1" }).info({ n: 1 }, "hello");
  log.debug("quiet");
  assert.equal(lines.length, 1);
  const line = JSON.parse(lines[0] ?? "") as Record<string, unknown>;
  assert.deepEqual([line["level"], line["msg"], line["requestId"], line["n"]], ["info", "hello", "r1", 1]);
  assert.ok(!Number.isNaN(Date.parse(String(line["time"]))));
});

test("what is named like a secret is not written", () => {
  const { lines, log } = record();
  log.info({ token: "s3cret", headers: { authorization: "s3cret" }, a: { b: { apiKey: "s3cret" } } }, "x");
  assert.ok(!lines.join("").includes("s3cret"));
});

test("an error of the database is logged without the values that it is about", async () => {
  await using db = await startTestDatabase({ migrated: false });
  const client = new pg.Client(db.administrator);
  await client.connect();
  const { lines, log } = record();
  try {
    await client.query("create temp table t (name text primary key); insert into t values ('s3cret')");
    for (const statement of ["insert into t values ('s3cret')", "select 's3cret'::int", "select '{\"s3cret'::json"]) {
      await client
        .query(statement)
        .catch((error: unknown) => log.error({ err: new Error("outer", { cause: error }) }, "x"));
    }
  } finally {
    await client.end();
  }
  assert.equal(lines.length, 3);
  assert.match(lines[0] ?? "", /"code":"23505","constraint":"t_pkey"/);
  assert.match(lines[0] ?? "", /outer/);
  assert.ok(!lines.join("").includes("s3cret"), lines.join(""));
});
