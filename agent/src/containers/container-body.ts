// What Docker is asked for, from nothing, field by field. A specification can say only what ContainerSpec has a field
// for; everything else about a container is decided here and nowhere else. The engine's view of a running container is
// compared with this, field by field, by a test.
import { createHash } from "node:crypto";
import type { ContainerSpec } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { InstanceId } from "@clodei/proto/ids";
import { containerLabels } from "@clodei/proto/node-link";

/** Names an attempt of an instance. */
export type AttemptKey = { readonly instanceId: InstanceId; readonly attempt: number };

/** What POST /containers/create is asked for. */
export type ContainerBody = ReturnType<typeof containerBody>;

/** What the node decides about every container. */
export interface ContainerSettings {
  readonly nodeId: string;
  /** GPUs for which no device is asked, because there is none. */
  readonly simulatedGpus: ReadonlySet<string>;
  /** Resolvers. Never empty: without one Docker would take the host's, and ask it from outside the container's network. */
  readonly dnsServers: readonly string[];
  readonly pidsLimit: number;
  readonly openFilesLimit: number;
}

/** Label that tells whether a container is the one that this node would create for the specification now. */
export const specDigestLabel = "clodei.spec_digest";

/** Where the workspace appears inside. */
export const workspaceTarget = "/workspace";

/** The log driver that keeps bytes as they are; json-file replaces what is no UTF-8, also where it cuts a long line. */
export const logDriver = "local";
/**
 * What the engine keeps of a container's output is 32 to 64 MiB: while the agent is away, as much as the agent itself
 * would keep. Not compressed, because the agent reads these files.
 */
const logOptions = { "max-size": "32m", "max-file": "2", compress: "false" } as const;

const bytesPerMib = 1024 * 1024;
const nanoCpusPerMilli = 1_000_000;
/** Docker's weight of one core. */
const cpuSharesPerCore = 1024;
const minCpuShares = 2;
const maxCpuShares = 262_144;
const defaultStopGraceSeconds = 10;

/** Docker looks up a resolver's search list on the host when none is given; this one means "none". */
const noSearchDomains = ["."];

/** The name of a network. `id` is 12 random hexadecimal digits: names of interfaces end at 15 characters. */
export function networkName(id: string): string {
  return `clodei-${id}`;
}

/** Addresses of a network. */
export interface Subnet {
  /** In the notation "10.213.0.8/29". */
  readonly subnet: string;
  /** The address of the host's end, one of them. */
  readonly gateway: string;
}

/** What POST /networks/create is asked for. */
export function networkBody(nodeId: string, id: string, { subnet, gateway }: Subnet) {
  return {
    Name: networkName(id),
    CheckDuplicate: true,
    Driver: "bridge",
    Internal: false,
    Attachable: false,
    EnableIPv6: false,
    // With the gateway named: an engine up to 20.10 that is killed while it removes a network without one panics at
    // every later start (https://github.com/moby/moby/issues/45057).
    IPAM: { Driver: "default", Config: [{ Subnet: subnet, Gateway: gateway }] },
    // Names of bridges are unique, and so is the network, which Docker itself does not promise.
    Options: { "com.docker.network.bridge.name": `cl${id}` },
    Labels: { [containerLabels.nodeId]: nodeId },
  };
}

/**
 * What POST /containers/create is asked for.
 *
 * @param network The name of a network that is this container's alone.
 */
export function containerBody(
  settings: ContainerSettings,
  key: AttemptKey,
  generation: bigint,
  spec: ContainerSpec,
  imageId: string,
  workspaceFolder: string,
  network: string,
) {
  const body = {
    // An underscore is no part of a host name.
    Hostname: key.instanceId.replace("_", "-"),
    Image: imageId,
    // Absent keeps the image's. An entrypoint without arguments drops the image's arguments.
    ...(spec.command.length > 0 ? { Entrypoint: [...spec.command] } : {}),
    ...(spec.command.length > 0 || spec.args.length > 0 ? { Cmd: [...spec.args] } : {}),
    Env: environment(settings, spec),
    AttachStdin: false,
    AttachStdout: false,
    AttachStderr: false,
    OpenStdin: false,
    Tty: false,
    // An image's health check would run commands beside the customer's process.
    Healthcheck: { Test: ["NONE"] },
    // An image could name a signal that no process takes as a request to end.
    StopSignal: "SIGTERM",
    StopTimeout: Math.ceil(stopGraceMs(spec) / 1000),
    HostConfig: hostConfig(settings, spec, workspaceFolder),
  };
  // Without the network: each attempt to create it may have taken another one.
  const digest = createHash("sha256").update(JSON.stringify(body)).digest("hex");
  return {
    ...body,
    HostConfig: { ...body.HostConfig, NetworkMode: network },
    Labels: {
      [containerLabels.nodeId]: settings.nodeId,
      [containerLabels.instanceId]: key.instanceId,
      [containerLabels.attempt]: String(key.attempt),
      [containerLabels.generation]: String(generation),
      [specDigestLabel]: digest,
    },
  };
}

/** The time between SIGTERM and SIGKILL. */
export function stopGraceMs(spec: ContainerSpec): number {
  if (spec.stopGrace === undefined) return defaultStopGraceSeconds * 1000;
  return Number(spec.stopGrace.seconds) * 1000 + Math.ceil(spec.stopGrace.nanos / 1e6);
}

function hostConfig(settings: ContainerSettings, spec: ContainerSpec, workspaceFolder: string) {
  const memoryBytes = spec.memoryMib * bytesPerMib;
  const gpus = realGpus(settings, spec);
  return {
    // Privileges. No seccomp profile is named, which is Docker's own default; the engine's is checked to be that.
    Privileged: false,
    CapAdd: [],
    CapDrop: ["ALL"],
    SecurityOpt: ["no-new-privileges"],
    // Named, because a node's default may be NVIDIA's runtime, which grants GPUs by an environment variable.
    Runtime: "runc",
    // Namespaces, all of the container's own. The network is named last.
    IpcMode: "private",
    PidMode: "",
    UTSMode: "",
    CgroupnsMode: "private",
    PublishAllPorts: false,
    PortBindings: {},
    Dns: [...settings.dnsServers],
    DnsSearch: noSearchDomains,
    // Files: the workspace and nothing else of the host. As a mount, not a bind: Docker must not make a missing folder.
    Mounts: [
      {
        Type: "bind",
        Source: workspaceFolder,
        Target: workspaceTarget,
        ReadOnly: false,
        BindOptions: { Propagation: "rprivate" },
      },
    ],
    ReadonlyRootfs: false,
    // Half of the memory may be shared memory, which counts as memory: loaders of training data live on it.
    ShmSize: memoryBytes / 2,
    Devices: [],
    ...(gpus.length > 0 ? { DeviceRequests: [gpuRequest(gpus)] } : {}),
    // Limits.
    Memory: memoryBytes,
    // Memory and swap together: no swap.
    MemorySwap: memoryBytes,
    OomKillDisable: false,
    NanoCpus: spec.cpuMillis * nanoCpusPerMilli,
    CpuShares: Math.min(maxCpuShares, Math.max(minCpuShares, Math.floor((spec.cpuMillis * cpuSharesPerCore) / 1000))),
    PidsLimit: settings.pidsLimit,
    Ulimits: [
      { Name: "core", Soft: 0, Hard: 0 },
      { Name: "nofile", Soft: settings.openFilesLimit, Hard: settings.openFilesLimit },
    ],
    LogConfig: { Type: logDriver, Config: { ...logOptions } },
    // Only the agent starts a container, once an attempt.
    RestartPolicy: { Name: "no", MaximumRetryCount: 0 },
    AutoRemove: false,
  };
}

/** What NVIDIA's runtime would act on, whatever the image says: the instance's own GPUs, or none at all. */
function environment(settings: ContainerSettings, spec: ContainerSpec): string[] {
  const gpus = realGpus(settings, spec);
  const variables = Object.entries(spec.env).map(([name, value]) => `${name}=${value}`);
  return [...variables, `NVIDIA_VISIBLE_DEVICES=${gpus.length > 0 ? gpus.join(",") : "void"}`];
}

function realGpus(settings: ContainerSettings, spec: ContainerSpec): string[] {
  return spec.gpuUuids.filter((uuid) => !settings.simulatedGpus.has(uuid));
}

function gpuRequest(uuids: readonly string[]) {
  return { Driver: "nvidia", DeviceIDs: [...uuids], Capabilities: [["gpu", "compute", "utility"]] };
}
