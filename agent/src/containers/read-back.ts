// Reads a started container's isolation back, and kills the container where it is not what it must be.
import type { Isolation } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { AttemptKey } from "./container-body.ts";
import { unless } from "./docker-client.ts";
import type { ContainerDetails } from "./engine-answers.ts";
import { EngineError } from "./engine-error.ts";
import type { ImageUsers } from "./image-users.ts";
import { astray, IsolationError, readIsolation } from "./isolation.ts";
import type { NodeContainers } from "./node-containers.ts";
import { startTimeOf } from "./observed.ts";
import type { Workspaces } from "./workspace.ts";

/** A container that was started. */
export interface StartedContainer {
  readonly startTime: Date;
  /** What the kernel applies; undefined when the process had ended before it could be read. */
  readonly isolation: Isolation | undefined;
}

/** Reads back how containers of a node are isolated. */
export class ReadBack {
  readonly #containers: NodeContainers;
  readonly #workspaces: Workspaces;
  readonly #users: ImageUsers;

  constructor(containers: NodeContainers, workspaces: Workspaces, users: ImageUsers) {
    this.#containers = containers;
    this.#workspaces = workspaces;
    this.#users = users;
  }

  /**
   * What is known of a container that was started. One whose isolation is not what it must be is killed. Throws
   * EngineError policy.
   */
  async read(key: AttemptKey, container: ContainerDetails, signal: AbortSignal): Promise<StartedContainer> {
    const startTime = startTimeOf(container) ?? new Date();
    if (!container.State.Running) return { startTime, isolation: undefined };
    try {
      return { startTime, isolation: await this.#isolation(key, container, signal) };
    } catch (error) {
      if (!(error instanceof IsolationError)) throw error;
      const path = `/containers/${container.Id}/kill`;
      await this.#containers.act("kill the container", path, signal).catch(unless(404, 409));
      throw new EngineError("policy", error.message, { cause: error });
    }
  }

  /** Undefined when the process had ended. Throws IsolationError. */
  async #isolation(key: AttemptKey, container: ContainerDetails, signal: AbortSignal) {
    const { Id: containerId, State: state } = container;
    const uid = await this.#workspaces.ownerUid(key.instanceId);
    // Nothing is known of an image whose container an earlier process of the agent made: by now the files are what the
    // customer made of them.
    const groups = this.#users.known(container.Image, container.Config.User)?.groups;
    const found = readIsolation({ pid: state.Pid, containerId, uid, groups });
    if (found === "ended") return undefined;
    if (found !== "elsewhere") return found;
    // The engine knows whether that number is still the container's.
    const now = await this.#containers.find(key, signal);
    if (now?.Id !== containerId || !now.State.Running || now.State.Pid !== state.Pid) return undefined;
    throw astray(state.Pid);
  }
}
