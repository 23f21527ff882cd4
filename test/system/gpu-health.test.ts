// A GPU falls ill while it is used: who sees it, what is placed where, and what comes of those who wait.
import assert from "node:assert/strict";
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { ClodeiError, GpuHealth, type InstanceHandle, InstanceReason, type Node, type RunSpec } from "@clodei/sdk";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { FakeNvidia } from "../harness/nvidia-smi.ts";
import { madrid, testImage, TestSystem } from "../harness/system.ts";

const lisbon = { country: "PT", region: "lisbon", datacenter: "tejo-1", tier: 3 } as const;
const patienceMs = 60_000;
/** The tools are asked often, so that a test takes seconds. */
const env = { CLODEI_INVENTORY_INTERVAL_MS: "300" };

/** Runs until it is stopped, or until somebody makes the file "fail" in its workspace. */
const script = "while [ ! -e /workspace/fail ]; do sleep 0.1; done; rm /workspace/fail; exit 1";

function spec(count: number, country: string, more: Partial<RunSpec> = {}): RunSpec {
  return {
    image: testImage,
    command: ["sh", "-c", script],
    cpuMillis: 100,
    memoryMib: 32,
    stopGraceSeconds: 0,
    gpu: { model: "H100-SXM", count },
    location: { country },
    ...more,
  };
}

/** Each GPU of a node, with why it is not healthy; empty where it is. */
function healthOf(node: Node): string[] {
  return (node.inventory?.gpus ?? []).map(({ health, healthMessage }) =>
    health === GpuHealth.HEALTHY ? "" : healthMessage || "ill",
  );
}

async function reasonsOf(instance: InstanceHandle): Promise<InstanceReason[]> {
  return (await Array.fromAsync(instance.events())).map(({ reason }) => reason);
}

async function remove(...instances: readonly InstanceHandle[]): Promise<void> {
  await Promise.all(instances.map((instance) => instance.delete()));
  await Promise.all(instances.map((instance) => instance.waitUntilDeleted({ timeoutMs: patienceMs })));
}

/** Waits until the instance waits, and says so in these words. */
async function waitsFor(instance: InstanceHandle, words: RegExp): Promise<void> {
  await eventually(patienceMs, async () => {
    const { message } = await instance.refresh();
    assert.equal(instance.state, "PENDING");
    assert.match(message, words);
  });
}

describe("a GPU", { skip: engineUnavailable, timeout: 300_000 }, () => {
  const uuids = ["a", "b", "c"].map((letter) => `GPU-${letter.repeat(8)}-0000-4000-8000-000000000000`);
  const healthy = uuids.map((uuid) => ({ uuid }));
  /** The first one must be reset. */
  const oneIll = [{ uuid: uuids[0] ?? "", recoveryAction: "Drain and Reset" }, ...healthy.slice(1)];
  const words = "recovery action: Drain and Reset";
  let nvidia: FakeNvidia;
  let healthFile: string;
  let system: TestSystem;
  let nodeId: string;
  let nodeEnv: Readonly<Record<string, string>>;

  before(async () => {
    nvidia = await FakeNvidia.make();
    await nvidia.tell(healthy);
    nodeEnv = { ...env, CLODEI_NVIDIA_SMI: nvidia.tool };
    system = await TestSystem.start({ engine: { prelude: nvidia.prelude } });
    ({ nodeId } = await system.addAgent({ name: "mad-1", location: madrid, env: nodeEnv }));
    healthFile = join(system.folder, "gpu-health.json");
    const health = { CLODEI_SIMULATED_GPU_HEALTH: healthFile };
    await system.addAgent({ name: "lis-1", location: lisbon, simulateGpus: "2xH100-SXM", env: { ...env, ...health } });
  });
  after(async () => {
    await system[Symbol.asyncDispose]();
    await nvidia[Symbol.asyncDispose]();
  });

  test("that falls ill is shown to operator and customer in the tool's words; its siblings are placed on, it is not", async () => {
    const holder = await system.client.instances.run(spec(1, "ES"));
    const [own] = (await holder.waitUntilRunning({ timeoutMs: patienceMs })).gpus;
    assert.equal(own?.uuid, uuids[0]);
    const stop = new AbortController();
    const watched = (async () => {
      for await (const event of system.operator.nodes.watch({ signal: stop.signal })) {
        if (event.type === "change" && healthOf(event.value).join() === [words, "", ""].join()) return event.value.id;
      }
      return undefined;
    })();
    await nvidia.tell(oneIll);

    // The operator.
    const timer = setTimeout(() => stop.abort(), patienceMs);
    assert.equal(await watched, nodeId);
    clearTimeout(timer);
    assert.deepEqual(healthOf(await system.operator.nodes.get(nodeId)), [words, "", ""]);
    const listed = (await Array.fromAsync(system.operator.nodes.list())).find(({ id }) => id === nodeId);
    assert.deepEqual(listed && healthOf(listed), [words, "", ""]);

    // The customer whose instance holds it.
    await eventually(patienceMs, async () => {
      const { gpus } = await holder.refresh();
      assert.deepEqual(
        gpus.map(({ health, healthMessage }) => [health, healthMessage]),
        [[GpuHealth.UNHEALTHY, words]],
      );
    });
    assert.equal(holder.state, "RUNNING");
    const event = (await Array.fromAsync(holder.events())).find(
      ({ reason }) => reason === InstanceReason.GPU_UNHEALTHY,
    );
    assert.equal(event?.message, `${own?.uuid} is unhealthy: ${words}. What runs goes on.`);

    // Who comes later: the siblings are given, the ill one is not, free or not.
    const siblings = await system.client.instances.run(spec(2, "ES"));
    const given = (await siblings.waitUntilRunning({ timeoutMs: patienceMs })).gpus.map(({ uuid }) => uuid);
    assert.deepEqual(given.toSorted(), uuids.slice(1));
    await remove(holder);
    const waiting = await system.client.instances.run(spec(1, "ES"));
    await waitsFor(
      waiting,
      /no node .* has that much free now; the largest node there has 3 x H100-SXM in all, 1 of them unhealthy/,
    );
    const whole = await system.client.instances.run(spec(3, "ES"));
    await waitsFor(
      whole,
      /no node .* has that many healthy GPUs now; .* 3 x H100-SXM in all, 1 of them unhealthy; waiting/,
    );
    await remove(whole);

    // Well again: it is given to who waits.
    await nvidia.tell(healthy);
    const { gpus } = await waiting.waitUntilRunning({ timeoutMs: patienceMs });
    assert.deepEqual([gpus[0]?.uuid, gpus[0]?.health], [uuids[0], GpuHealth.HEALTHY]);
    await remove(waiting, siblings);
  });

  test("that is lost, alone or with the whole tool, stays visible with the reason, and comes back", async () => {
    const holder = await system.client.instances.run(spec(3, "ES"));
    await holder.waitUntilRunning({ timeoutMs: patienceMs });
    const shown = async (expected: readonly string[]): Promise<void> => {
      await eventually(patienceMs, async () => {
        const byUuid = new Map((await holder.refresh()).gpus.map((gpu) => [gpu.uuid, gpu.healthMessage]));
        assert.deepEqual(
          uuids.map((uuid) => byUuid.get(uuid)),
          expected,
        );
        const node = await system.operator.nodes.get(nodeId);
        const told = new Map((node.inventory?.gpus ?? []).map((gpu) => [gpu.uuid, gpu.healthMessage]));
        assert.deepEqual(
          uuids.map((uuid) => told.get(uuid)),
          expected,
        );
      });
    };
    await nvidia.tell(healthy.slice(1));
    await shown(["the driver's tool no longer tells of it", "", ""]);
    await nvidia.fail("Failed to initialize NVML: Driver/library version mismatch", 18);
    const failure = (await eventually(patienceMs, async () => {
      const { inventory } = await system.operator.nodes.get(nodeId);
      assert.match(inventory?.gpuError ?? "", /Driver\/library version mismatch/);
      return inventory;
    })) ?? { gpuError: "" };
    await shown([failure.gpuError, failure.gpuError, failure.gpuError]);
    assert.equal(holder.state, "RUNNING");
    await nvidia.tell(healthy);
    await shown(["", "", ""]);
    const told = (await reasonsOf(holder)).filter(
      (reason) => reason === InstanceReason.GPU_UNHEALTHY || reason === InstanceReason.GPU_RECOVERED,
    );
    const { GPU_UNHEALTHY, GPU_RECOVERED } = InstanceReason;
    assert.deepEqual(told, [GPU_UNHEALTHY, GPU_UNHEALTHY, GPU_RECOVERED]);
    await remove(holder);
  });

  test("that two nodes report is told on both, and given once", async () => {
    const other = await system.addAgent({ name: "mad-2", env: nodeEnv });
    const message = async (id: string): Promise<string> => (await system.operator.nodes.get(id)).message;
    await eventually(patienceMs, async () => {
      assert.match(await message(nodeId), /reported by other nodes as well: GPU-a[^;]*\(by mad-2\), GPU-b/);
      assert.match(await message(other.nodeId), /reported by other nodes as well: GPU-a[^;]*\(by mad-1\), GPU-b/);
    });
    const all = await system.client.instances.run(spec(3, "ES"));
    await all.waitUntilRunning({ timeoutMs: patienceMs });
    const second = await system.client.instances.run(spec(1, "ES"));
    await waitsFor(second, /no node .* has that much free now/);
    await remove(second, all);
    await system.operator.nodes.revoke(other.nodeId);
    await eventually(patienceMs, async () => assert.equal(await message(nodeId), ""));
  });

  test("that is simulated and falls ill is not given to the next attempt of a restart policy; the sibling is", async () => {
    const instance = await system.client.instances.run(spec(1, "PT", { restartPolicy: "ON_FAILURE" }));
    const first = await instance.waitUntilRunning({ timeoutMs: patienceMs });
    const { nodeId: lisbonId } = system.agent("lis-1");
    const [own] = first.gpus;
    const index = (await system.operator.nodes.get(lisbonId)).inventory?.gpus.findIndex(
      ({ uuid }) => uuid === own?.uuid,
    );
    await writeFile(healthFile, JSON.stringify({ [index ?? 0]: "GPU is lost" }));
    await eventually(patienceMs, async () => {
      const { gpus } = await instance.refresh();
      assert.deepEqual(
        gpus.map(({ uuid, health, healthMessage }) => [uuid, health, healthMessage]),
        [[own?.uuid, GpuHealth.UNHEALTHY, "simulated: GPU is lost"]],
      );
    });
    assert.equal(instance.state, "RUNNING", "what runs goes on");
    await writeFile(join(system.agent("lis-1").workspaceOf(instance), "fail"), "");
    await eventually(patienceMs, async () => {
      const again = await instance.refresh();
      assert.deepEqual([again.attempt, instance.state, again.gpus.length], [2, "RUNNING", 1]);
      assert.notEqual(again.gpus[0]?.uuid, own?.uuid);
      assert.equal(again.gpus[0]?.health, GpuHealth.HEALTHY);
    });
    assert.ok((await reasonsOf(instance)).includes(InstanceReason.GPU_UNHEALTHY));
    await remove(instance);
    await rm(healthFile);
    await eventually(patienceMs, async () =>
      assert.deepEqual(healthOf(await system.operator.nodes.get(lisbonId)), ["", ""]),
    );
  });

  test("on a cordoned node is told from one that is nowhere, and a place without jurisdiction is refused at once", async () => {
    const { nodeId: lisbonId } = system.agent("lis-1");
    await system.operator.nodes.cordon(lisbonId);
    const waiting = await system.client.instances.run(spec(2, "PT"));
    await waitsFor(waiting, /what would fit in PT takes no new instances now \(1 under maintenance\)/);
    const impossible = await system.client.instances.run(spec(3, "PT"));
    await waitsFor(impossible, /no node in PT has that many; the largest has 2 x H100-SXM/);
    await assert.rejects(system.client.instances.run(spec(1, "US")), (error) => {
      assert.ok(error instanceof ClodeiError);
      assert.equal(error.reason, "LOCATION_NOT_ALLOWED");
      assert.deepEqual(
        error.fieldViolations.map(({ field }) => field),
        ["spec.location.country"],
      );
      return true;
    });
    await system.operator.nodes.uncordon(lisbonId);
    await waiting.waitUntilRunning({ timeoutMs: patienceMs });
    await remove(waiting, impossible);
  });
});
