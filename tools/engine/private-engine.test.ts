import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { setTimeout as wait } from "node:timers/promises";
import { engineUnavailable, startTestEngine } from "../../test/harness/engine.ts";
import { callEngine, callEngineJson } from "./api.ts";
import { importBusybox } from "./busybox.ts";
import { pidsByArgument } from "./processes.ts";
import { startPrivateEngine } from "./private-engine.ts";
import { runTool, tryTool } from "./shell.ts";

const image = "docker.io/library/busybox:latest";

/** Everything on the machine that an engine with that id leaves outside of its folder. */
async function traces(id: string): Promise<string[]> {
  const found: string[] = [];
  const look = async (what: string, text: string | Promise<string>): Promise<void> => {
    for (const line of (await text).split("\n")) if (line.includes(id)) found.push(`${what}: ${line}`);
  };
  await look("run", (await readdir("/run")).join("\n"));
  await look("namespace", (await readdir("/run/netns").catch((): string[] => [])).join("\n"));
  await look("mount", readFile("/proc/self/mountinfo", "utf8"));
  await look("link", runTool("ip", "-oneline", "link", "show"));
  await look("rule", runTool("iptables", "-w", "-S"));
  await look("nat rule", runTool("iptables", "-w", "-t", "nat", "-S"));
  await look("process", (await pidsByArgument(`/run/clodei-${id}/`)).map((pid) => `${id} ${pid}`).join("\n"));
  for (const hierarchy of await readdir("/sys/fs/cgroup")) {
    await look(
      "control group",
      (await readdir(join("/sys/fs/cgroup", hierarchy)).catch((): string[] => [])).join("\n"),
    );
  }
  return found;
}

const idOf = (namespace: string): string => namespace.slice(namespace.lastIndexOf("-") + 1);

async function runContainer(socketPath: string, command: readonly string[]): Promise<string> {
  const created = await callEngineJson(socketPath, {
    method: "POST",
    path: "/containers/create",
    body: { Image: image, Cmd: command },
  });
  const { Id } = created as { Id: string };
  await callEngine(socketPath, { method: "POST", path: `/containers/${Id}/start` });
  return Id;
}

async function exitCode(socketPath: string, id: string): Promise<number> {
  const ended = await callEngineJson(socketPath, { method: "POST", path: `/containers/${id}/wait` });
  return (ended as { StatusCode: number }).StatusCode;
}

describe("a private engine", { skip: engineUnavailable }, () => {
  let folder: string;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "clodei-private-"));
  });
  after(async () => rm(folder, { recursive: true, force: true }));

  it("runs beside another one, keeps its images, and takes everything else away", async () => {
    const options = { folder: join(folder, "kept"), name: "clodei-a", internet: false };
    const [kept, other] = await Promise.all([startPrivateEngine(options), startTestEngine()]);
    assert.notEqual(kept.namespace, other.namespace);
    assert.notEqual(kept.socketPath, other.socketPath);
    await Promise.all([kept, other].map(({ socketPath }) => importBusybox(socketPath, image)));
    await Promise.all([kept, other].map(({ socketPath }) => runContainer(socketPath, ["sleep", "1000"])));
    await assert.rejects(startPrivateEngine(options), /belongs to process/);
    assert.ok((await traces(idOf(kept.namespace))).length >= 5, "the look finds an engine that runs");
    await kept.close();
    assert.deepEqual(await traces(idOf(kept.namespace)), []);
    assert.equal(await exitCode(other.socketPath, await runContainer(other.socketPath, ["true"])), 0);
    await other.close();
    assert.deepEqual(await traces(idOf(other.namespace)), []);
    await assert.rejects(readdir(other.folder), { code: "ENOENT" });
    await using again = await startPrivateEngine(options);
    assert.equal(await exitCode(again.socketPath, await runContainer(again.socketPath, ["true"])), 0);
  });

  for (const temporary of [false, true]) {
    const name = temporary
      ? "that is temporary takes whoever names its run folder with it"
      : "ends without what somebody else runs with its socket";
    it(name, async () => {
      const own = join(folder, temporary ? "temporary" : "used");
      const engine = await startPrivateEngine({ folder: own, name: "clodei-d", internet: false, temporary });
      const client = spawn("sh", ["-c", "read -r line", engine.socketPath], { stdio: ["pipe", "ignore", "inherit"] });
      const ended = once(client, "exit");
      try {
        await once(client, "spawn");
        await engine.close();
        if (temporary) assert.deepEqual(await ended, [null, "SIGKILL"]);
        else assert.deepEqual(await pidsByArgument(engine.runFolder), [client.pid]);
      } finally {
        client.kill("SIGKILL");
        await ended;
      }
      assert.deepEqual(await traces(idOf(engine.namespace)), []);
    });
  }

  for (const how of ["its watchdog", "the next start"] as const) {
    it(`is cleared away by ${how} when its owner was killed`, async () => {
      const own = join(folder, how.replaceAll(" ", "-"));
      const script = `
        const { startPrivateEngine } = await import(${JSON.stringify(new URL("private-engine.ts", import.meta.url))});
        const { importBusybox } = await import(${JSON.stringify(new URL("busybox.ts", import.meta.url))});
        const engine = await startPrivateEngine({ folder: ${JSON.stringify(own)}, name: "clodei-b", internet: false });
        await importBusybox(engine.socketPath, "${image}");
        console.log(JSON.stringify({ socketPath: engine.socketPath, namespace: engine.namespace }));
        setInterval(() => {}, 1000);`;
      const owner = spawn(process.execPath, ["--input-type=module", "--eval", script], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      const [line] = (await once(owner.stdout.setEncoding("utf8"), "data")) as [string];
      const engine = JSON.parse(line) as { socketPath: string; namespace: string };
      await runContainer(engine.socketPath, ["sleep", "1000"]);
      const ended = once(owner, "exit");
      const note = JSON.parse(await readFile(join(own, "engine.json"), "utf8")) as { watchdog: { pid: number } };
      if (how === "the next start") process.kill(note.watchdog.pid, "SIGKILL");
      owner.kill("SIGKILL");
      await ended;
      if (how === "the next start") {
        await using next = await startPrivateEngine({ folder: own, name: "clodei-b", internet: false });
        assert.deepEqual(
          await callEngineJson(next.socketPath, { path: "/containers/json", query: { all: "true" } }),
          [],
        );
      } else {
        const deadline = performance.now() + 20_000;
        while ((await traces(idOf(engine.namespace))).length > 0 && performance.now() < deadline) await wait(100);
      }
      assert.deepEqual(await traces(idOf(engine.namespace)), []);
    });
  }

  it("reaches what the machine reaches only where it may, and undoes forwarding and rules", async () => {
    const setting = "/proc/sys/net/ipv4/ip_forward";
    const forwarding = await readFile(setting, "latin1");
    // A namespace plays the world outside, so that no packet leaves the machine.
    const world = `clodei-world-${process.pid}`;
    const address = "198.51.100.2";
    await runTool("ip", "netns", "add", world);
    try {
      await runTool("ip", "link", "add", `cw${process.pid}`, "type", "veth", "peer", "name", "world", "netns", world);
      await runTool("ip", "address", "add", "198.51.100.1/30", "dev", `cw${process.pid}`);
      await runTool("ip", "link", "set", `cw${process.pid}`, "up");
      await runTool("ip", "-n", world, "address", "add", `${address}/30`, "dev", "world");
      await runTool("ip", "-n", world, "link", "set", "world", "up");
      const ping = ["ping", "-c", "1", "-W", "2", address];
      const online = await startPrivateEngine({ folder: join(folder, "online"), name: "clodei-c", internet: true });
      const offline = await startTestEngine();
      try {
        await Promise.all([online, offline].map(({ socketPath }) => importBusybox(socketPath, image)));
        assert.equal(await exitCode(online.socketPath, await runContainer(online.socketPath, ping)), 0);
        assert.notEqual(await exitCode(offline.socketPath, await runContainer(offline.socketPath, ping)), 0);
        assert.deepEqual(offline.resolvers, []);
        for (const resolver of online.resolvers) assert.doesNotMatch(resolver, /^127\./);
      } finally {
        await Promise.all([online.close(), offline.close()]);
      }
      assert.deepEqual(await traces(idOf(online.namespace)), []);
      const holders = await readdir("/run/clodei-forwarding").catch((): string[] => []);
      if (holders.length === 0) assert.equal(await readFile(setting, "latin1"), forwarding);
    } finally {
      await tryTool("ip", "netns", "delete", world);
    }
  });
});
