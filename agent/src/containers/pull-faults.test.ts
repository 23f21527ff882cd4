import assert from "node:assert/strict";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { PullPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { newId } from "@clodei/proto/ids";
import { registryUnavailable, startTestEngine } from "../../../test/harness/engine.ts";
import { FaultyRegistry } from "../../../test/harness/faulty-registry.ts";
import { startRegistry, type TestRegistry } from "../../../test/harness/registry.ts";
import type { PrivateEngine } from "../../../tools/engine/private-engine.ts";
import { EngineError } from "./engine-error.ts";
import { ContainerEngine } from "./engine.ts";
import type { LocalImage } from "./images.ts";
import type { PullBytes } from "./pull-progress.ts";

const signal = new AbortController().signal;
const smallBytes = 1_500_000;
const largeBytes = 5_000_000;
/** Meets the large layer alone. */
const leastBytes = 4_000_000;

describe("pulls over a bad network", { skip: registryUnavailable, concurrency: true }, () => {
  let engine: PrivateEngine;
  let registry: TestRegistry;
  let network: FaultyRegistry;

  before(async () => {
    // Docker tries again five times, with pauses of 5, 10, 15 … seconds: once is enough here.
    engine = await startTestEngine({ daemonArguments: ["--max-download-attempts", "1"] });
    registry = await startRegistry(engine);
    network = await FaultyRegistry.start(engine, registry);
  });
  after(async () => {
    await network[Symbol.asyncDispose]();
    await engine.close();
  });

  async function push(name: string): Promise<string> {
    const reference = await registry.pushLayers(name, [smallBytes, largeBytes]);
    return reference.replace(registry.host, network.host);
  }

  async function pull(
    image: string,
    pullSilenceMs?: number,
  ): Promise<{ readonly image: LocalImage; readonly seen: readonly PullBytes[] }> {
    const seen: PullBytes[] = [];
    const containers = new ContainerEngine({
      socketPath: engine.socketPath,
      nodeId: newId("nod"),
      workspaceFolder: join(engine.folder, "workspaces"),
      simulatedGpus: new Set(),
      ...(pullSilenceMs === undefined ? {} : { pullSilenceMs }),
    });
    const pulled = await containers.ensureImage(image, PullPolicy.ALWAYS, (bytes) => seen.push(bytes), signal);
    return { image: pulled, seen };
  }

  async function failure(image: string, pullSilenceMs?: number): Promise<EngineError> {
    const error: unknown = await pull(image, pullSilenceMs).then(
      () => assert.fail("the pull succeeds"),
      (reason: unknown) => reason,
    );
    assert.ok(error instanceof EngineError, String(error));
    assert.ok(error.message.startsWith(image.slice(network.host.length + 1)), error.message);
    return error;
  }

  /** The answers that brought layers. */
  async function layers(name: string) {
    return (await network.answers(name)).filter(({ path, bytes }) => path.includes("/blobs/") && bytes > 1_200_000);
  }

  it("a slow one is told step by step", async () => {
    const image = await push("team/slow");
    await network.break("team/slow", { kind: "slow", bytesPerSecond: 3_000_000 });
    const { seen } = await pull(image);
    const steps = new Set(seen.filter(({ bytesDone }) => bytesDone > 0).map(({ bytesDone }) => bytesDone));
    assert.ok(steps.size >= 3, JSON.stringify(seen));
    assert.deepEqual(seen.at(0), { bytesDone: 0, bytesTotal: 0 });
  });

  it("one that is cut goes on in the middle of the layer, and fetches no layer again", async () => {
    const image = await push("team/cut");
    const afterBytes = 3_000_000;
    await network.break("team/cut", { kind: "cut", afterBytes, leastBytes, times: 1 });
    const { seen } = await pull(image);
    const answers = await layers("team/cut");
    const byPath = Object.values(Object.groupBy(answers, ({ path }) => path)).map((group = []) => group);
    assert.deepEqual(
      byPath.map((group) => group.length).toSorted((a, b) => a - b),
      [1, 2],
      JSON.stringify(answers),
    );
    const [broken, rest] = byPath.find((group) => group.length === 2) ?? [];
    assert.deepEqual([broken?.range, broken?.status, rest?.status], [undefined, 200, 206]);
    // What was on its way when the connection broke may come twice, and nothing that had arrived.
    const from = Number(/^bytes=([0-9]+)-$/.exec(rest?.range ?? "")?.[1]);
    assert.ok(from > 0 && from <= afterBytes, rest?.range);
    assert.ok((rest?.bytes ?? 0) < largeBytes, `${rest?.bytes}`);
    for (const [index, bytes] of seen.entries()) {
      assert.ok(bytes.bytesDone <= bytes.bytesTotal);
      assert.ok(bytes.bytesDone >= (seen[index - 1]?.bytesDone ?? 0));
    }
    const total = seen.at(-1)?.bytesTotal ?? 0;
    assert.ok(total >= smallBytes + largeBytes && total < smallBytes + largeBytes + 2_000_000, `${total}`);
  });

  it("one that is cut again and again fails with that reason, and can be had once the network is well", async () => {
    const image = await push("team/broken");
    await network.break("team/broken", { kind: "cut", afterBytes: 1_000_000, leastBytes });
    const error = await failure(image);
    assert.equal(error.kind, "interrupted");
    assert.match(error.message, /the connection to the registry broke again and again/);
    await network.break("team/broken");
    assert.match((await pull(image)).image.digest ?? "", /^sha256:/);
  });

  it("one that goes silent is given up", async () => {
    const image = await push("team/silent");
    await network.break("team/silent", { kind: "stall", afterBytes: 1_000_000, leastBytes });
    const error = await failure(image, 3000);
    assert.equal(error.kind, "stalled");
    assert.match(error.message, /nothing came for 3 seconds/);
  });

  it("a layer, a configuration or a manifest that is not what its digest says is refused", async () => {
    const image = await push("team/damaged");
    const damaged = async (reference: string): Promise<void> => {
      assert.equal((await failure(reference)).kind, "damaged");
    };
    await network.break("team/damaged", { kind: "damage", leastBytes });
    await damaged(image);
    await network.break("team/damaged", { kind: "damage", times: 1 });
    await damaged(image);
    // Docker keeps a manifest that it has checked: this one is new to it. By its tag it is what the registry says it is,
    // and names a layer that nobody has.
    await network.break("team/other", { kind: "damage", of: "manifests" });
    const other = await push("team/other");
    await damaged(other);
    const digest = (await network.answers("team/other")).map(({ path }) => /sha256:[0-9a-f]{64}$/.exec(path)?.[0])[0];
    const pinned = other.replace(/:latest$/, `@${digest}`);
    await damaged(pinned);
    await network.break("team/other");
    assert.equal((await pull(pinned)).image.digest, digest);
  });
});
