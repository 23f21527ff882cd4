// The test runner runs test files of ours that fail in each way that it must tell.
import assert from "node:assert/strict";
import { mkdtempSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { identify } from "../engine/processes.ts";
import type { FileResult } from "./result.ts";
import { runFile } from "./run-file.ts";

const folder = realpathSync(mkdtempSync(join(tmpdir(), "clodei-runner-")));
const header = `import { describe, it, test } from "node:test";\n`;

after(() => rmSync(folder, { recursive: true, force: true }));

async function run(name: string, text: string, timeoutMs = 30_000): Promise<FileResult> {
  writeFileSync(join(folder, name), header + text);
  return await runFile(name, { root: folder, timeoutMs, namePattern: undefined }, () => {});
}

test("tests are counted and suites are not; what is skipped keeps its reason", async () => {
  const result = await run(
    "counts.test.ts",
    `describe("a suite", () => { it("one", () => {}); it("two", () => {}); });
     test("parent", async (t) => { await t.test("child", () => {}); });
     test("left out", { skip: "needs root" }, () => {});
     test("unfinished", { todo: "later" }, () => { throw new Error("todo"); });`,
  );
  assert.deepEqual(result.failures, []);
  assert.equal(result.passed, 4);
  assert.deepEqual(result.skipped, [
    { name: "left out", reason: "needs root" },
    { name: "unfinished", reason: "later" },
  ]);
});

test("a failure names its suites, its place and its error, and what the file printed is kept", async () => {
  const result = await run(
    "fails.test.ts",
    `describe("a suite", () => { it("is wrong", () => { console.log("printed"); throw new Error("the error"); }); });
     test("parent", async (t) => { await t.test("child", () => { throw new Error("the child's"); }); });`,
  );
  const [first, second, ...others] = result.failures;
  assert.deepEqual(others, []);
  assert.equal(first?.name, "a suite › is wrong");
  assert.equal(first?.place, "fails.test.ts:2:29");
  assert.match(first?.text ?? "", /the error/u);
  assert.equal(second?.name, "parent › child");
  assert.match(result.printed, /printed/u);
});

test("a file that cannot be loaded fails", async () => {
  const result = await run("broken.test.ts", `import "./nowhere.ts";`);
  assert.equal(result.failures[0]?.name, "the file can be run");
  assert.match(result.printed, /nowhere\.ts/u);
});

test("a file that hangs fails by the names of the tests that run", async () => {
  const result = await run(
    "hangs.test.ts",
    `test("quick", () => {}); test("endless", () => new Promise((resolve) => setTimeout(resolve, 60_000)));`,
    1500,
  );
  assert.equal(result.passed, 1);
  assert.equal(result.failures[0]?.name, "the file ends in time");
  assert.match(result.failures[0]?.text ?? "", /running: "endless"/u);
});

test("a file that ends in the middle of a test, or holds none, fails", async () => {
  const result = await run("exits.test.ts", `test("ok", () => {}); test("cut", async () => { process.exit(0); });`);
  assert.equal(result.failures[0]?.name, "the file runs its tests to the end");
  assert.equal((await run("empty.test.ts", "")).failures[0]?.name, "the file runs its tests to the end");
});

test("a process that stays behind fails the file, and is ended", { skip: process.platform !== "linux" }, async () => {
  const result = await run(
    "leaves.test.ts",
    `import { spawn } from "node:child_process";
     test("leaves", () => { const child = spawn("sleep", ["300"], { stdio: "ignore" }); child.unref(); console.log(child.pid); });`,
  );
  assert.equal(result.failures[0]?.name, "the file leaves no process behind");
  const pid = Number(/\d+/u.exec(result.printed)?.[0]);
  assert.equal(await identify(pid), undefined);
});
