// The node's containers as Docker's API sees them: looked up, listed and removed by name, and only this node's.
import type { Readable } from "node:stream";
import { containerLabels, containerName } from "@clodei/proto/node-link";
import type { ContainerInfo, ContainerInspectInfo } from "dockerode";
import type Docker from "dockerode";
import type { AttemptKey } from "./container-body.ts";
import { changeTimeoutMs, type DockerClient, isMissing, lookTimeoutMs, refusalOf } from "./docker-client.ts";
import { EngineError } from "./engine-error.ts";
import { attemptOf } from "./events.ts";

const removalPollMs = 50;
/** Of a customer's image: a file or folder without end must not fill the agent's memory. */
const maxArchiveBytes = 1024 * 1024;

/** Work on the containers of one node. */
export class NodeContainers {
  readonly #client: DockerClient;
  readonly #nodeId: string;

  constructor(client: DockerClient, nodeId: string) {
    this.#client = client;
    this.#nodeId = nodeId;
  }

  /** Whatever has that id or name, this node's or not; undefined where there is nothing. */
  async inspect(idOrName: string, signal: AbortSignal): Promise<ContainerInspectInfo | undefined> {
    try {
      return await this.look("look at the container", signal, (docker, abortSignal) =>
        docker.getContainer(idOrName).inspect({ abortSignal }),
      );
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  /** An attempt's container; undefined where this node has none. */
  async find(key: AttemptKey, signal: AbortSignal): Promise<ContainerInspectInfo | undefined> {
    const container = await this.inspect(containerName(key.instanceId, key.attempt), signal);
    return container !== undefined && this.belongsTo(container, key) ? container : undefined;
  }

  /** The same, where it must be there. */
  async get(key: AttemptKey, signal: AbortSignal): Promise<ContainerInspectInfo> {
    const container = await this.find(key, signal);
    if (container === undefined) throw new EngineError("not_found", "there is no such container");
    return container;
  }

  /** Whether its labels say that it is this node's container of that attempt. */
  belongsTo(container: ContainerInspectInfo, key: AttemptKey): boolean {
    const found = attemptOf(container.Config.Labels);
    const node = container.Config.Labels[containerLabels.nodeId];
    return node === this.#nodeId && found?.instanceId === key.instanceId && found.attempt === key.attempt;
  }

  /** Ids of this node's containers that carry the labels. */
  async ids(labels: Readonly<Record<string, string>>, signal: AbortSignal): Promise<string[]> {
    return (await this.#list(labels, signal)).map((container) => container.Id);
  }

  /** Names of the networks that this node's containers are in, or will be once they start. */
  async networks(signal: AbortSignal): Promise<ReadonlySet<string>> {
    return new Set((await this.#list({}, signal)).map(({ HostConfig: { NetworkMode: name } }) => name));
  }

  /** Removes a container and the volumes that its image declared, and returns when it is gone. */
  async remove(idOrName: string, signal: AbortSignal): Promise<void> {
    await this.change("remove the container", signal, 0, async (docker, abortSignal) => {
      await docker.getContainer(idOrName).remove({ force: true, v: true, abortSignal });
    }).catch(unless(404, 409));
    // 409: somebody else's removal is under way.
    const deadline = performance.now() + changeTimeoutMs;
    while ((await this.inspect(idOrName, signal)) !== undefined) {
      if (performance.now() > deadline)
        throw new EngineError("failed", `the container was not removed within ${changeTimeoutMs} ms`);
      await new Promise((resolve) => setTimeout(resolve, removalPollMs));
    }
  }

  /** A file of a container as a tar archive; undefined where it has none at that path. */
  async archive(containerId: string, path: string, signal: AbortSignal): Promise<Buffer | undefined> {
    try {
      return await this.look(`read ${path} of the image`, signal, async (docker, abortSignal) => {
        const stream: unknown = await docker.getContainer(containerId).getArchive({ path, abortSignal });
        return readAll(stream as Readable, path);
      });
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  #list(labels: Readonly<Record<string, string>>, signal: AbortSignal): Promise<ContainerInfo[]> {
    const all = { [containerLabels.nodeId]: this.#nodeId, ...labels };
    const filters = { label: Object.entries(all).map(([name, value]) => `${name}=${value}`) };
    return this.look("list containers", signal, (docker, abortSignal) =>
      docker.listContainers({ all: true, filters, abortSignal }),
    );
  }

  /** A call that changes nothing. */
  look<T>(
    what: string,
    signal: AbortSignal,
    work: (docker: Docker, abortSignal: AbortSignal) => Promise<T>,
  ): Promise<T> {
    return this.#client.call(what, { signal, timeoutMs: lookTimeoutMs }, work);
  }

  /** A call that changes something, and may take `extraMs` more than such calls do. */
  change<T>(
    what: string,
    signal: AbortSignal,
    extraMs: number,
    work: (docker: Docker, abortSignal: AbortSignal) => Promise<T>,
  ): Promise<T> {
    return this.#client.call(what, { signal, timeoutMs: changeTimeoutMs + extraMs }, work);
  }
}

/** Swallows the engine's refusals with these statuses, which say that there is nothing to do. */
export function unless(...statuses: readonly number[]): (error: unknown) => void {
  return (error) => {
    if (!statuses.includes(refusalOf(error)?.status ?? 0)) throw error;
  };
}

async function readAll(stream: Readable, path: string): Promise<Buffer> {
  const parts: Buffer[] = [];
  let bytes = 0;
  for await (const part of stream as AsyncIterable<Buffer>) {
    bytes += part.length;
    if (bytes > maxArchiveBytes)
      throw new EngineError("start_failed", `${path} of the image is larger than ${maxArchiveBytes} bytes`);
    parts.push(part);
  }
  return Buffer.concat(parts);
}
