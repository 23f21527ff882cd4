// From the SDK's call to RUNNING seen by the SDK, against the Docker calls that the agent makes for it (network,
// container, start, with the same bodies) made by a bare HTTP client. The agent has its networks ready before the call, and
// makes the next one after it: no round begins before that is done, so that it disturbs neither side. Each round has one of ours between two bare ones: how
// far those two lie apart is the machine's own noise, and no difference that is smaller says anything.
import type { ContainerSpec } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ContainerSpecSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { create } from "@bufbuild/protobuf";
import { mkdir } from "node:fs/promises";
import assert from "node:assert/strict";
import { join } from "node:path";
import { newId } from "@clodei/proto/ids";
import { randomBytes } from "node:crypto";
import { type ContainerSettings, containerBody, networkBody } from "../../agent/src/containers/container-body.ts";
import { readyNetworks } from "../../agent/src/containers/networks.ts";
import { callEngine } from "../../tools/engine/api.ts";
import { inspectContainer, listContainers, listNetworks } from "../harness/containers.ts";
import { createContainer, removeContainer } from "./engine-calls.ts";
import { eventually } from "../harness/eventually.ts";
import { testImage, TestSystem } from "../harness/system.ts";
import { type Figure, quantile, rounded } from "./figures.ts";

const rounds = 60;
const warmUpRounds = 3;
const ratioGoal = 1.15;
const overheadGoalMs = 60;

const spec = {
  image: testImage,
  command: ["sleep", "300"],
  cpuMillis: 100,
  memoryMib: 32,
  stopGraceSeconds: 0,
} as const;

/** One instance by the SDK. Returns the milliseconds from the call to RUNNING. */
async function startInstance(system: TestSystem): Promise<number> {
  const begin = performance.now();
  const instance = await system.client.instances.run(spec);
  await instance.waitUntilRunning({ timeoutMs: 60_000 });
  const elapsed = performance.now() - begin;
  await instance.delete();
  await instance.waitUntilDeleted({ timeoutMs: 60_000 });
  return elapsed;
}

/** The settings of the agent, read from a container that it made. */
async function settingsOf(system: TestSystem): Promise<ContainerSettings & { readonly imageId: string }> {
  const instance = await system.client.instances.run(spec);
  await instance.waitUntilRunning({ timeoutMs: 60_000 });
  const [listed] = await listContainers(system.engine, instance.id);
  if (listed === undefined) throw new Error("the instance has no container");
  const container = await inspectContainer(system.engine, listed.Id);
  const ulimits = container.HostConfig["Ulimits"] as readonly { readonly Name: string; readonly Hard: number }[];
  const settings = {
    nodeId: "bench",
    simulatedGpus: new Set<string>(),
    dnsServers: container.HostConfig["Dns"] as string[],
    pidsLimit: Number(container.HostConfig["PidsLimit"]),
    openFilesLimit: ulimits.find((limit) => limit.Name === "nofile")?.Hard ?? 0,
    imageId: container.Image,
  };
  await instance.delete();
  await instance.waitUntilDeleted({ timeoutMs: 60_000 });
  return settings;
}

/** The bare calls. Returns their milliseconds. */
async function startBare(
  socketPath: string,
  settings: ContainerSettings & { readonly imageId: string },
  message: ContainerSpec,
  workspace: string,
): Promise<number> {
  const key = { instanceId: newId("ins"), attempt: 1 };
  const id = randomBytes(6).toString("hex");
  const begin = performance.now();
  const place = { subnet: "10.214.0.0/28", gateway: "10.214.0.1" };
  const network = networkBody(settings.nodeId, id, place);
  await callEngine(socketPath, { method: "POST", path: "/networks/create", body: network });
  const body = containerBody(settings, key, 1n, message, settings.imageId, workspace, network.Name);
  const containerId = await createContainer(socketPath, body);
  await callEngine(socketPath, { method: "POST", path: `/containers/${containerId}/start` });
  const elapsed = performance.now() - begin;
  await removeContainer(socketPath, containerId);
  await callEngine(socketPath, { method: "DELETE", path: `/networks/${network.Name}` });
  return elapsed;
}

/** Of two series, pair by pair. */
function differences(of: readonly number[], to: readonly number[]): number[] {
  return of.map((value, index) => value - (to[index] ?? Number.NaN));
}

/** Runs the bench. */
export async function benchStart(): Promise<Figure[]> {
  await using system = await TestSystem.start({
    agents: [{ name: "mad-1" }],
    // As in production: nothing is logged but what matters.
    controlPlaneEnv: { CLODEI_LOG_LEVEL: "info" },
  });
  const { socketPath } = system.engine;
  const settings = await settingsOf(system);
  const workspace = join(system.folder, "bench-workspace");
  await mkdir(workspace);
  const message = create(ContainerSpecSchema, {
    image: spec.image,
    command: [...spec.command],
    cpuMillis: spec.cpuMillis,
    memoryMib: spec.memoryMib,
    stopGrace: { seconds: BigInt(spec.stopGraceSeconds) },
  });
  const ours: number[] = [];
  const bare: number[] = [];
  const bareAgain: number[] = [];
  // At rest there are those that the agent keeps ready, and no others.
  const rest = (): Promise<void> =>
    eventually(30_000, async () => assert.equal((await listNetworks(system.engine)).length, readyNetworks));
  for (let round = -warmUpRounds; round < rounds; round++) {
    await rest();
    const bareMs = await startBare(socketPath, settings, message, workspace);
    const oursMs = await startInstance(system);
    await rest();
    const bareAgainMs = await startBare(socketPath, settings, message, workspace);
    if (round < 0) continue;
    ours.push(oursMs);
    bare.push(bareMs);
    bareAgain.push(bareAgainMs);
    if (process.stderr.isTTY) process.stderr.write(`\rround ${round + 1} of ${rounds}`);
  }
  const [value, baseline] = [quantile(ours, 0.5), quantile([...bare, ...bareAgain], 0.5)];
  const ratio = value / baseline;
  const overheadMs = quantile(differences(ours, bare), 0.95);
  const noiseMs = quantile(differences(bareAgain, bare), 0.95);
  return [
    {
      bench: "start",
      metric: "create_to_running",
      value: rounded(value),
      unit: "ms",
      baseline: rounded(baseline),
      ratio: rounded(ratio),
      goal: `ratio <= ${ratioGoal}`,
      ok: ratio <= ratioGoal,
    },
    {
      bench: "start",
      metric: "overhead_p95_ms",
      value: rounded(overheadMs),
      unit: "ms",
      // What Docker alone shows where nothing of ours is between: with more than the goal, the machine cannot show it.
      baseline: rounded(noiseMs),
      ratio: rounded(overheadMs / noiseMs),
      goal: `<= ${overheadGoalMs}`,
      ok: overheadMs <= overheadGoalMs,
    },
  ];
}
