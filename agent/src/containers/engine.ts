// The node's containers, on Docker. Every call is idempotent and can be repeated after the agent or the engine was
// killed in the middle of it: a container's name follows from instance and attempt, so the second create finds the
// first one's work.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { ContainerSpec } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { PullPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import type { InstanceId, NodeId } from "@clodei/proto/ids";
import { containerLabels, containerName } from "@clodei/proto/node-link";
import { type AttemptKey, type ContainerSettings, containerBody } from "./container-body.ts";
import { ContainerCreation, type CreatedContainer, isNetworkMissing, startFailure } from "./container-creation.ts";
import { DockerClient, refusalOf, unless } from "./docker-client.ts";
import type { ContainerDetails } from "./engine-answers.ts";
import { EngineError } from "./engine-error.ts";
import { canReadOutput, type EngineInfo, hasDefaultSeccomp, readEngineInfo } from "./engine-info.ts";
import { attemptOf, attemptsOf } from "./events.ts";
import { ImageUsers } from "./image-users.ts";
import { Images, type LocalImage } from "./images.ts";
import { ContainerNetworks } from "./networks.ts";
import { NodeContainers } from "./node-containers.ts";
import { hasRun, type ObservedContainer, observedContainer } from "./observed.ts";
import type { PullBytes } from "./pull-progress.ts";
import { ReadBack, type StartedContainer } from "./read-back.ts";
import type { RegistryAuth } from "./registry-auth.ts";
import { clearStart, shimsOfNode, type StartTrace, traceOfStart } from "./start-trace.ts";
import { Workspaces } from "./workspace.ts";

/** Processes and threads of one container. PyTorch with many loaders uses some hundreds. */
const defaultPidsLimit = 4096;
/** Open files of one process. Lower where this process itself may open fewer: an engine under the same limits cannot raise it. */
const defaultOpenFilesLimit = 65_536;
/** Where no resolver is known, names resolve to nothing; without any, Docker would ask the host's from the host. */
const noResolver = ["127.0.0.1"];
const defaultNetworkPool = "10.213.0.0/16";
/** Looks at containers run so many at a time. */
const inspectConcurrency = 8;
/** Ids of containers that were there are remembered so far back. */
const maxSeenIds = 4096;

export interface ContainerEngineOptions {
  readonly socketPath: string;
  readonly nodeId: NodeId;
  /** Workspaces stand in it. Only the agent's user may enter it. */
  readonly workspaceFolder: string;
  readonly simulatedGpus: ReadonlySet<string>;
  readonly registryAuth?: RegistryAuth | undefined;
  /** A pull that says nothing for so long is given up. */
  readonly pullSilenceMs?: number;
  /** Resolvers for containers. None: names do not resolve. */
  readonly dnsServers?: readonly string[];
  readonly networkPool?: string;
  /** For so long after a start (a second) no network is made ready: the engine is the start's. */
  readonly networkRestMs?: number;
  readonly pidsLimit?: number;
  readonly openFilesLimit?: number;
}

/** Where the engine writes a container's output. */
export interface LogSource {
  readonly containerId: string;
  readonly folder: string;
}

/** Docker, as far as this node's own containers go. Others on the same engine are never touched. */
export class ContainerEngine {
  readonly #client: DockerClient;
  readonly #settings: ContainerSettings;
  readonly #containers: NodeContainers;
  readonly #images: Images;
  readonly #networks: ContainerNetworks;
  readonly #workspaces: Workspaces;
  readonly #users: ImageUsers;
  readonly #creation: ContainerCreation;
  readonly #readBack: ReadBack;
  readonly #workspaceFolder: string;
  /** Ids of this node's containers, the latest seen last: also of those that are gone. */
  readonly #seenIds = new Set<string>();
  #rootFolder: string | undefined;

  constructor(options: ContainerEngineOptions) {
    this.#client = new DockerClient(options.socketPath);
    this.#settings = {
      nodeId: options.nodeId,
      simulatedGpus: options.simulatedGpus,
      dnsServers: (options.dnsServers ?? []).length > 0 ? (options.dnsServers ?? []) : noResolver,
      pidsLimit: options.pidsLimit ?? defaultPidsLimit,
      openFilesLimit: Math.min(options.openFilesLimit ?? defaultOpenFilesLimit, ownOpenFilesLimit()),
    };
    this.#containers = new NodeContainers(this.#client, options.nodeId);
    this.#images = new Images(this.#client, options.registryAuth, options.pullSilenceMs);
    this.#networks = new ContainerNetworks(
      this.#client,
      options.nodeId,
      options.networkPool ?? defaultNetworkPool,
      options.networkRestMs,
    );
    this.#workspaces = new Workspaces(options.workspaceFolder);
    this.#users = new ImageUsers(this.#containers);
    this.#creation = new ContainerCreation(this.#containers);
    this.#readBack = new ReadBack(this.#containers, this.#workspaces, this.#users);
    this.#workspaceFolder = options.workspaceFolder;
  }

  /** Whether the engine answers and is one that containers can be trusted to. Throws EngineError where not. */
  async check(signal: AbortSignal): Promise<EngineInfo> {
    const info = await readEngineInfo(this.#client, signal);
    if (!hasDefaultSeccomp(info))
      throw new EngineError("failed", "the container engine's seccomp profile is not Docker's default");
    if (info.rootFolder === "") throw new EngineError("failed", "the container engine names no data folder");
    if (!(await canReadOutput(info)))
      throw new EngineError("failed", `the container engine's data folder ${info.rootFolder} cannot be read`);
    this.#rootFolder = info.rootFolder;
    return info;
  }

  /** This node's containers, in whatever state. */
  async list(signal: AbortSignal): Promise<ObservedContainer[]> {
    const ids = await this.#containers.ids({}, signal);
    this.#noteSeen(ids);
    const observed: (ObservedContainer | undefined)[] = [];
    for (let begin = 0; begin < ids.length; begin += inspectConcurrency) {
      const inspected = ids.slice(begin, begin + inspectConcurrency).map((id) => this.#containers.inspect(id, signal));
      // One that was removed since the list was made is not there.
      for (const container of await Promise.all(inspected)) observed.push(container && observedContainer(container));
    }
    return observed.filter((container) => container !== undefined);
  }

  /**
   * Makes the image be on the node.
   * Throws EngineError: away, or one of the kinds of an image that cannot be had.
   */
  ensureImage(
    image: string,
    policy: PullPolicy,
    onProgress: (bytes: PullBytes) => void,
    signal: AbortSignal,
  ): Promise<LocalImage> {
    return this.#images.ensure(image, policy, onProgress, signal);
  }

  /** Makes workspace and container of an attempt, where they are not there already. */
  async create(
    key: AttemptKey,
    generation: bigint,
    spec: ContainerSpec,
    image: LocalImage,
    signal: AbortSignal,
  ): Promise<CreatedContainer> {
    const workspace = await this.#workspaces.ensure(key.instanceId);
    const network = await this.#networks.take(signal);
    let container: CreatedContainer;
    try {
      const body = containerBody(this.#settings, key, generation, spec, image.imageId, workspace, network);
      container = await this.#creation.createOrAdopt(key, body, signal);
    } catch (error) {
      if (isNetworkMissing(error, network)) this.#networks.forgetReady();
      throw error;
    } finally {
      this.#networks.settle(network);
    }
    // What an earlier process made has a network already; this one was never used, and is not worth a list of its own.
    if (container.network !== network) await this.#networks.remove(network, signal);
    this.#noteSeen([container.id]);
    if (!container.ran)
      await this.#workspaces.own(key.instanceId, await this.#users.of(image.imageId, image.user, container.id, signal));
    return container;
  }

  /**
   * Starts an attempt's container, once: one that has run already is not run again. Reads back its isolation; a
   * container whose isolation is not what it must be is killed. Throws EngineError: start_failed, policy.
   *
   * @param created As `create` returned it just now; otherwise the engine is asked.
   */
  async start(key: AttemptKey, signal: AbortSignal, created?: CreatedContainer): Promise<StartedContainer> {
    const { id, ran, network } = created ?? (await this.#lookCreated(key, signal));
    if (!ran) await this.#start(id, network, signal);
    return this.#readBack.read(key, await this.#containers.get(key, signal), signal);
  }

  /** What became of a start that was cut off, of a container that the engine never started as far as it knows. */
  async startTrace(key: AttemptKey, signal: AbortSignal): Promise<StartTrace> {
    const container = await this.#getUnstarted(key, signal);
    return traceOfStart(container.Id, join(await this.#outputFolder(container.Id, signal), "container.log"));
  }

  /** Takes a container that was never started away, with all that a start which was cut off left. */
  async discard(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const container = await this.#getUnstarted(key, signal);
    await clearStart(container.Id);
    await this.#removeWhole(container, signal);
  }

  /** Reads back the isolation of a container that was found running. */
  async adopt(key: AttemptKey, signal: AbortSignal): Promise<StartedContainer> {
    const container = await this.#containers.get(key, signal);
    if (!hasRun(container)) throw new EngineError("not_found", "the container was never started");
    return this.#readBack.read(key, container, signal);
  }

  /** Ends the container's process: SIGTERM, and SIGKILL after the grace. One that is not there or has ended is fine. */
  async stop(key: AttemptKey, graceMs: number, signal: AbortSignal): Promise<void> {
    const name = containerName(key.instanceId, key.attempt);
    // Docker counts in seconds.
    const graceSeconds = Math.ceil(graceMs / 1000);
    if ((await this.#containers.find(key, signal)) === undefined) return;
    await this.#containers
      .act("stop the container", `/containers/${name}/stop`, signal, { t: graceSeconds })
      .catch(unless(304, 404));
  }

  /** Removes an attempt's container with its network. */
  async remove(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const container = await this.#containers.find(key, signal);
    if (container !== undefined) {
      // What the engine does not know of it does not take away either.
      if (!hasRun(container)) await clearStart(container.Id);
      await this.#removeWhole(container, signal);
    }
  }

  /** Removes an instance's workspace. Only once its containers are gone. */
  async removeWorkspace(instanceId: InstanceId): Promise<void> {
    await this.#workspaces.remove(instanceId);
  }

  /** Makes networks for the next starts, so that these need not wait for them. */
  prepareNetworks(signal: AbortSignal): Promise<void> {
    return this.#networks.prepare(signal);
  }

  /** Removes this node's networks that no container of it needs. */
  sweepNetworks(signal: AbortSignal): Promise<void> {
    return this.#networks.sweep(() => this.#containers.networks(signal), signal);
  }

  /** Removes the networks that were made for the next starts: there will be none. */
  async dropNetworks(signal: AbortSignal): Promise<void> {
    this.#networks.forgetReady();
    await this.sweepNetworks(signal);
  }

  /** Removes containers that carry this node's label and name no attempt. Returns how many. */
  async removeNameless(signal: AbortSignal): Promise<number> {
    let removed = 0;
    for (const id of await this.#containers.ids({}, signal)) {
      const container = await this.#containers.inspect(id, signal);
      if (container === undefined || attemptOf(container.Config.Labels) !== undefined) continue;
      await this.#containers.remove(id, signal);
      removed += 1;
    }
    return removed;
  }

  /**
   * Ends what is left of containers of this node that the engine does not know: an engine that was killed while it
   * started one can leave its shim, and its program. Returns how many there were.
   */
  async clearStrays(signal: AbortSignal): Promise<number> {
    let cleared = 0;
    for (const containerId of shimsOfNode(this.#workspaceFolder, this.#seenIds)) {
      // Asked after its shim was seen: what the engine began since is there when it answers.
      if ((await this.#containers.inspect(containerId, signal)) !== undefined) continue;
      await clearStart(containerId);
      cleared += 1;
    }
    return cleared;
  }

  /**
   * Names attempts whose containers changed: look again. Ends when the signal is aborted, and throws EngineError when
   * the engine goes away; what happened meanwhile is not repeated.
   */
  async *events(signal: AbortSignal): AsyncGenerator<AttemptKey> {
    if (signal.aborted) return;
    const filters = JSON.stringify({
      type: ["container"],
      event: ["create", "start", "die", "oom", "destroy"],
      label: [`${containerLabels.nodeId}=${this.#settings.nodeId}`],
    });
    try {
      const call = { method: "GET", path: "/events", query: { filters } } as const;
      yield* attemptsOf(this.#client.stream("watch containers", call, signal));
    } catch (error) {
      if (!signal.aborted) throw error;
    }
    if (!signal.aborted) throw new EngineError("away", "the container engine ended the stream of events");
  }

  /** Where the engine writes an attempt's output; undefined when there is no such container. */
  async logSource(key: AttemptKey, signal: AbortSignal): Promise<LogSource | undefined> {
    const container = await this.#containers.find(key, signal);
    if (container === undefined) return undefined;
    return { containerId: container.Id, folder: await this.#outputFolder(container.Id, signal) };
  }

  /** Waits until an attempt's container has ended, or is not there any more. */
  async waitEnd(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const name = containerName(key.instanceId, key.attempt);
    for (;;) {
      const container = await this.#containers.find(key, signal);
      if (container === undefined) return;
      if (!container.State.Running && hasRun(container)) return;
      const condition = hasRun(container) ? "not-running" : "next-exit";
      const call = { method: "POST", path: `/containers/${name}/wait`, query: { condition } } as const;
      await this.#client.wait("wait for the container", call, signal).catch(unless(404));
    }
  }

  #noteSeen(ids: readonly string[]): void {
    for (const id of ids) {
      this.#seenIds.delete(id);
      this.#seenIds.add(id);
    }
    for (const id of this.#seenIds) {
      if (this.#seenIds.size <= maxSeenIds) return;
      this.#seenIds.delete(id);
    }
  }

  async #outputFolder(containerId: string, signal: AbortSignal): Promise<string> {
    if (this.#rootFolder === undefined) await this.check(signal);
    return join(this.#rootFolder ?? "", "containers", containerId, "local-logs");
  }

  /** The engine answers only when no start is under way. */
  async #getUnstarted(key: AttemptKey, signal: AbortSignal): Promise<ContainerDetails> {
    const container = await this.#containers.get(key, signal);
    if (hasRun(container)) throw new EngineError("failed", "the container was started meanwhile");
    return container;
  }

  async #lookCreated(key: AttemptKey, signal: AbortSignal): Promise<CreatedContainer> {
    const container = await this.#containers.get(key, signal);
    const ran = hasRun(container);
    if (!ran) await this.#users.of(container.Image, container.Config.User, container.Id, signal);
    return { id: container.Id, ran, network: container.HostConfig.NetworkMode ?? "" };
  }

  async #start(containerId: string, network: string, signal: AbortSignal): Promise<void> {
    try {
      await this.#containers.act("start the container", `/containers/${containerId}/start`, signal);
    } catch (error) {
      if (refusalOf(error)?.status === 304) return;
      if (isNetworkMissing(error, network)) this.#networks.forgetReady();
      throw startFailure(error, network);
    }
  }

  async #removeWhole(container: ContainerDetails, signal: AbortSignal): Promise<void> {
    await this.#containers.remove(container.Id, signal);
    await this.#networks.remove(container.HostConfig.NetworkMode ?? "", signal);
  }
}

function ownOpenFilesLimit(): number {
  const line = /^Max open files\s+\S+\s+(\S+)/m.exec(readFileSync("/proc/self/limits", "latin1"));
  const hard = Number(line?.[1]);
  return Number.isSafeInteger(hard) ? hard : Number.MAX_SAFE_INTEGER;
}
