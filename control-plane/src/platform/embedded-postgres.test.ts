import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmod, lstat, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import pg from "pg";
import { attachEmbeddedPostgres, type EmbeddedPostgres, startEmbeddedPostgres } from "./embedded-postgres.ts";
import { createLog } from "./log.ts";
import { closeRunFolder, openRunFolder, runFolderOf } from "./run-folder.ts";

const log = createLog("silent");
const isRoot = process.getuid?.() === 0;

async function withFolder(mode: number, work: (folder: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-pg-"));
  try {
    await chmod(folder, mode);
    await work(folder);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function query(connection: pg.ClientConfig, text: string): Promise<unknown[]> {
  const client = new pg.Client(connection);
  await client.connect();
  try {
    const { rows } = await client.query<Record<string, unknown>>(text);
    return rows;
  } finally {
    await client.end();
  }
}

const start = (dataFolder: string): Promise<EmbeddedPostgres> =>
  startEmbeddedPostgres({ dataFolder, durable: false, log });

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

async function waitUntilGone(pid: number): Promise<void> {
  for (let n = 0; n < 500 && isAlive(pid); n += 1) await sleep(20);
  assert.ok(!isAlive(pid), `process ${pid} must be gone`);
}

describe("the embedded database", () => {
  for (const [name, mode] of [
    ["in a folder that everybody may enter", 0o755],
    ["in a folder that only its owner may enter", 0o700],
  ] as const) {
    test(`${name}, it keeps its data over a restart and leaves nothing in the run folder`, async () => {
      await withFolder(mode, async (folder) => {
        const runFolder = await runFolderOf(folder);
        {
          await using server = await start(folder);
          await query(server.administrator, "create table kept (n int); insert into kept values (1)");
          assert.deepEqual(await query(server.administrator, "show listen_addresses"), [{ listen_addresses: "" }]);
          const [socket] = (await readdir(join(runFolder, "postgres"))).toSorted();
          assert.ok(socket !== undefined && join(runFolder, "postgres", socket).length < 107);
          assert.equal((await lstat(join(runFolder, "postgres"))).mode & 0o077, 0);
          // PostgreSQL refuses root itself; what runs must not have root's rights either.
          const status = await readFile(`/proc/${server.processId}/status`, "utf8");
          assert.match(status, /^CapEff:\t0+$/m);
        }
        await assert.rejects(lstat(runFolder), { code: "ENOENT" });
        await using again = await start(folder);
        assert.deepEqual(await query(again.administrator, "select n from kept"), [{ n: 1 }]);
        const keys = await lstat(join(folder, "keys", "database.json"));
        assert.equal(keys.mode & 0o777, 0o600);
      });
    });
  }

  test("a folder can change from one kind to the other", { skip: !isRoot }, async () => {
    await withFolder(0o755, async (folder) => {
      for (const mode of [0o755, 0o700, 0o755]) {
        await chmod(folder, mode);
        await using server = await start(folder);
        assert.deepEqual(await query(server.app, "select 1 as n"), [{ n: 1 }]);
      }
    });
  });

  test("a second starter is refused while the first runs, and a command can attach", async () => {
    await withFolder(0o755, async (folder) => {
      assert.equal(await attachEmbeddedPostgres(folder), undefined);
      await using server = await start(folder);
      await assert.rejects(start(folder), /another process uses the database/);
      const attached = await attachEmbeddedPostgres(folder);
      assert.ok(attached !== undefined);
      assert.deepEqual(await query(attached.system, "select current_user::text as who"), [{ who: "clodei_system" }]);
      assert.equal(isAlive(server.processId), true);
    });
  });

  test("it ends with its parent, also on SIGKILL, and the next start finds everything committed", async () => {
    await withFolder(0o755, async (folder) => {
      const script = `
        import { startEmbeddedPostgres } from ${JSON.stringify(join(import.meta.dirname, "embedded-postgres.ts"))};
        import { createLog } from ${JSON.stringify(join(import.meta.dirname, "log.ts"))};
        const server = await startEmbeddedPostgres({ dataFolder: process.argv[1], log: createLog("silent") });
        console.log(server.processId);
        setInterval(() => {}, 1000);`;
      const child = spawn(process.execPath, ["--input-type=module-typescript", "-e", script, folder], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      const [line] = (await once(child.stdout, "data")) as [Buffer];
      const processId = Number(line.toString());
      const attached = await attachEmbeddedPostgres(folder);
      assert.ok(attached !== undefined);
      await query(attached.administrator, "create table kept (n int); insert into kept values (2)");
      const exited = once(child, "exit");
      child.kill("SIGKILL");
      await exited;
      await waitUntilGone(processId);
      await using again = await start(folder);
      assert.deepEqual(await query(again.administrator, "select n from kept"), [{ n: 2 }]);
    });
  });

  test("a server that was left behind is ended, and a process id that was reused is no obstacle", async () => {
    await withFolder(0o755, async (folder) => {
      await (await start(folder))[Symbol.asyncDispose]();
      const runFolder = await runFolderOf(folder);
      const data = join(folder, "postgres");
      const owner = (await lstat(data)).uid;
      await mkdir(join(runFolder, "postgres"), { recursive: true });
      await chmod(runFolder, 0o711);
      const chown = spawn("chown", [String(owner), join(runFolder, "postgres")]);
      await once(chown, "exit");
      const native = new URL(
        "../native/bin/postgres",
        import.meta.resolve(`@embedded-postgres/${process.platform}-${process.arch}`),
      );
      const drop =
        isRoot && owner !== 0 ? ["setpriv", `--reuid=${owner}`, `--regid=${owner}`, "--clear-groups"] : ["env"];
      const [command, ...args] = [
        ...drop,
        native.pathname,
        "-D",
        data,
        "-k",
        join(runFolder, "postgres"),
        "-c",
        "listen_addresses=",
      ];
      const orphan = spawn(command, args, { stdio: "ignore", cwd: "/" });
      for (
        let n = 0;
        n < 500 && !(await readFile(join(data, "postmaster.pid"), "utf8").catch(() => "")).includes("ready");
        n += 1
      ) {
        await sleep(20);
      }
      assert.equal(orphan.exitCode, null);
      {
        await using server = await start(folder);
        assert.notEqual(server.processId, orphan.pid);
        assert.ok(orphan.exitCode !== null || orphan.signalCode !== null || !isAlive(orphan.pid ?? 0));
        assert.deepEqual(await query(server.app, "select 1 as n"), [{ n: 1 }]);
      }
      // Our own process lives and is no PostgreSQL: without care the server refuses to start beside it.
      await writeFile(join(data, "postmaster.pid"), `${process.pid}\n${data}\n`);
      await using server = await start(folder);
      assert.deepEqual(await query(server.app, "select 1 as n"), [{ n: 1 }]);
    });
  });

  test("a run folder whose data folder is gone is removed by whoever starts next, and others stay", async () => {
    await withFolder(0o755, async (folder) => {
      const [gone, kept] = [join(folder, "gone"), join(folder, "kept")];
      const left: string[] = [];
      for (const path of [gone, kept]) {
        await mkdir(path);
        left.push(await openRunFolder(path));
      }
      await rm(gone, { recursive: true });
      await using _server = await start(join(folder, "other"));
      assert.deepEqual(
        await Promise.all(
          left.map((path) =>
            lstat(path).then(
              () => "there",
              () => "gone",
            ),
          ),
        ),
        ["gone", "there"],
      );
      await closeRunFolder(left[1] ?? "");
    });
  });

  test("an initdb that was interrupted is done again", async () => {
    await withFolder(0o755, async (folder) => {
      await mkdir(join(folder, "postgres.new"), { recursive: true });
      await writeFile(join(folder, "postgres.new", "PG_VERSION"), "18\n");
      await using server = await start(folder);
      assert.deepEqual(await query(server.app, "select 1 as n"), [{ n: 1 }]);
    });
  });

  test("an unexpected end is told", async () => {
    await withFolder(0o755, async (folder) => {
      await using server = await start(folder);
      const ended = once(server.ended, "abort");
      process.kill(server.processId, "SIGKILL");
      await ended;
    });
  });
});
