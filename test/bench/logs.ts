// A container's output on its way through agent, control plane and SDK, against the same output followed by Docker's own
// API: from the first byte to the last, while the container writes as fast as the engine takes it. And what agent and
// control plane keep for a reader that stopped reading.
import { chmod, mkdir, rename, stat, writeFile } from "node:fs/promises";
import { request } from "node:http";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { InstanceHandle } from "@clodei/sdk";
import { callEngine } from "../../tools/engine/api.ts";
import { inspectContainer, listContainers } from "../harness/containers.ts";
import { testImage, TestSystem } from "../harness/system.ts";
import { createContainer, removeContainer } from "./engine-calls.ts";
import { type Figure, quantile, rounded } from "./figures.ts";
import { rssMib } from "./process-usage.ts";
import { buildForProduction, productionEnv } from "./production.ts";

const bytesPerMib = 1024 * 1024;
/** With the engine's 30 bytes for each line it is in one file of 32 MiB: past it, Docker's own API loses output. */
const burstMib = 24;
const lineBytes = 128;
const rounds = 5;
const throughputGoal = 0.5;
/** What is written while nobody reads is many times as much as this. */
const stalledBursts = 8;
const growthGoalMib = 16;
const agentName = "mad-1";
const wait = { timeoutMs: 120_000 } as const;

const burst = Buffer.from(`${"x".repeat(lineBytes - 1)}\n`.repeat((burstMib * bytesPerMib) / lineBytes));

/** Waits for each file that lets a burst go, writes the burst, and says that it did. */
function script(bursts: number): string {
  const one = `while [ ! -e go$i ]; do sleep 0.05; done; cat burst; touch done$i`;
  return `cd /workspace; i=0; while [ $i -lt ${bursts} ]; do ${one}; i=$((i+1)); done`;
}

async function go(workspace: string, index: number): Promise<void> {
  await writeFile(join(workspace, `go${index}`), "");
}

/** Writes the burst whole: the container sees it from the first byte to the last, or not at all. */
async function layBurst(workspace: string): Promise<void> {
  const path = join(workspace, "burst");
  await writeFile(`${path}.part`, burst);
  await chmod(`${path}.part`, 0o644);
  await rename(`${path}.part`, path);
}

/** Measures bytes that come, from the first to the last. */
class Meter {
  #firstMs = 0;
  #lastMs = 0;
  bytes = 0;

  take(bytes: number): void {
    this.#lastMs = performance.now();
    if (this.bytes === 0) this.#firstMs = this.#lastMs;
    this.bytes += bytes;
  }

  get mibPerSecond(): number {
    if (this.bytes !== burst.length) throw new Error(`${this.bytes} bytes of ${burst.length} came`);
    return burstMib / ((this.#lastMs - this.#firstMs) / 1000);
  }
}

async function run(system: TestSystem, bursts: number): Promise<{ instance: InstanceHandle; workspace: string }> {
  const command = ["sh", "-c", script(bursts)];
  const spec = { image: testImage, command, cpuMillis: 1000, memoryMib: 256, stopGraceSeconds: 0 };
  const instance = await system.client.instances.run(spec);
  await instance.waitUntilRunning(wait);
  const workspace = system.agent(agentName).workspaceOf(instance);
  await layBurst(workspace);
  return { instance, workspace };
}

async function remove(instance: InstanceHandle): Promise<void> {
  await instance.delete();
  await instance.waitUntilDeleted(wait);
}

/** One burst through all of ours. */
async function followOurs(system: TestSystem): Promise<number> {
  const { instance, workspace } = await run(system, 1);
  const meter = new Meter();
  const following = (async () => {
    for await (const { data } of instance.logs()) meter.take(data.length);
  })();
  // The stream stands before the first byte.
  await sleep(500);
  await go(workspace, 0);
  await following;
  await remove(instance);
  return meter.mibPerSecond;
}

/** What of a container's settings decides how fast its output comes. */
interface ContainerShape {
  readonly Image: string;
  readonly HostConfig: Readonly<Record<"LogConfig" | "NanoCpus" | "Memory", unknown>>;
}

async function shapeOfOurs(system: TestSystem): Promise<ContainerShape> {
  const { instance, workspace } = await run(system, 1);
  const [listed] = await listContainers(system.engine, instance.id);
  if (listed === undefined) throw new Error("the instance has no container");
  const { Image, HostConfig } = await inspectContainer(system.engine, listed.Id);
  const { LogConfig, NanoCpus, Memory } = HostConfig;
  await go(workspace, 0);
  await remove(instance);
  if (NanoCpus === undefined || Memory === undefined) throw new Error("the container has no limits");
  return { Image, HostConfig: { LogConfig, NanoCpus, Memory } };
}

/** One burst by the engine's API alone, which is what `docker logs --follow` reads. */
async function followBare(system: TestSystem, shape: ContainerShape, round: number): Promise<number> {
  const workspace = join(system.folder, "bench", String(round));
  await mkdir(workspace, { recursive: true });
  await layBurst(workspace);
  const { socketPath } = system.engine;
  const containerId = await createContainer(socketPath, {
    Image: shape.Image,
    Cmd: ["sh", "-c", script(1)],
    HostConfig: { ...shape.HostConfig, NetworkMode: "none", Binds: [`${workspace}:/workspace`] },
  });
  await callEngine(socketPath, { method: "POST", path: `/containers/${containerId}/start` });
  const meter = new Meter();
  const following = readLogs(socketPath, containerId, meter);
  await sleep(500);
  await go(workspace, 0);
  await following;
  await removeContainer(socketPath, containerId);
  return meter.mibPerSecond;
}

/** The answer is frames: a header of 8 bytes, the last 4 of them the length, and output. */
function readLogs(socketPath: string, id: string, meter: Meter): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const path = `/containers/${id}/logs?follow=1&stdout=1&stderr=1`;
  request({ socketPath, path, headers: { host: "docker" }, agent: false }, (answer) => {
    let header = Buffer.alloc(0);
    let left = 0;
    answer.on("data", (data: Buffer) => {
      for (let at = 0; at < data.length;) {
        if (left === 0) {
          const missing = 8 - header.length;
          header = Buffer.concat([header, data.subarray(at, at + missing)]);
          at += missing;
          if (header.length < 8) return;
          left = header.readUInt32BE(4);
          header = Buffer.alloc(0);
          continue;
        }
        const taken = Math.min(left, data.length - at);
        meter.take(taken);
        left -= taken;
        at += taken;
      }
    });
    answer.on("end", resolve);
    answer.on("error", reject);
  })
    .on("error", reject)
    .end();
  return promise;
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

/** What both processes grew by while a reader of a hundred megabytes and more does not read them. */
async function growthBehindStalledReader(system: TestSystem): Promise<{ agentMib: number; controlPlaneMib: number }> {
  const { instance, workspace } = await run(system, stalledBursts);
  const pids = [system.agent(agentName).program.pid, system.controlPlane.program.pid];
  const reader = instance.logs()[Symbol.asyncIterator]();
  const first = reader.next();
  const seen: number[][] = [];
  for (let index = 0; index < stalledBursts; index++) {
    await go(workspace, index);
    // Read no further than the first piece.
    await first;
    while (!(await exists(join(workspace, `done${index}`)))) await sleep(50);
    seen.push(await restingRssMib(pids));
  }
  await reader.return?.();
  await remove(instance);
  const growth = (process: number): number => (seen.at(-1)?.[process] ?? Number.NaN) - (seen[0]?.[process] ?? 0);
  return { agentMib: growth(0), controlPlaneMib: growth(1) };
}

/** The least over some seconds: what was used for a moment has been given back. */
async function restingRssMib(pids: readonly number[]): Promise<number[]> {
  const samples: number[][] = [];
  for (let index = 0; index < 5; index++) {
    await sleep(1000);
    samples.push(await Promise.all(pids.map(rssMib)));
  }
  return pids.map((_pid, process) => Math.min(...samples.map((sample) => sample[process] ?? Number.NaN)));
}

/** Runs the bench. */
export async function benchLogs(): Promise<Figure[]> {
  await using system = await TestSystem.start({
    agents: [{ name: agentName }],
    controlPlaneEnv: productionEnv,
    programs: await buildForProduction(),
  });
  const shape = await shapeOfOurs(system);
  const ours: number[] = [];
  const bare: number[] = [];
  // The first round warms up.
  for (let round = 0; round <= rounds; round++) {
    const figures = [await followBare(system, shape, round), await followOurs(system)];
    if (process.stderr.isTTY) process.stderr.write(`round ${round}: ${figures.map(rounded).join(", ")} MiB/s\n`);
    if (round === 0) continue;
    bare.push(figures[0] ?? 0);
    ours.push(figures[1] ?? 0);
  }
  const { agentMib, controlPlaneMib } = await growthBehindStalledReader(system);
  return [
    throughputFigure(quantile(ours, 0.5), quantile(bare, 0.5)),
    growthFigure("agent", agentMib),
    growthFigure("control_plane", controlPlaneMib),
  ];
}

function throughputFigure(value: number, baseline: number): Figure {
  const ratio = value / baseline;
  return {
    bench: "logs",
    metric: "follow_throughput",
    value: rounded(value),
    unit: "MiB/s",
    baseline: rounded(baseline),
    ratio: rounded(ratio),
    goal: `ratio >= ${throughputGoal}`,
    ok: ratio >= throughputGoal,
  };
}

function growthFigure(process: string, mib: number): Figure {
  return {
    bench: "logs",
    metric: `stalled_reader_${process}_rss_growth_mb`,
    value: rounded(mib),
    unit: "MiB",
    baseline: null,
    ratio: null,
    goal: `<= ${growthGoalMib}`,
    ok: mib <= growthGoalMib,
  };
}
