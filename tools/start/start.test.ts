// Real starts in data folders of their own: with a private engine and with a foreign one, stopped and killed.
import assert from "node:assert/strict";
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, realpath, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as wait } from "node:timers/promises";
import { createClient } from "@clodei/sdk";
import { engineUnavailable, startTestEngine } from "../../test/harness/engine.ts";
import { grpcurlByBuf } from "../../test/harness/grpcurl.ts";
import { callEngineJson } from "../engine/api.ts";
import { layoutOf } from "../engine/layout.ts";
import { pidsByArgument } from "../engine/processes.ts";
import { demoImage } from "./engine.ts";

const root = dirname(dirname(import.meta.dirname));
const startTimeoutMs = 180_000;
const goneTimeoutMs = 60_000;
const firstOutput = /its output {2}hello from \S+: [0-9a-f]{16}/u;
const lastLine = "Ctrl-C stops it.";

/** A start as a person runs it, by its launcher. */
class Start {
  readonly launcher: ChildProcess;
  output = "";

  constructor(dataFolder: string, parameters: readonly string[], environment: NodeJS.ProcessEnv = {}) {
    const command = [join(root, "tools/run.mjs"), "start", "--data", dataFolder, ...parameters];
    const { DOCKER_HOST: _ownEngine, ...inherited } = process.env;
    this.launcher = spawn(process.execPath, command, {
      cwd: root,
      env: { ...inherited, ...environment },
      stdio: ["ignore", "pipe", "pipe"],
    });
    for (const stream of [this.launcher.stdout, this.launcher.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => (this.output += text));
    }
  }

  async exit(): Promise<number | null> {
    if (this.launcher.exitCode === null && this.launcher.signalCode === null) await once(this.launcher, "exit");
    return this.launcher.exitCode;
  }

  async untilUp(): Promise<void> {
    const deadlineMs = performance.now() + startTimeoutMs;
    while (!this.output.includes(lastLine)) {
      assert.equal(this.launcher.exitCode, null, this.output);
      assert.ok(performance.now() < deadlineMs, this.output);
      await wait(100);
    }
  }

  /** The lines below a heading of the screen. */
  pasteLines(heading: string): string {
    return this.output.split(`# ${heading}\n`)[1]?.split("\n\n")[0] ?? "";
  }
}

function shell(line: string): Promise<{ code: number; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    const child = execFile(
      "/bin/sh",
      ["-c", line],
      { cwd: root, timeout: startTimeoutMs },
      (_error, stdout, stderr) => {
        resolve({ code: child.exitCode ?? -1, stdout, stderr });
      },
    );
  });
}

/** Waits until no process names the data folder, and the engine's namespace and run folder are gone. */
async function assertGone(dataFolder: string): Promise<void> {
  const { namespace, runFolder } = layoutOf(join(dataFolder, "engine"), "clodei");
  const exists = (path: string): Promise<boolean> =>
    stat(path).then(
      () => true,
      () => false,
    );
  const left = async (): Promise<string[]> => [
    ...(await pidsByArgument(dataFolder)).map((pid) => `process ${pid}`),
    ...((await exists(`/run/netns/${namespace}`)) ? [namespace] : []),
    ...((await exists(runFolder)) ? [runFolder] : []),
  ];
  const deadlineMs = performance.now() + goneTimeoutMs;
  while ((await left()).length > 0 && performance.now() < deadlineMs) await wait(100);
  assert.deepEqual(await left(), []);
}

const folders: string[] = [];
const starts: Start[] = [];
const options = engineUnavailable === undefined ? {} : { skip: engineUnavailable };

async function newFolder(): Promise<string> {
  const folder = await realpath(await mkdtemp(join(tmpdir(), "clodei-start-")));
  folders.push(folder);
  return folder;
}

function start(dataFolder: string, parameters: readonly string[], environment?: NodeJS.ProcessEnv): Start {
  const started = new Start(dataFolder, parameters, environment);
  starts.push(started);
  return started;
}

let folder: string;

before(async () => {
  folder = await newFolder();
});

after(async () => {
  for (const { launcher } of starts) launcher.kill("SIGTERM");
  await Promise.all(starts.map((started) => started.exit()));
  for (const path of folders) await rm(path, { recursive: true, force: true });
});

test("start --once runs an instance, prints its output, and leaves nothing but the data folder", options, async () => {
  const started = start(folder, ["--once"]);
  assert.equal(await started.exit(), 0, started.output);
  assert.match(started.output, firstOutput);
  assert.match(started.output, /keys +new, kept in/u);
  await assertGone(folder);
  for (const file of ["organization", "operator"]) {
    assert.equal((await stat(join(folder, "keys", file))).mode & 0o777, 0o600);
  }
});

test("what a start prints can be pasted, and a second start runs beside it", options, async () => {
  const started = start(folder, []);
  await started.untilUp();
  assert.match(started.output, /keys +the same as before/u);
  const beside = await newFolder();
  const second = start(beside, ["--once"]);
  const program = await shell(started.pasteLines("SDK program"));
  assert.deepEqual([program.code, program.stdout], [0, "Hello from a container\n"], program.stderr);
  const gpu = await shell(started.pasteLines("SDK program with a GPU"));
  assert.match(
    gpu.stdout,
    /runs in kumo-1 on H100-SXM GPU-SIM-\S+\nstdout: working\nstdout: done\nended with 0\n/u,
    gpu.stderr,
  );
  const errors = await shell(started.pasteLines("SDK program").replace("first-instance", "errors"));
  assert.equal(errors.code, 0, errors.stderr);
  for (const reason of [
    "IMAGE_NOT_ALLOWED",
    "INVALID_ARGUMENT",
    "PLACEMENT_TIMED_OUT",
    "EXITED_NONZERO, exit code 3",
  ]) {
    assert.ok(errors.stdout.includes(reason), errors.stdout);
  }
  const offers = await shell(started.pasteLines("buf curl"));
  assert.equal(offers.code, 0, offers.stderr);
  assert.match(offers.stdout, /"gpuModel": "H100-SXM"/u);
  const self = await shell(started.pasteLines("curl"));
  assert.match(self.stdout, /"organizationName":"demo"/u, self.stderr);
  const nodes = await shell(
    `PATH=node_modules/.bin:$PATH; ${grpcurlByBuf(started.pasteLines("grpcurl, as operator"))}`,
  );
  assert.match(nodes.stdout, /"state": "NODE_STATE_READY"/u, nodes.stderr);
  assert.equal(await second.exit(), 0, second.output);
  await assertGone(beside);
  const refused = start(folder, ["--once"]);
  assert.equal(await refused.exit(), 1);
  assert.match(refused.output, /another start runs in/u);
  started.launcher.kill("SIGTERM");
  assert.equal(await started.exit(), 0, started.output);
  await assertGone(folder);
});

test(
  "an instance that ran when a start was stopped can be started again after the next, with its workspace",
  options,
  async () => {
    const clientOf = async (started: Start, key?: string) => {
      await started.untilUp();
      const endpoint = /public API +(\S+)/u.exec(started.output)?.[1] ?? "";
      const apiKey = key ?? (await readFile(join(folder, "keys/organization"), "utf8")).trim();
      return createClient({ endpoint, apiKey, ca: await readFile(join(folder, "ca/certificate.pem"), "utf8") });
    };
    const started = start(folder, []);
    using client = await clientOf(started);
    const create = `create-organization --data '${folder}' --name other`;
    const printed = await shell(`'${process.execPath}' control-plane/src/main.ts ${create}`);
    const { apiKey: otherKey } = JSON.parse(printed.stdout) as { readonly apiKey: string };
    using otherClient = await clientOf(started, otherKey);
    const other = await otherClient.instances.run({ image: demoImage, command: ["sleep", "1000"] });
    await other.waitUntilRunning({ timeoutMs: startTimeoutMs });
    const script = "trap exit TERM; echo start >> /workspace/starts; cat /workspace/starts; sleep 1000 & wait";
    const instance = await client.instances.run({ image: demoImage, command: ["sh", "-c", script] });
    await instance.waitUntilRunning({ timeoutMs: startTimeoutMs });
    // Waits for a GPU that nobody has: it must not start in the place of those that stop.
    const waiting = await client.instances.run({ image: demoImage, gpu: { model: "H100-SXM", count: 16 } });
    started.launcher.kill("SIGTERM");
    assert.equal(await started.exit(), 0, started.output);
    assert.match(started.output, /stopping 2 instances, which may take 10 s/u);
    assert.match(started.output, /stopped 2 instances: after the next start, start them again/u);
    await assertGone(folder);
    const next = start(folder, []);
    using nextClient = await clientOf(next);
    for (const { id } of [instance, waiting]) {
      const stopped = await nextClient.instances.get(id);
      assert.deepEqual([stopped.state, stopped.reason], ["STOPPED", "STOPPED_BY_REQUEST"]);
    }
    assert.match(started.output, /^Ctrl-C stops it\. The demo organization's instances .*; those of others fail\.$/mu);
    using nextOtherClient = await clientOf(next, otherKey);
    const lost = await nextOtherClient.instances.get(other.id);
    assert.deepEqual([(await lost.waitUntilStopped()).id, lost.state], [other.id, "FAILED"]);
    const again = await nextClient.instances.get(instance.id);
    await again.start();
    await again.waitUntilRunning({ timeoutMs: startTimeoutMs });
    assert.equal((await again.logs({ tailLines: 2, follow: false }).text()).trim(), "start\nstart");
    next.launcher.kill("SIGTERM");
    assert.equal(await next.exit(), 0, next.output);
    await assertGone(folder);
  },
);

test("a start stops when its launcher is killed", options, async () => {
  const started = start(folder, []);
  await started.untilUp();
  started.launcher.kill("SIGKILL");
  await started.exit();
  await assertGone(folder);
});

test("what a killed start left in another's engine, the next start takes away", options, async () => {
  await using engine = await startTestEngine();
  const environment = { DOCKER_HOST: `unix://${engine.socketPath}` };
  const listed = (path: string): Promise<unknown> =>
    callEngineJson(engine.socketPath, { path, query: { all: "true" } });
  const networkNames = async (): Promise<string[]> => {
    const networks = (await listed("/networks")) as { readonly Name: string }[];
    return networks.map(({ Name }) => Name).sort();
  };
  const networks = await networkNames();
  const started = start(folder, [], environment);
  await started.untilUp();
  const endpoint = /public API +(\S+)/u.exec(started.output)?.[1] ?? "";
  const apiKey = (await readFile(join(folder, "keys/organization"), "utf8")).trim();
  const ca = await readFile(join(folder, "ca/certificate.pem"), "utf8");
  using client = createClient({ endpoint, apiKey, ca });
  const instance = await client.instances.run({ image: demoImage, command: ["sleep", "1000"] });
  await instance.waitUntilRunning({ timeoutMs: startTimeoutMs });
  const main = (await readFile(`/proc/${started.launcher.pid}/task/${started.launcher.pid}/children`, "utf8")).trim();
  process.kill(Number(main), "SIGKILL");
  await started.exit();
  assert.notDeepEqual(await listed("/containers/json"), []);
  assert.notDeepEqual(await networkNames(), networks);
  assert.notDeepEqual(await listed("/images/json"), []);
  const next = start(folder, ["--once"], environment);
  assert.equal(await next.exit(), 0, next.output);
  assert.match(next.output, /clearing what a killed start left/u);
  assert.deepEqual(await listed("/containers/json"), []);
  assert.deepEqual(await networkNames(), networks);
  assert.deepEqual(await listed("/images/json"), []);
  await assertGone(folder);
});

test("start --reset empties the data folder first", options, async () => {
  const started = start(folder, ["--once", "--reset"]);
  assert.equal(await started.exit(), 0, started.output);
  assert.match(started.output, /keys +new, kept in/u);
  await assertGone(folder);
});
