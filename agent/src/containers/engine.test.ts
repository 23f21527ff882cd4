import assert from "node:assert/strict";
import { lstat, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, describe, it } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type ContainerSpec, ContainerSpecSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason, PullPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { newId, type NodeId } from "@clodei/proto/ids";
import { containerLabels, containerName } from "@clodei/proto/node-link";
import { listNetworks, processesOf } from "../../../test/harness/containers.ts";
import { engineUnavailable, startTestEngine } from "../../../test/harness/engine.ts";
import { eventually } from "../../../test/harness/eventually.ts";
import { callEngine, callEngineJson } from "../../../tools/engine/api.ts";
import { importBusybox } from "../../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../../tools/engine/private-engine.ts";
import { runTool } from "../../../tools/engine/shell.ts";
import type { AttemptKey } from "./container-body.ts";
import { EngineError, type EngineErrorKind } from "./engine-error.ts";
import { ContainerEngine, type ContainerEngineOptions } from "./engine.ts";
import type { StartedContainer } from "./read-back.ts";

const image = "docker.io/library/busybox:latest";
const signal = new AbortController().signal;
const nodeId = newId("nod");

function fails(kind: EngineErrorKind, message: RegExp = /./) {
  return (error: unknown): boolean => {
    assert.ok(error instanceof EngineError, String(error));
    assert.equal(error.kind, kind, error.message);
    assert.match(error.message, message);
    return true;
  };
}

/** A value of unknown shape, by a path through it. */
function at(value: unknown, ...path: readonly (string | number)[]): unknown {
  let found = value;
  for (const part of path) {
    assert.ok(typeof found === "object" && found !== null, `nothing at ${path.join(".")}`);
    found = Object.entries(found).find(([name]) => name === String(part))?.[1];
  }
  return found;
}

describe("containers on a real engine", { skip: engineUnavailable }, () => {
  let engine: PrivateEngine;
  let containers: ContainerEngine;

  const make = (options: Partial<ContainerEngineOptions> = {}): ContainerEngine =>
    new ContainerEngine({
      socketPath: engine.socketPath,
      nodeId,
      workspaceFolder: join(engine.folder, "workspaces"),
      simulatedGpus: new Set(["GPU-SIM-1"]),
      dnsServers: ["10.255.255.1"],
      pidsLimit: 100,
      openFilesLimit: 1000,
      ...options,
    });

  before(async () => {
    engine = await startTestEngine();
    await importBusybox(engine.socketPath, image);
    containers = make();
    await containers.check(signal);
  });
  after(async () => engine.close());

  const spec = (
    script: string,
    more: Omit<MessageInitShape<typeof ContainerSpecSchema>, "$typeName"> = {},
  ): ContainerSpec =>
    create(ContainerSpecSchema, { image, command: ["sh", "-c", script], cpuMillis: 500, memoryMib: 64, ...more });

  const newKey = (): AttemptKey => ({ instanceId: newId("ins"), attempt: 1 });

  async function prepare(key: AttemptKey, what: ContainerSpec, by = containers): Promise<string> {
    const local = await by.ensureImage(what.image, PullPolicy.NEVER, () => {}, signal);
    return (await by.create(key, 7n, what, local, signal)).id;
  }

  async function run(
    what: ContainerSpec,
    key = newKey(),
  ): Promise<AttemptKey & { readonly id: string; readonly started: StartedContainer }> {
    const id = await prepare(key, what);
    return { ...key, id, started: await containers.start(key, signal) };
  }

  async function observe(key: AttemptKey) {
    const all = await containers.list(signal);
    return all.find((container) => container.instanceId === key.instanceId && container.attempt === key.attempt);
  }

  async function ended(key: AttemptKey) {
    await containers.waitEnd(key, signal);
    return (await observe(key)) ?? assert.fail("the container is there");
  }

  const inspect = (id: string): Promise<unknown> =>
    callEngineJson(engine.socketPath, { path: `/containers/${id}/json` });

  const networkOf = async (id: string): Promise<string> => String(at(await inspect(id), "HostConfig", "NetworkMode"));

  it("invariant 5: the engine's view of a running container is exactly the hardening that was asked for", async () => {
    const key = await run(spec("sleep 100", { gpuUuids: ["GPU-SIM-1"], env: { A: "b" } }));
    const view = await inspect(key.id);
    const network = await networkOf(key.id);
    assert.match(network, /^clodei-[0-9a-f]{12}$/);
    const name = containerName(key.instanceId, 1);
    const workspace = join(engine.folder, "workspaces", key.instanceId);
    // The engine's own defaults: paths of /proc and /sys that a container must not read, or not write.
    const maskedPaths = [
      "/proc/asound",
      "/proc/acpi",
      "/proc/kcore",
      "/proc/keys",
      "/proc/latency_stats",
      "/proc/timer_list",
      "/proc/timer_stats",
      "/proc/sched_debug",
      "/proc/scsi",
      "/sys/firmware",
    ];
    const readonlyPaths = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
    const nothing = {
      Binds: null,
      ContainerIDFile: "",
      PortBindings: {},
      AutoRemove: false,
      VolumeDriver: "",
      VolumesFrom: null,
      DnsOptions: null,
      ExtraHosts: null,
      GroupAdd: null,
      Cgroup: "",
      Links: null,
      OomScoreAdj: 0,
      PublishAllPorts: false,
      ConsoleSize: [0, 0],
      Isolation: "",
      CgroupParent: "",
      BlkioWeight: 0,
      BlkioWeightDevice: null,
      BlkioDeviceReadBps: null,
      BlkioDeviceWriteBps: null,
      BlkioDeviceReadIOps: null,
      BlkioDeviceWriteIOps: null,
      CpuPeriod: 0,
      CpuQuota: 0,
      CpuRealtimePeriod: 0,
      CpuRealtimeRuntime: 0,
      CpusetCpus: "",
      CpusetMems: "",
      KernelMemory: 0,
      KernelMemoryTCP: 0,
      MemoryReservation: 0,
      MemorySwappiness: null,
      CpuCount: 0,
      CpuPercent: 0,
      IOMaximumIOps: 0,
      IOMaximumBandwidth: 0,
    };
    const mib = 1024 * 1024;
    assert.deepEqual(at(view, "HostConfig"), {
      ...nothing,
      Privileged: false,
      CapAdd: [],
      CapDrop: ["ALL"],
      SecurityOpt: ["no-new-privileges"],
      Runtime: "runc",
      NetworkMode: network,
      IpcMode: "private",
      PidMode: "",
      UTSMode: "",
      UsernsMode: "",
      CgroupnsMode: "private",
      Dns: ["10.255.255.1"],
      DnsSearch: ["."],
      Mounts: [{ Type: "bind", Source: workspace, Target: "/workspace", BindOptions: { Propagation: "rprivate" } }],
      ReadonlyRootfs: false,
      ShmSize: 32 * mib,
      Devices: [],
      DeviceCgroupRules: null,
      DeviceRequests: null,
      Memory: 64 * mib,
      MemorySwap: 64 * mib,
      OomKillDisable: false,
      NanoCpus: 500_000_000,
      CpuShares: 512,
      PidsLimit: 100,
      Ulimits: [
        { Name: "core", Soft: 0, Hard: 0 },
        { Name: "nofile", Soft: 1000, Hard: 1000 },
      ],
      LogConfig: { Type: "local", Config: { "max-size": "32m", "max-file": "2", compress: "false" } },
      RestartPolicy: { Name: "no", MaximumRetryCount: 0 },
      MaskedPaths: maskedPaths,
      ReadonlyPaths: readonlyPaths,
    });
    const {
      [containerLabels.generation]: generation,
      "clodei.spec_digest": digest,
      ...labels
    } = at(view, "Config", "Labels") as Record<string, string>;
    assert.deepEqual([generation, /^[0-9a-f]{64}$/.test(digest ?? "")], ["7", true]);
    assert.deepEqual(labels, {
      [containerLabels.nodeId]: nodeId,
      [containerLabels.instanceId]: key.instanceId,
      [containerLabels.attempt]: "1",
    });
    const config: Record<string, unknown> = { ...(at(view, "Config") as object) };
    delete config["Labels"];
    assert.deepEqual(config, {
      Hostname: key.instanceId.replace("_", "-"),
      Domainname: "",
      User: "",
      AttachStdin: false,
      AttachStdout: false,
      AttachStderr: false,
      Tty: false,
      OpenStdin: false,
      StdinOnce: false,
      Env: ["A=b", "NVIDIA_VISIBLE_DEVICES=void", "PATH=/bin"],
      Cmd: [],
      Healthcheck: { Test: ["NONE"] },
      Image: at(view, "Image"),
      Volumes: null,
      WorkingDir: "",
      Entrypoint: ["sh", "-c", "sleep 100"],
      OnBuild: null,
      StopSignal: "SIGTERM",
      StopTimeout: 10,
    });
    assert.equal(at(view, "Name"), `/${name}`);
    assert.deepEqual(Object.keys(at(view, "NetworkSettings", "Networks") as object), [network]);
    assert.deepEqual(at(view, "Mounts"), [
      { Type: "bind", Source: workspace, Destination: "/workspace", Mode: "", RW: true, Propagation: "rprivate" },
    ]);
    await containers.remove(key, signal);
  });

  it("invariant 5: the kernel's view of a running container is read back", async () => {
    const key = await run(spec("sleep 100 & sleep 100"));
    const isolation = key.started.isolation ?? assert.fail("it runs");
    assert.equal(isolation.effectiveCapabilities, 0n);
    assert.equal(isolation.noNewPrivileges, true);
    assert.equal(isolation.seccompMode, 2);
    assert.ok(isolation.seccompFilters >= 1);
    // Not this library's word for it: the file itself.
    const status = await readFile(`/proc/${(await observe(key))?.pid}/status`, "latin1");
    assert.match(status, /^CapBnd:\t0000000000000000$/m);
    assert.match(status, /^NoNewPrivs:\t1$/m);
    assert.match(status, /^Seccomp:\t2$/m);
    await containers.remove(key, signal);
  });

  it("kills a container whose isolation is not what it must be", async () => {
    const weaknesses: Record<string, [object, RegExp]> = {
      capability: [{ CapAdd: ["CHOWN"] }, /CapInh|CapPrm/],
      privileges: [{ SecurityOpt: [] }, /NoNewPrivs 0/],
      seccomp: [{ SecurityOpt: ["no-new-privileges", "seccomp=unconfined"] }, /Seccomp 0/],
      groups: [{ GroupAdd: ["6"] }, /Groups .*6/],
      pid: [{ PidMode: "host" }, /host's pid namespace/],
      ipc: [{ IpcMode: "host" }, /host's ipc namespace/],
    };
    for (const [weakness, [change, message]] of Object.entries(weaknesses)) {
      const key = newKey();
      await prepare(key, spec("sleep 100"));
      const view = await inspect(containerName(key.instanceId, 1));
      // The same name and labels, as if Docker had not done what it was asked.
      await callEngine(engine.socketPath, {
        method: "DELETE",
        path: `/containers/${containerName(key.instanceId, 1)}`,
      });
      await callEngine(engine.socketPath, {
        method: "POST",
        path: "/containers/create",
        query: { name: containerName(key.instanceId, 1) },
        body: { ...(at(view, "Config") as object), HostConfig: { ...(at(view, "HostConfig") as object), ...change } },
      });
      await assert.rejects(containers.start(key, signal), fails("policy", message), weakness);
      assert.equal((await ended(key)).state, "exited", weakness);
      await containers.remove(key, signal);
    }
  });

  it("kills a container of which a process left its control groups", async () => {
    const [groups, mounts] = await Promise.all([
      readFile("/proc/self/cgroup", "latin1"),
      readFile("/proc/self/mountinfo", "latin1"),
    ]);
    for (const [controller, which] of [
      ["pids", "first"],
      ["memory", "first"],
      ["memory", "second"],
    ] as const) {
      const isFirstVersion = new RegExp(`^\\d+:(\\S+,)?${controller}(,\\S+)?:`, "m").test(groups);
      // On version 2 there is one group for all, and who left it is nobody's.
      if (which === "second" && !isFirstVersion) continue;
      const type = isFirstVersion ? `cgroup \\S+ (\\S+,)?${controller}(,|$)` : "cgroup2 ";
      const [, mount = ""] = new RegExp(`^(?:\\S+ ){4}(\\S+) .* - ${type}`, "m").exec(mounts) ?? [];
      const key = await run(spec("sleep 100 & wait"));
      const first = (await observe(key))?.pid;
      const second = await eventually(5000, async () => {
        const found = (await processesOf(key.id)).find((pid) => pid !== first);
        return found ?? assert.fail("the second process is not there yet");
      });
      await writeFile(join(mount, "cgroup.procs"), String(which === "first" ? first : second));
      await assert.rejects(containers.adopt(key, signal), fails("policy", /not in the container's control group/));
      assert.equal((await ended(key)).exitCode, 137);
      await containers.remove(key, signal);
    }
  });

  it("finds a process of another user or group that was added beside a clean first one", async () => {
    for (const [User, message] of [
      ["1000", /Uid 1000/],
      ["0:6", /Gid 6/],
    ] as const) {
      const key = await run(spec("sleep 100"));
      const exec = await callEngineJson(engine.socketPath, {
        method: "POST",
        path: `/containers/${key.id}/exec`,
        body: { Cmd: ["sleep", "100"], User },
      });
      await callEngine(engine.socketPath, {
        method: "POST",
        path: `/exec/${String(at(exec, "Id"))}/start`,
        body: { Detach: true },
      });
      await assert.rejects(containers.adopt(key, signal), fails("policy", message));
      assert.equal((await ended(key)).exitCode, 137);
      await containers.remove(key, signal);
    }
  });

  it("lets an image's user be in the groups of its image", async () => {
    const grouped = "docker.io/library/grouped:latest";
    const file = (path: string, text: string) => ({ path, kind: "file" as const, data: Buffer.from(text) });
    await importBusybox(engine.socketPath, grouped, {
      files: [
        file("etc/passwd", "root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n"),
        file("etc/group", "root:x:0:\ndisk:x:6:root,app\naudio:x:29:app\n"),
      ],
      changes: ["USER app"],
    });
    const key = await run(spec("sleep 100", { image: grouped }));
    assert.ok(key.started.isolation !== undefined);
    const status = await readFile(`/proc/${(await observe(key))?.pid}/status`, "latin1");
    assert.match(status, /^Gid:\t1235\t1235\t1235\t1235$/m);
    assert.match(status, /^Groups:\t(1235 )?6 29( 1235)? ?$|^Groups:\t6 29 1235 ?$/m);
    assert.ok((await make().adopt(key, signal)).isolation !== undefined, "also for a later process of the agent");
    await containers.remove(key, signal);
  });

  it("kills a container that runs as another user than its workspace was given to", async () => {
    const trick = "docker.io/library/trick:latest";
    // A name to its /etc/passwd, and a number to runc.
    const passwd = "root:x:0:0::/:/bin/sh\n+10001:x:0:0::/:/bin/sh\n";
    await importBusybox(engine.socketPath, trick, {
      files: [{ path: "etc/passwd", kind: "file", data: Buffer.from(passwd) }],
      changes: ["USER +10001"],
    });
    await assert.rejects(run(spec("sleep 100", { image: trick })), fails("policy", /Uid/));
  });

  it("gives the workspace, and nothing else, to the user that the image names", async () => {
    const named = "docker.io/library/named:latest";
    const passwd = "root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n";
    await importBusybox(engine.socketPath, named, {
      files: [{ path: "etc/passwd", kind: "file", data: Buffer.from(passwd) }],
      changes: ["USER app"],
    });
    for (const [reference, uid] of [
      [named, 1234],
      [image, 0],
    ] as const) {
      const key = await run(spec("echo kept > /workspace/file", { image: reference }));
      assert.equal((await ended(key)).exitCode, 0);
      const folder = join(engine.folder, "workspaces", key.instanceId);
      const found = await lstat(folder);
      assert.deepEqual([found.uid, found.mode & 0o7777], [uid, 0o750]);
      assert.equal((await lstat(join(engine.folder, "workspaces"))).mode & 0o777, 0o700);
      await containers.remove(key, signal);
      const second = await run(spec("cat /workspace/file", { image: reference }), { ...key, attempt: 2 });
      assert.equal((await ended(second)).exitCode, 0, "the workspace outlives the attempt");
      await containers.remove(second, signal);
      await containers.removeWorkspace(key.instanceId);
      await assert.rejects(lstat(folder), { code: "ENOENT" });
    }
  });

  it("reads no more of an image than an account file can have", async () => {
    const endless = "docker.io/library/endless:latest";
    const data = Buffer.alloc(2 * 1024 * 1024, "root:x:0:0::/:/bin/sh\n");
    await importBusybox(engine.socketPath, endless, {
      files: [{ path: "etc/passwd", kind: "file", data }],
      changes: ["USER app"],
    });
    await assert.rejects(run(spec("true", { image: endless })), fails("start_failed", /no plain file/));
  });

  it("tells how a container ended: by itself, by its code, for memory", async () => {
    const good = await ended(await run(spec("exit 0")));
    assert.deepEqual([good.state, good.exitCode, good.oomKilled], ["exited", 0, false]);
    assert.ok((good.startTime?.getTime() ?? 0) <= (good.finishTime?.getTime() ?? 0));
    const three = await ended(await run(spec("exit 3")));
    assert.deepEqual([three.exitCode, three.oomKilled, three.generation], [3, false, 7n]);
    const hungry = await ended(await run(spec("x=a; while :; do x=$x$x$x; done", { memoryMib: 16 })));
    assert.deepEqual([hungry.exitCode, hungry.oomKilled], [137, true]);
    for (const key of [good, three, hungry]) await containers.remove(key, signal);
  });

  it("says why a container cannot start", async () => {
    await assert.rejects(run(spec("", { command: ["/no/such/program"] })), (error: unknown) => {
      assert.ok(fails("start_failed", /no such file/)(error) && error instanceof EngineError);
      return error.reason === InstanceReason.START_FAILED;
    });
    const nobody = "docker.io/library/nobody:latest";
    await importBusybox(engine.socketPath, nobody, { changes: ["USER ghost"] });
    await assert.rejects(run(spec("true", { image: nobody })), fails("start_failed", /ghost/));
    await assert.rejects(
      containers.ensureImage("docker.io/library/missing:1", PullPolicy.NEVER, () => {}, signal),
      fails("image_not_found", /missing/),
    );
  });

  it("creates once, starts once, and takes up what another process made", async () => {
    const key = newKey();
    const what = spec("echo run >> /workspace/runs");
    const id = await prepare(key, what);
    // A second agent, as after a crash: it knows nothing of the first one's calls.
    const other = make();
    assert.equal(await prepare(key, what, other), id);
    assert.equal((await observe(key))?.state, "created");
    await other.start(key, signal);
    await ended(key);
    const again = await containers.start(key, signal);
    assert.equal(again.isolation, undefined);
    await make().start(key, signal);
    assert.equal(await readFile(join(engine.folder, "workspaces", key.instanceId, "runs"), "utf8"), "run\n");
    await assert.rejects(prepare(key, spec("echo other")), fails("policy", /another specification/));
    await containers.remove(key, signal);
    await containers.remove(key, signal);
    await containers.stop(key, 0, signal);
  });

  it("replaces a container of another specification that never ran, and never touches a stranger's", async () => {
    const key = newKey();
    const first = await prepare(key, spec("echo one"));
    const second = await prepare(key, spec("echo two"));
    assert.notEqual(second, first);
    const stranger = make({ nodeId: newId("nod") });
    assert.deepEqual(await stranger.list(signal), []);
    await assert.rejects(prepare(key, spec("echo two"), stranger), fails("failed", /did not create/));
    await stranger.remove(key, signal);
    assert.equal((await observe(key))?.containerId, second);
    await containers.remove(key, signal);
  });

  it("stops in order within the grace, by force after it, and removes container and network", async () => {
    const polite = await run(spec("trap 'exit 5' TERM; while :; do sleep 0.1; done"));
    await containers.stop(polite, 10_000, signal);
    assert.equal((await observe(polite))?.exitCode, 5);
    const deaf = await run(spec("trap '' TERM; while :; do sleep 0.1; done"));
    const begin = performance.now();
    await containers.stop(deaf, 1000, signal);
    // It ignores the signal for as long as it is there.
    assert.ok(performance.now() - begin >= 1000);
    assert.equal((await observe(deaf))?.exitCode, 137);
    for (const key of [polite, deaf]) {
      const network = await networkOf(key.id);
      assert.ok((await listNetworks(engine)).includes(network));
      await containers.remove(key, signal);
      assert.equal(await observe(key), undefined);
      assert.ok(!(await listNetworks(engine)).includes(network));
    }
  });

  describe("networks", () => {
    let mine: ContainerEngine;
    let node: NodeId;
    beforeEach(() => {
      node = newId("nod");
      mine = make({ nodeId: node, networkRestMs: 0 });
    });
    afterEach(async () => {
      await mine.dropNetworks(signal);
      assert.deepEqual(await listNetworks(engine, node), []);
    });

    it("invariant 5: puts each container into one that nothing was ever in, made ready or not", async () => {
      await mine.prepareNetworks(signal);
      const ready = await listNetworks(engine, node);
      assert.equal(ready.length, 2);
      const keys = Array.from({ length: 3 }, newKey);
      const ids = await Promise.all(keys.map((key) => prepare(key, spec("sleep 100"), mine)));
      const used = await Promise.all(ids.map(networkOf));
      assert.equal(new Set(used).size, 3);
      assert.ok(
        ready.every((name) => used.includes(name)),
        "those that were ready are used first",
      );
      for (const key of keys) {
        await mine.start(key, signal);
        await mine.remove(key, signal);
      }
      assert.deepEqual(await listNetworks(engine, node), [], "each goes with its container");
      const next = newKey();
      assert.ok(!used.includes(await networkOf(await prepare(next, spec("true"), mine))));
      await mine.discard(next, signal);
    });

    it("are made ready only when the starts before have had the engine for themselves", async () => {
      const resting = make({ nodeId: node, networkRestMs: 3_600_000 });
      const [first, second] = [newKey(), newKey()];
      await prepare(first, spec("true"), resting);
      await resting.prepareNetworks(signal);
      assert.equal((await listNetworks(engine, node)).length, 1);
      await resting.remove(first, signal);
      const soon = make({ nodeId: node, networkRestMs: 1000 });
      await prepare(second, spec("true"), soon);
      await eventually(20_000, async () => {
        await soon.prepareNetworks(signal);
        assert.equal((await listNetworks(engine, node)).length, 3);
      });
      await soon.remove(second, signal);
      await soon.dropNetworks(signal);
    });

    it("are swept where nobody needs them, the node's own alone", async () => {
      const [dead, other] = [make({ nodeId: node }), make({ nodeId: newId("nod") })];
      for (const one of [dead, other]) await one.prepareNetworks(signal);
      const all = (await listNetworks(engine)).length;
      const key = newKey();
      const kept = await networkOf(await prepare(key, spec("true"), mine));
      await mine.sweepNetworks(signal);
      // The container is not started yet: the engine would let its network go.
      assert.deepEqual(await listNetworks(engine, node), [kept]);
      assert.equal((await listNetworks(engine)).length, all + 1 - 2);
      await mine.start(key, signal);
      await mine.remove(key, signal);
      await mine.prepareNetworks(signal);
      await mine.sweepNetworks(signal);
      assert.equal((await listNetworks(engine, node)).length, 2, "those that are ready stay");
      await other.dropNetworks(signal);
    });

    it("are replaced by others where somebody took the ready ones away", async () => {
      const prune = () => callEngine(engine.socketPath, { method: "POST", path: "/networks/prune" });
      await mine.prepareNetworks(signal);
      await prune();
      const key = newKey();
      await prepare(key, spec("sleep 100"), mine);
      await assert.rejects(mine.start(key, signal), fails("not_found", /network .* not found/));
      // As the executor does where a start failed that was not the customer's doing.
      assert.equal(await mine.startTrace(key, signal), "not_begun");
      await mine.discard(key, signal);
      await prepare(key, spec("sleep 100"), mine);
      assert.notEqual((await mine.start(key, signal)).isolation, undefined);
      await mine.remove(key, signal);
      // Nothing was started meanwhile: the sweep finds out.
      await mine.prepareNetworks(signal);
      await prune();
      await mine.sweepNetworks(signal);
      await mine.prepareNetworks(signal);
      assert.equal((await listNetworks(engine, node)).length, 2);
    });
  });

  it("names attempts whose containers change, and says when the engine goes away", async () => {
    const seen: AttemptKey[] = [];
    const watching = (async () => {
      for await (const key of containers.events(signal)) seen.push(key);
    })();
    const lost = assert.rejects(watching, fails("away"));
    // The engine does not say from when on it tells events: another container is made until one is told of.
    const key = await eventually(20_000, async () => {
      const made = await run(spec("sleep 100"));
      await eventually(500, () => assert.ok(seen.some(({ instanceId }) => instanceId === made.instanceId)));
      return made;
    });
    assert.ok(seen.every(({ attempt }) => attempt === 1));
    const waiting = assert.rejects(containers.waitEnd(key, signal), fails("away"));
    await engine.kill();
    await lost;
    await waiting;
    await assert.rejects(containers.list(signal), fails("away"));
    await engine.startDaemon();
    assert.equal((await observe(key))?.state, "running", "a container outlives its engine's crash");
    assert.equal((await containers.adopt(key, signal)).isolation?.effectiveCapabilities, 0n);
    await containers.remove(key, signal);
  });

  it("ends a call when its signal is aborted", async () => {
    const stop = new AbortController();
    const key = await run(spec("sleep 100"));
    const waiting = containers.waitEnd(key, stop.signal);
    stop.abort(new Error("enough"));
    await assert.rejects(waiting, /enough/);
    await assert.rejects(containers.list(stop.signal), /enough/);
    await containers.remove(key, signal);
  });

  it("takes a container that never ran, and whose removal was cut off, for one that never ran", async () => {
    const key = newKey();
    const id = await prepare(key, spec("sleep 100"));
    const folder = join(engine.folder, "data", "containers", id);
    await runTool("chattr", "+i", folder);
    try {
      await assert.rejects(containers.discard(key, signal), fails("failed"));
    } finally {
      await runTool("chattr", "-i", folder);
    }
    assert.equal(at(await inspect(id), "State", "Dead"), true);
    assert.equal((await observe(key))?.state, "created");
    await containers.discard(key, signal);
    assert.equal(await observe(key), undefined);
    await containers.remove(key, signal);
  });

  it("ends containers that the engine has forgotten, its own alone", async () => {
    const elsewhere = make({ workspaceFolder: join(engine.folder, "workspaces-of-another"), nodeId: newId("nod") });
    const [forgotten, known] = [await run(spec("sleep 1000")), await run(spec("sleep 1000"))];
    const others = newKey();
    const othersId = await prepare(others, spec("sleep 1000"), elsewhere);
    await elsewhere.start(others, signal);
    await engine.kill();
    for (const id of [forgotten.id, othersId])
      await rm(join(engine.folder, "data", "containers", id), { recursive: true });
    await engine.startDaemon();
    assert.equal((await processesOf(forgotten.id)).length, 1, "what the engine does not know runs on");
    // It made none of them itself: what it finds, it finds by the workspace.
    assert.equal(await make().clearStrays(signal), 1);
    await eventually(5000, async () => assert.deepEqual(await processesOf(forgotten.id), []));
    assert.equal((await processesOf(known.id)).length, 1);
    assert.equal((await processesOf(othersId)).length, 1);
    assert.equal(await elsewhere.clearStrays(signal), 1);
    assert.equal((await make().clearStrays(signal)) + (await elsewhere.clearStrays(signal)), 0);
    await containers.remove(known, signal);
    for (const one of [make(), elsewhere]) await one.sweepNetworks(signal);
  });

  it("removes containers with its label that name no attempt", async () => {
    await callEngine(engine.socketPath, {
      method: "POST",
      path: "/containers/create",
      body: { Image: image, Labels: { [containerLabels.nodeId]: nodeId, [containerLabels.instanceId]: "ins_" } },
    });
    assert.equal(await containers.removeNameless(signal), 1);
    assert.equal(await containers.removeNameless(signal), 0);
  });
});
