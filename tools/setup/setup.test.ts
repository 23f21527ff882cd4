import assert from "node:assert/strict";
import { execFile, spawn, spawnSync } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { after, test } from "node:test";
import { setTimeout as wait } from "node:timers/promises";
import { completeLock } from "./complete-lock.mjs";
import { dockerSocketOf } from "./docker-socket.mjs";
import { lockDataFolder, withSetupLock } from "./lock.mjs";
import { packagesMismatch } from "./packages.mjs";
import { findProgram, isStatic } from "./system.mjs";

const root = dirname(dirname(import.meta.dirname));
const temporary = realpathSync(mkdtempSync(join(tmpdir(), "clodei-setup-")));

after(() => rmSync(temporary, { recursive: true, force: true }));

test("two set-ups of one checkout run one after the other", async () => {
  const order: string[] = [];
  let waits = 0;
  const setUp = (name: string): Promise<void> =>
    withSetupLock(
      temporary,
      () => (waits += 1),
      async () => {
        order.push(`${name} begins`);
        await wait(100);
        order.push(`${name} ends`);
      },
    );
  await Promise.all([setUp("a"), setUp("b"), setUp("c")]);
  assert.equal(order.length, 6);
  for (let index = 0; index < order.length; index += 2) {
    assert.equal(order[index]?.replace("begins", "ends"), order[index + 1]);
  }
  assert.equal(waits, 2);
});

test("a set-up that was killed does not block the next one", async () => {
  const program = `import { withSetupLock } from ${JSON.stringify(join(import.meta.dirname, "lock.mjs"))};
    await withSetupLock(${JSON.stringify(temporary)}, () => {}, () => {
      console.log("held");
      return new Promise((resolve) => setTimeout(resolve, 60_000));
    });`;
  const holder = spawn(process.execPath, ["--input-type=module", "--eval", program], { stdio: ["ignore", "pipe", 2] });
  await new Promise((resolve) => holder.stdout?.once("data", resolve));
  const next = withSetupLock(
    temporary,
    () => holder.kill("SIGKILL"),
    () => Promise.resolve("done"),
  );
  assert.equal(await next, "done");
});

test("one start at a time holds a data folder", async () => {
  using first = await lockDataFolder(temporary);
  assert.notEqual(first, undefined);
  assert.equal(await lockDataFolder(temporary), undefined);
  first?.[Symbol.dispose]();
  using second = await lockDataFolder(temporary);
  assert.notEqual(second, undefined);
});

test("node_modules are installed anew where they are not what the lock says, and only there", () => {
  assert.equal(packagesMismatch(root), undefined);
  const copy = join(temporary, "packages");
  mkdirSync(join(copy, "node_modules"), { recursive: true });
  cpSync(join(root, "package-lock.json"), join(copy, "package-lock.json"));
  assert.match(packagesMismatch(copy) ?? "", /no npm packages are installed/u);
  const installed = readFileSync(join(root, "node_modules/.package-lock.json"), "utf8");
  const other = join(copy, "node_modules/.package-lock.json");
  writeFileSync(other, installed);
  assert.equal(packagesMismatch(copy), undefined);
  writeFileSync(other, installed.replace(/(node_modules\/pino": \{\s+"version": )"[^"]+"/u, '$1"0.0.1"'));
  assert.match(packagesMismatch(copy) ?? "", /node_modules\/pino is 0\.0\.1, the lock says [1-9]/u);
  const cut = JSON.parse(installed) as { packages: Record<string, unknown> };
  const { "node_modules/pg": _dropped, ...packages } = cut.packages;
  writeFileSync(other, JSON.stringify({ ...cut, packages }));
  assert.match(packagesMismatch(copy) ?? "", /node_modules\/pg is not installed/u);
});

test("git has the mode of each program that npm makes executable, or every installation would change the checkout", (t) => {
  const workspaces = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as { workspaces: string[] };
  const programs = workspaces.workspaces.flatMap((workspace) => {
    const { bin = {} } = JSON.parse(readFileSync(join(root, workspace, "package.json"), "utf8")) as {
      bin?: Record<string, string>;
    };
    return Object.values(bin).map((path) => join(workspace, path));
  });
  assert.ok(programs.length > 0);
  const listed = spawnSync("git", ["ls-files", "--stage", "--", ...programs], { cwd: root, encoding: "utf8" });
  if (listed.status !== 0) return t.skip("no checkout of git");
  const entries = listed.stdout.trimEnd().split("\n");
  assert.equal(entries.length, programs.length);
  for (const entry of entries) assert.match(entry, /^100755 /);
});

test("a lock that npm left incomplete is completed for every platform, and then stays as it is", () => {
  const lock = {
    packages: {
      "": { optionalDependencies: { "tool-linux-x64": "1.2.3" } },
      "node_modules/tool": {
        dev: true,
        optionalDependencies: {
          "@tool/binding-linux-arm64-musl": "2.0.0",
          "@tool/wasm32-wasi": "2.0.0",
          odd: "^1.0.0",
        },
      },
    } as Record<string, unknown>,
  };
  const { added, unknown } = completeLock(lock);
  assert.deepEqual(added, ["tool-linux-x64@1.2.3", "@tool/binding-linux-arm64-musl@2.0.0", "@tool/wasm32-wasi@2.0.0"]);
  assert.deepEqual(unknown, ["odd@^1.0.0 (of node_modules/tool)"]);
  assert.deepEqual(lock.packages["node_modules/@tool/binding-linux-arm64-musl"], {
    version: "2.0.0",
    cpu: ["arm64"],
    dev: true,
    libc: ["musl"],
    optional: true,
    os: ["linux"],
  });
  assert.deepEqual(completeLock(lock).added, []);
});

test("only Docker sockets of this machine are used", () => {
  assert.deepEqual(dockerSocketOf(undefined), { path: "/var/run/docker.sock", named: false });
  assert.deepEqual(dockerSocketOf("unix:///run/other.sock"), { path: "/run/other.sock", named: true });
  assert.match(JSON.stringify(dockerSocketOf("tcp://10.0.0.1:2375")), /refused.*only unix/u);
});

test(
  "a statically linked program is told from one that needs libraries",
  { skip: process.platform !== "linux" },
  () => {
    const busybox = findProgram("busybox");
    if (busybox !== undefined) assert.equal(isStatic(realpathSync(busybox)), true);
    assert.equal(isStatic(process.execPath), false);
    assert.equal(isStatic(join(root, "package.json")), false);
  },
);

/** Packages that this machine has not installed: those would be used. */
const [known = "", unknown = ""] = ["haproxy", "pgbouncer"].filter((name) => !existsSync(join("/usr/sbin", name)));

test(
  "a package that cannot be had keeps none of the others away, and is asked for once a day where no list has it",
  {
    skip:
      process.getuid?.() === 0 && findProgram("dpkg-deb") !== undefined && unknown !== ""
        ? false
        : "needs root on Debian, without HAProxy and PgBouncer",
  },
  () => {
    // Another checkout, whose apt-get has one package, knows another, and cannot download it.
    const copy = join(temporary, "unpacked");
    const bin = join(copy, "bin");
    mkdirSync(bin, { recursive: true });
    cpSync(import.meta.dirname, join(copy, "tools/setup"), { recursive: true });
    const asked = join(copy, "asked");
    writeFileSync(
      join(bin, "apt-get"),
      `#!/bin/sh
       echo "$@" >> ${asked}
       case "$*" in
         *update*) ;;
         *download*${known})
           mkdir -p tree/DEBIAN tree/usr/sbin && touch tree/usr/sbin/${known}
           printf 'Package: ${known}\\nVersion: 1\\nArchitecture: all\\nMaintainer: test\\nDescription: test\\n' > tree/DEBIAN/control
           dpkg-deb --build tree known.deb && rm -r tree ;;
         *simulate*${known}) ;;
         *simulate*libnginx-mod-stream) ;;
         *download*) echo "E: Failed to fetch" >&2; exit 100 ;;
         *) echo "E: Unable to locate package" >&2; exit 100 ;;
       esac`,
      { mode: 0o755 },
    );
    const program = `import { findUnpacked, provideUnpacked, unpackedNames } from ${JSON.stringify(join(copy, "tools/setup/unpacked.mjs"))};
      const message = await provideUnpacked(() => {});
      console.log(JSON.stringify({ message, missing: unpackedNames.filter((name) => findUnpacked(name) === undefined) }));`;
    const provide = (): { message: string; missing: string[] } => {
      const env = { ...process.env, PATH: `${bin}:${process.env["PATH"]}` };
      const result = spawnSync(process.execPath, ["--input-type=module", "--eval", program], { env, encoding: "utf8" });
      assert.equal(result.status, 0, result.stderr);
      return JSON.parse(result.stdout) as { message: string; missing: string[] };
    };
    const first = provide();
    assert.ok(!first.missing.includes(known));
    assert.ok(first.missing.includes(unknown));
    assert.ok(first.message.includes(`${unknown} (E: Unable to locate package)`), first.message);
    const updates = (): number => readFileSync(asked, "utf8").match(/^-qq update --error-on=any$/gmu)?.length ?? 0;
    const wasAsked = (name: string): boolean => readFileSync(asked, "utf8").includes(` ${name}\n`);
    assert.equal(updates(), 1);
    rmSync(asked);
    const second = provide();
    assert.deepEqual(second.missing, first.missing);
    assert.match(
      second.message,
      new RegExp(`${unknown} \\(no list has it; asked for again after a day, or without \\S+\\)`, "u"),
    );
    if (first.missing.includes("nginx")) {
      assert.match(second.message, /nginx \(E: Failed to fetch\)/u);
      assert.ok(wasAsked("libnginx-mod-stream"));
      assert.ok(!wasAsked(unknown));
      rmSync(asked);
    }
    const twoDaysAgo = new Date(Date.now() - 2 * 24 * 3_600_000);
    utimesSync(join(copy, `.cache/debian/${unknown}.refused`), twoDaysAgo, twoDaysAgo);
    assert.deepEqual(provide().missing, first.missing);
    assert.ok(wasAsked(unknown));
  },
);

test("the launcher names its commands, refuses others, and each command has help", async () => {
  const launch = (...parameters: string[]): Promise<{ code: number | null; output: string }> =>
    new Promise((resolve) => {
      const child = execFile(
        process.execPath,
        [join(root, "tools/run.mjs"), ...parameters],
        (_error, stdout, stderr) => {
          resolve({ code: child.exitCode, output: stdout + stderr });
        },
      );
    });
  assert.match(
    (await launch("--help")).output,
    /start .*\n.*test .*\n.*check .*\n.*bench .*\n.*build .*\n.*generate /u,
  );
  assert.equal((await launch("strat")).code, 2);
  for (const command of ["start", "test", "check", "generate"]) {
    const { code, output } = await launch(command, "--help");
    assert.equal(code, 0, output);
    assert.match(output, /^usage: npm/mu);
  }
});
