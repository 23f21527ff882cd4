// Images from a real registry, as a customer meets them: progress, and for each thing that goes wrong a reason of its own.
import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { defaultImageAllowlist } from "@clodei/proto/image-reference";
import { InstanceEndedError, type InstanceHandle, type RunSpec } from "@clodei/sdk";
import { registryUnavailable } from "../harness/engine.ts";
import { FaultyRegistry } from "../harness/faulty-registry.ts";
import { startRegistry, type TestRegistry } from "../harness/registry.ts";
import { TestSystem } from "../harness/system.ts";

const lisbon = { country: "PT", region: "lisbon", datacenter: "tejo-1", tier: 3 } as const;
const paris = { country: "FR", region: "paris", datacenter: "seine-2", tier: 3 } as const;
const credentials = { username: "node", password: "colon:and space" };
const smallBytes = 1_500_000;
const largeBytes = 5_000_000;
/** Meets the large layer alone. */
const leastBytes = 4_000_000;
const patienceMs = 120_000;
const away = "127.0.0.1:5999";
const allowlist = [...defaultImageAllowlist, "127.0.0.1:5000/", "127.0.0.1:5001/", "127.0.0.1:5100/", `${away}/`];
const env = { CLODEI_IMAGE_ALLOWLIST: allowlist.join(",") };

describe("images from a registry", { skip: registryUnavailable, timeout: 300_000, concurrency: true }, () => {
  let system: TestSystem;
  let open: TestRegistry;
  let closed: TestRegistry;
  let network: FaultyRegistry;

  before(async () => {
    // Docker tries again five times, with pauses of 5, 10, 15 … seconds: once is enough here.
    const engine = { daemonArguments: ["--max-download-attempts", "1"] };
    system = await TestSystem.start({ engine, controlPlaneEnv: env });
    open = await startRegistry(system.engine);
    closed = await startRegistry(system.engine, { port: 5001, credentials });
    network = await FaultyRegistry.start(system.engine, open);
    const authFile = join(system.folder, "config.json");
    const auth = Buffer.from(`${credentials.username}:${credentials.password}`).toString("base64");
    await writeFile(authFile, JSON.stringify({ auths: { [closed.host]: { auth } } }));
    await system.addAgent({ name: "mad-1", env });
    await system.addAgent({ name: "par-1", location: paris, env: { ...env, CLODEI_PULL_SILENCE_MS: "4000" } });
    await system.addAgent({ name: "lis-1", location: lisbon, env: { ...env, CLODEI_REGISTRY_AUTH_FILE: authFile } });
  });
  after(async () => {
    await network[Symbol.asyncDispose]();
    await system[Symbol.asyncDispose]();
  });

  /** Runs an image where no credentials are, if not elsewhere. */
  const run = (image: string, country = "ES"): Promise<InstanceHandle> => {
    const command = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"];
    const size = { cpuMillis: 50, memoryMib: 16, stopGraceSeconds: 1 };
    const spec: RunSpec = { image, command, ...size, pullPolicy: "ALWAYS", location: { country } };
    return system.client.instances.run(spec);
  };

  const push = async (name: string): Promise<string> => {
    const reference = await open.pushLayers(name, [smallBytes, largeBytes]);
    return reference.replace(open.host, network.host);
  };

  test("a slow pull by tag shows how far it is, and the same image is there by its digest", async () => {
    const image = await push("team/slow");
    await network.break("team/slow", { kind: "slow", bytesPerSecond: 4_000_000, leastBytes });
    const instance = await run(image);
    const seen: { readonly done: bigint; readonly total: bigint }[] = [];
    for await (const event of system.client.instances.watch()) {
      if (event.type === "bookmark" || event.type === "reset" || event.value.id !== instance.id) continue;
      const { pullProgress } = event.value;
      if (pullProgress !== undefined) seen.push({ done: pullProgress.bytesDone, total: pullProgress.bytesTotal });
      await instance.refresh();
      assert.notEqual(instance.state, "FAILED", instance.instance.message);
      if (event.value.startTime !== undefined) break;
    }
    const between = seen.filter(({ done, total }) => done > 0n && done < total);
    assert.ok(between.length > 0, `no progress on the way: ${seen.map(({ done }) => done).join(", ")}`);
    for (const [index, { done }] of seen.entries()) assert.ok(done >= (seen[index - 1]?.done ?? 0n));
    const { imageDigest, imageId } = await instance.waitUntilRunning({ timeoutMs: patienceMs });
    assert.match(imageDigest, /^sha256:[0-9a-f]{64}$/);
    const states = (await Array.fromAsync(instance.events())).map(({ state }) => state);
    assert.equal(new Set(states).size, states.length, "progress is no event");

    const pinned = await run(image.replace(/:latest$/, `@${imageDigest}`));
    const running = await pinned.waitUntilRunning({ timeoutMs: patienceMs });
    assert.deepEqual([running.imageDigest, running.imageId], [imageDigest, imageId]);
    await Promise.all([instance.delete(), pinned.delete()]);
  });

  test("a pull that is cut goes on in the middle of the layer", async () => {
    const image = await push("team/cut");
    await network.break("team/cut", { kind: "cut", afterBytes: 3_000_000, leastBytes, times: 1 });
    const instance = await run(image);
    await instance.waitUntilRunning({ timeoutMs: patienceMs });
    const answers = await network.answers("team/cut");
    const blobs = answers.filter(({ path }) => path.includes("/blobs/"));
    const resumed = blobs.filter(({ status }) => status === 206);
    assert.equal(resumed.length, 1, JSON.stringify(answers));
    assert.match(resumed[0]?.range ?? "", /^bytes=[1-9][0-9]*-$/);
    assert.equal(new Set(blobs.map(({ path }) => path)).size, blobs.length - 1, "nothing else is fetched twice");
    await instance.delete();
  });

  test("a registry that asks for credentials gives to the node that has them", async () => {
    const image = await closed.pushLayers("team/closed", [1000]);
    const refused = await run(image);
    const why = await refused.waitUntilStopped({ timeoutMs: patienceMs });
    assert.equal(refused.reason, "PULL_UNAUTHORIZED", why.message);
    assert.ok(!why.message.includes(credentials.password));
    const instance = await run(image, "PT");
    await instance.waitUntilRunning({ timeoutMs: patienceMs });
    await instance.delete();
  });

  test("each failure has a reason of its own, and a message that names image and registry", async () => {
    const damaged = await push("team/damaged");
    await network.break("team/damaged", { kind: "damage", leastBytes });
    const broken = await push("team/broken");
    await network.break("team/broken", { kind: "cut", afterBytes: 1_000_000, leastBytes });
    const silent = await push("team/silent");
    await network.break("team/silent", { kind: "stall", afterBytes: 1_000_000, leastBytes });
    const failures = [
      [damaged, "IMAGE_DAMAGED"],
      [broken, "PULL_INTERRUPTED"],
      [silent, "PULL_STALLED"],
      [`${network.host}/team/silent:none`, "IMAGE_NOT_FOUND"],
      [`${network.host}/team/none`, "IMAGE_NOT_FOUND"],
      [`${network.host}/team/none@sha256:${"0".repeat(64)}`, "IMAGE_NOT_FOUND"],
      [`${away}/team/any`, "REGISTRY_UNREACHABLE"],
    ] as const;
    const ends = failures.map(async ([image, reason]) => {
      const instance = await run(image, reason === "PULL_STALLED" ? "FR" : "ES");
      await assert.rejects(instance.waitUntilRunning({ timeoutMs: patienceMs }), (error) => {
        assert.ok(error instanceof InstanceEndedError, String(error));
        assert.equal(error.instanceReason, reason, error.message);
        return true;
      });
      const { message } = instance.instance;
      const [registry = "", name = ""] = image.split(/\/(?=team)|[:@](?=latest|none$|sha256)/);
      assert.ok(message.includes(registry) && message.includes(name), message);
    });
    await Promise.all(ends);
  });
});
