// Invariants of the architecture about what runs on a node: 5, 6 and 7, as the engine and the kernel see it.
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { InstanceReason, InstanceState } from "@clodei/sdk";
import { containerLabels, containerName } from "@clodei/proto/node-link";
import { parseId } from "@clodei/proto/ids";
import { callEngine, callEngineJson, EngineCallError } from "../../tools/engine/api.ts";
import {
  inspectContainer,
  listContainers,
  listNetworks,
  networkOf,
  processesOf,
  processStatus,
} from "../harness/containers.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { testImage, TestSystem } from "../harness/system.ts";

const mib = 1024 * 1024;
/** Far longer than one round of an agent's reconciliation. */
const patienceMs = 60_000;

describe("what runs on a node", { skip: engineUnavailable, timeout: 240_000 }, () => {
  let system: TestSystem;
  before(async () => {
    system = await TestSystem.start({ agents: [{ name: "mad-1", simulateGpus: "4xH100-SXM" }] });
  });
  after(async () => {
    await system[Symbol.asyncDispose]();
  });

  const sleeper = { image: testImage, cpuMillis: 250, memoryMib: 64, stopGraceSeconds: 1 } as const;

  test("invariant 5: a container that runs carries exactly the spec that was validated, and its isolation was read back", async () => {
    const instance = await system.client.instances.run({
      ...sleeper,
      command: ["sh", "-c"],
      args: ["sleep 300 & sleep 300"],
      env: { GREETING: "hello = world", EMPTY: "" },
      gpu: { model: "H100-SXM", count: 2 },
    });
    await instance.waitUntilRunning({ timeoutMs: 30_000 });
    const [listed, ...others] = await listContainers(system.engine, instance.id);
    assert.ok(listed);
    assert.equal(others.length, 0);
    const container = await inspectContainer(system.engine, listed.Id);
    const { HostConfig: host, Config: config } = container;

    assert.equal(container.Image, instance.instance.imageId);
    assert.deepEqual(config.Entrypoint, ["sh", "-c"]);
    assert.deepEqual(config.Cmd, ["sleep 300 & sleep 300"]);
    const environment = config.Env.filter((entry) => !entry.startsWith("PATH="));
    assert.deepEqual(environment.toSorted(), ["EMPTY=", "GREETING=hello = world", "NVIDIA_VISIBLE_DEVICES=void"]);
    assert.equal(host["Memory"], 64 * mib);
    assert.equal(host["MemorySwap"], 64 * mib);
    assert.equal(host["NanoCpus"], 250_000_000);
    assert.equal(host["Privileged"], false);
    assert.deepEqual(host["CapDrop"], ["ALL"]);
    assert.deepEqual(host["CapAdd"] ?? [], []);
    assert.deepEqual(host["SecurityOpt"], ["no-new-privileges"]);
    assert.deepEqual(host["Devices"] ?? [], []);
    assert.deepEqual(host["DeviceRequests"] ?? [], [], "a simulated GPU asks for no device");
    assert.equal(host["IpcMode"], "private");
    assert.equal(host["PidMode"], "");
    assert.deepEqual(host["RestartPolicy"], { Name: "no", MaximumRetryCount: 0 });
    assert.ok(Number(host["PidsLimit"]) > 0);
    assert.deepEqual(
      container.Mounts.map((mount) => mount.Destination),
      ["/workspace"],
    );
    assert.deepEqual(Object.keys(container.NetworkSettings.Networks), [host["NetworkMode"]]);
    const neighbors = (await listContainers(system.engine)).filter(({ Id }) => Id !== listed.Id);
    for (const { Id } of neighbors) {
      const { HostConfig: theirs } = await inspectContainer(system.engine, Id);
      assert.notEqual(theirs["NetworkMode"], host["NetworkMode"]);
    }

    const pids = await processesOf(listed.Id);
    assert.ok(pids.length >= 2, "the shell and what it started");
    for (const pid of pids) {
      const status = await processStatus(pid);
      assert.equal(BigInt(`0x${status.get("CapEff")}`), 0n);
      assert.equal(BigInt(`0x${status.get("CapBnd")}`), 0n);
      assert.equal(status.get("NoNewPrivs"), "1");
      assert.equal(status.get("Seccomp"), "2");
    }
    await instance.delete();
    await instance.waitUntilDeleted({ timeoutMs: 30_000 });
  });

  test("invariant 6: no container runs that the control plane does not know, longer than one reconciliation", async () => {
    const { nodeId } = system.agent("mad-1");
    const stranger = parseId("ins", "ins_01h455vb4pex5vsknk084sn02q");
    assert.ok(stranger);
    const created = (await callEngineJson(system.engine.socketPath, {
      method: "POST",
      path: "/containers/create",
      query: { name: containerName(stranger, 1) },
      body: {
        Image: testImage,
        Cmd: ["sleep", "300"],
        Labels: {
          [containerLabels.nodeId]: nodeId,
          [containerLabels.instanceId]: stranger,
          [containerLabels.attempt]: "1",
          [containerLabels.generation]: "1",
        },
      },
    })) as { Id: string };
    // Another node's on the same engine: not this agent's to touch.
    const neighbor = (await callEngineJson(system.engine.socketPath, {
      method: "POST",
      path: "/containers/create",
      query: { name: "neighbor" },
      body: {
        Image: testImage,
        Cmd: ["sleep", "300"],
        Labels: { [containerLabels.nodeId]: "nod_01h455vb4pex5vsknk084sn02q", [containerLabels.instanceId]: stranger },
      },
    })) as { Id: string };
    const start = (id: string) =>
      callEngine(system.engine.socketPath, { method: "POST", path: `/containers/${id}/start` });
    await start(neighbor.Id);
    await start(created.Id).catch((error: unknown) => {
      // The agent was quicker.
      assert.ok(error instanceof EngineCallError && (error.status === 404 || error.status === 409), String(error));
    });
    await eventually(patienceMs, async () => {
      const ids = (await listContainers(system.engine)).map((container) => container.Id);
      assert.ok(!ids.includes(created.Id), "the stranger is still there");
    });
    const left = (await listContainers(system.engine)).find((container) => container.Id === neighbor.Id);
    assert.equal(left?.State, "running");
    const removal = { method: "DELETE", path: `/containers/${neighbor.Id}`, query: { force: "1" } } as const;
    await callEngine(system.engine.socketPath, removal);
  });

  test("invariant 7: a stopped or deleted instance has no container once its node is reachable", async () => {
    const [stopped, deleted] = await Promise.all([
      system.client.instances.run({ ...sleeper, command: ["sleep", "300"] }),
      system.client.instances.run({ ...sleeper, command: ["sleep", "300"] }),
    ]);
    await Promise.all([
      stopped.waitUntilRunning({ timeoutMs: 30_000 }),
      deleted.waitUntilRunning({ timeoutMs: 30_000 }),
    ]);
    const networks = await Promise.all([stopped, deleted].map(({ id }) => networkOf(system.engine, id)));
    const agent = system.agent("mad-1");
    await agent.kill();
    await stopped.stop();
    await deleted.delete();
    assert.equal(
      (await listContainers(system.engine, stopped.id)).length,
      1,
      "the node is away: the container goes on",
    );
    await eventually(patienceMs, async () => assert.equal((await stopped.refresh()).nodeReachable, false));

    await agent.start();
    assert.equal((await stopped.waitUntilStopped({ timeoutMs: 30_000 })).reason, InstanceReason.STOPPED_BY_REQUEST);
    assert.equal((await deleted.waitUntilDeleted({ timeoutMs: 30_000 })).state, InstanceState.DELETED);
    await eventually(patienceMs, async () => {
      assert.deepEqual(await listContainers(system.engine, stopped.id), []);
      assert.deepEqual(await listContainers(system.engine, deleted.id), []);
      const left = await listNetworks(system.engine);
      assert.ok(!networks.some((name) => left.includes(name)));
    });
    await stopped.delete();
  });
});
