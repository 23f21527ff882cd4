// The engine's own view of what runs, asked past every part of ours.
import { readdir, readFile } from "node:fs/promises";
import { containerLabels } from "@clodei/proto/node-link";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { callEngineJson } from "../../tools/engine/api.ts";

/** A container as `GET /containers/json` lists it. */
export interface ListedContainer {
  readonly Id: string;
  readonly Names: readonly string[];
  readonly State: string;
  readonly Labels: Readonly<Record<string, string>>;
}

/** A container as `GET /containers/ID/json` tells it, as far as tests look. */
export interface InspectedContainer {
  readonly Id: string;
  readonly Image: string;
  readonly State: { readonly Pid: number; readonly Running: boolean };
  readonly Config: {
    readonly Env: readonly string[];
    readonly Entrypoint: readonly string[] | null;
    readonly Cmd: readonly string[] | null;
  };
  readonly HostConfig: Readonly<Record<string, unknown>>;
  readonly Mounts: readonly { readonly Source: string; readonly Destination: string }[];
  readonly NetworkSettings: { readonly Networks: Readonly<Record<string, unknown>> };
}

/** Every container of the engine, running or not; of one instance where it is named. */
export async function listContainers(engine: PrivateEngine, instanceId?: string): Promise<ListedContainer[]> {
  const path = "/containers/json";
  const all = (await callEngineJson(engine.socketPath, { path, query: { all: "1" } })) as ListedContainer[];
  return instanceId === undefined
    ? all
    : all.filter((container) => container.Labels[containerLabels.instanceId] === instanceId);
}

/** Names of the networks that nodes made on the engine; of one node where it is named. */
export async function listNetworks(engine: PrivateEngine, nodeId?: string): Promise<string[]> {
  const label = nodeId === undefined ? containerLabels.nodeId : `${containerLabels.nodeId}=${nodeId}`;
  const query = { filters: JSON.stringify({ label: [label] }) };
  const networks = (await callEngineJson(engine.socketPath, { path: "/networks", query })) as { Name: string }[];
  return networks.map((network) => network.Name);
}

/** The network of an instance's only container. */
export async function networkOf(engine: PrivateEngine, instanceId: string): Promise<string> {
  const [listed, ...others] = await listContainers(engine, instanceId);
  if (listed === undefined || others.length > 0) throw new Error(`${instanceId} has not one container`);
  return String((await inspectContainer(engine, listed.Id)).HostConfig["NetworkMode"]);
}

/** All that the engine knows of a container. */
export async function inspectContainer(engine: PrivateEngine, id: string): Promise<InspectedContainer> {
  return (await callEngineJson(engine.socketPath, { path: `/containers/${id}/json` })) as InspectedContainer;
}

/** A process's status in /proc, by its field's name. */
export async function processStatus(pid: number): Promise<ReadonlyMap<string, string>> {
  const text = await readFile(`/proc/${pid}/status`, "utf8");
  return new Map(
    text
      .trimEnd()
      .split("\n")
      .map((line) => {
        const colon = line.indexOf(":");
        return [line.slice(0, colon), line.slice(colon + 1).trim()];
      }),
  );
}

/** Every process whose cgroup names the container. */
export async function processesOf(containerId: string): Promise<number[]> {
  const pids = (await readdir("/proc")).filter((name) => /^\d+$/.test(name)).map(Number);
  const found = await Promise.all(
    pids.map(async (pid) => {
      const cgroups = await readFile(`/proc/${pid}/cgroup`, "utf8").catch(() => "");
      return cgroups.includes(containerId) ? [pid] : [];
    }),
  );
  return found.flat();
}

/** The engine's shims, by the containers that they stand for: one for each container that runs, and no others. */
export async function shimsOf(engine: PrivateEngine): Promise<string[]> {
  const pids = (await readdir("/proc")).filter((name) => /^\d+$/.test(name));
  const found = await Promise.all(
    pids.map(async (pid) => {
      const args = (await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => "")).split("\0");
      const isShim = /\/containerd-shim[^/]*$/.test(args[0] ?? "");
      if (!isShim || !args.some((arg) => arg.startsWith(`${engine.runFolder}/`))) return [];
      return [args[args.indexOf("-id") + 1] ?? ""];
    }),
  );
  return found.flat();
}
