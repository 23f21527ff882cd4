import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmod, mkdir, mkdtemp, readFile, rm, stat, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { StateFolder, StateFolderError, writeFileAtomically } from "./state-folder.ts";

async function withFolder(work: (folder: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-state-"));
  try {
    await work(folder);
  } finally {
    await rm(folder, { recursive: true });
  }
}

const holder = `
import { StateFolder } from ${JSON.stringify(import.meta.resolve("./state-folder.ts"))};
const state = await StateFolder.open(process.argv[1]);
console.log("locked " + state.paths.folder);
setInterval(() => undefined, 1000);
`;

describe("the state folder", () => {
  it("is closed to others, also when it was open before", async () => {
    await withFolder(async (folder) => {
      const path = join(folder, "state");
      await mkdir(path, { mode: 0o755 });
      await chmod(path, 0o755);
      using _state = await StateFolder.open(path);
      assert.equal((await stat(path)).mode & 0o777, 0o700);
    });
  });

  it("is refused to a second agent in this process", async () => {
    await withFolder(async (folder) => {
      {
        using _first = await StateFolder.open(folder);
        await assert.rejects(
          StateFolder.open(folder),
          (error: unknown) => error instanceof StateFolderError && /another agent/.test(error.message),
        );
      }
      using _again = await StateFolder.open(folder);
    });
  });

  it("is refused while another process holds it, and free at once when that is killed", async () => {
    await withFolder(async (folder) => {
      const other = spawn(process.execPath, ["--input-type=module", "-e", holder, folder], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      await once(other.stdout, "data");
      await assert.rejects(StateFolder.open(folder), StateFolderError);
      other.kill("SIGKILL");
      await once(other, "exit");
      using _mine = await StateFolder.open(folder);
    });
  });

  it("is no link to elsewhere", async () => {
    await withFolder(async (folder) => {
      await mkdir(join(folder, "real"));
      await symlink(join(folder, "real"), join(folder, "link"));
      await assert.rejects(StateFolder.open(join(folder, "link")), StateFolderError);
    });
  });

  it("gets files as a whole, for nobody else to read", async () => {
    await withFolder(async (folder) => {
      const path = join(folder, "file");
      await writeFileAtomically(path, "one");
      await writeFileAtomically(path, "two");
      assert.equal(await readFile(path, "utf8"), "two");
      assert.equal((await stat(path)).mode & 0o777, 0o600);
    });
  });
});
