import assert from "node:assert/strict";
import { mkdir, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "node:test";
import { spawnSync } from "node:child_process";
import { claimDataFolder, emptyDataFolder, ForeignFolderError } from "./data-folder.ts";

let parent = "";
beforeEach(async () => {
  parent = await mkdtemp(join(tmpdir(), "clodei-data-folder-"));
});
afterEach(async () => {
  await rm(parent, { recursive: true, force: true });
});

test("a new and an empty folder are claimed, and found again", async () => {
  const folder = await claimDataFolder(join(parent, "deep", "new"));
  await writeFile(join(folder, "data"), "");
  assert.equal(await claimDataFolder(folder), folder);
  await mkdir(join(parent, "empty"));
  await claimDataFolder(join(parent, "empty"));
});

test("a folder that holds somebody's files is refused and keeps them", async () => {
  await writeFile(join(parent, "thesis.tex"), "years of work");
  await assert.rejects(claimDataFolder(parent), ForeignFolderError);
  assert.deepEqual(await readdir(parent), ["thesis.tex"]);
});

test("a path that cannot be a folder is refused by name", async () => {
  const file = join(parent, "file");
  await writeFile(file, "");
  await assert.rejects(claimDataFolder(join(file, "data")), (error) => {
    return error instanceof ForeignFolderError && error.message.includes(file);
  });
});

test("the start refuses to reset a folder that is not its own, whatever it is named", async () => {
  await mkdir(join(parent, "postgres"));
  await writeFile(join(parent, "postgres", "thesis.tex"), "years of work");
  const program = new URL("./main.ts", import.meta.url).pathname;
  const result = spawnSync(process.execPath, [program, "--reset", "--once", "--data", parent], { encoding: "utf8" });
  assert.equal(result.status, 1);
  assert.match(result.stderr, /holds files that Clodei did not make/);
  assert.deepEqual(await readdir(join(parent, "postgres")), ["thesis.tex"]);
});

test("a reset empties a claimed folder and keeps it claimed", async () => {
  const folder = await claimDataFolder(join(parent, "data"));
  await mkdir(join(folder, "postgres"));
  await emptyDataFolder(folder);
  assert.equal((await readdir(folder)).length, 1);
  assert.equal(await claimDataFolder(folder), folder);
});
