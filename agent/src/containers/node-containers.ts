// The node's containers as Docker's API sees them: looked up, listed and removed by name, and only this node's.
import { containerLabels, containerName } from "@clodei/proto/node-link";
import type { AttemptKey, ContainerBody } from "./container-body.ts";
import { changeTimeoutMs, type DockerClient, isMissing, readAll, unless } from "./docker-client.ts";
import type { ContainerDetails, ListedContainer } from "./engine-answers.ts";
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
  async inspect(idOrName: string, signal: AbortSignal): Promise<ContainerDetails | undefined> {
    try {
      const path = `/containers/${idOrName}/json`;
      return (await this.#client.get("look at the container", path, signal)) as ContainerDetails;
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  /** An attempt's container; undefined where this node has none. */
  async find(key: AttemptKey, signal: AbortSignal): Promise<ContainerDetails | undefined> {
    const container = await this.inspect(containerName(key.instanceId, key.attempt), signal);
    return container !== undefined && this.belongsTo(container, key) ? container : undefined;
  }

  /** The same, where it must be there. */
  async get(key: AttemptKey, signal: AbortSignal): Promise<ContainerDetails> {
    const container = await this.find(key, signal);
    if (container === undefined) throw new EngineError("not_found", "there is no such container");
    return container;
  }

  /** Whether its labels say that it is this node's container of that attempt. */
  belongsTo(container: ContainerDetails, key: AttemptKey): boolean {
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
    const query = { force: "true", v: "true" };
    await this.#client
      .json("remove the container", { method: "DELETE", path: `/containers/${idOrName}`, query }, signal)
      .catch(unless(404, 409));
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
      const call = { method: "GET", path: `/containers/${containerId}/archive`, query: { path } } as const;
      return await this.#client.read(`read ${path} of the image`, call, signal, (body) =>
        readAll(body, maxArchiveBytes, () => {
          const message = `${path} of the image is larger than ${maxArchiveBytes} bytes`;
          return new EngineError("start_failed", message);
        }),
      );
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  async #list(labels: Readonly<Record<string, string>>, signal: AbortSignal): Promise<ListedContainer[]> {
    const all = { [containerLabels.nodeId]: this.#nodeId, ...labels };
    const filters = JSON.stringify({ label: Object.entries(all).map(([name, value]) => `${name}=${value}`) });
    const query = { all: "true", filters };
    return (await this.#client.get("list containers", "/containers/json", signal, query)) as ListedContainer[];
  }

  /** Creates a container, and returns its id. */
  async create(name: string, body: ContainerBody, signal: AbortSignal): Promise<string> {
    const call = { method: "POST", path: "/containers/create", query: { name }, body } as const;
    const created = await this.#client.json("create the container", call, signal);
    return (created as { readonly Id: string }).Id;
  }

  /** Has the engine do something to a container. `t`: a grace in seconds, and how much longer the call may take for it. */
  async act(what: string, path: string, signal: AbortSignal, options: { readonly t?: number } = {}): Promise<void> {
    const { t } = options;
    const query = t === undefined ? {} : { t: String(t) };
    await this.#client.json(
      what,
      { method: "POST", path, query, timeoutMs: changeTimeoutMs + (t ?? 0) * 1000 },
      signal,
    );
  }
}
