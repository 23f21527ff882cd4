// Creates containers so that it can be repeated after a crash anywhere: a container's name follows from instance and
// attempt, so a second create finds the first one's work and takes it up where it is what is asked for now.
import { containerName } from "@clodei/proto/node-link";
import { type AttemptKey, type ContainerBody, specDigestLabel } from "./container-body.ts";
import { refusalOf } from "./docker-client.ts";
import { EngineError } from "./engine-error.ts";
import type { NodeContainers } from "./node-containers.ts";
import { hasRun } from "./observed.ts";

/** A container that was created. */
export interface CreatedContainer {
  readonly id: string;
  /** Whether it was there already, and had been started. */
  readonly ran: boolean;
  /** The name of its network. */
  readonly network: string;
}

/** Creates the containers of a node. */
export class ContainerCreation {
  readonly #containers: NodeContainers;

  constructor(containers: NodeContainers) {
    this.#containers = containers;
  }

  /** Creates an attempt's container, or takes up the one that is there. Throws EngineError: start_failed, policy. */
  async createOrAdopt(key: AttemptKey, body: ContainerBody, signal: AbortSignal): Promise<CreatedContainer> {
    const name = containerName(key.instanceId, key.attempt);
    // Twice at most: the second time after a container of another specification was taken away.
    for (;;) {
      try {
        const id = await this.#containers.create(name, body, signal);
        return { id, ran: false, network: body.HostConfig?.NetworkMode ?? "" };
      } catch (error) {
        if (refusalOf(error)?.status !== 409) throw startFailure(error, body.HostConfig?.NetworkMode ?? "");
      }
      const found = await this.#containers.inspect(name, signal);
      if (found === undefined) continue;
      if (!this.#containers.belongsTo(found, key)) {
        throw new EngineError("failed", `a container named ${name} is there that this node did not create`);
      }
      if (found.Config.Labels[specDigestLabel] === body.Labels?.[specDigestLabel])
        return { id: found.Id, ran: hasRun(found), network: found.HostConfig.NetworkMode ?? "" };
      if (hasRun(found)) throw new EngineError("policy", `${name} was started with another specification`);
      await this.#containers.remove(found.Id, signal);
    }
  }
}

/** What a refused create or start is to the customer. */
export function startFailure(error: unknown, network: string): unknown {
  if (!(error instanceof EngineError) || error.kind === "away" || refusalOf(error) === undefined) return error;
  // Nothing that the customer did: it is tried again, with another network.
  if (isNetworkMissing(error, network)) return error;
  return new EngineError("start_failed", error.message, { cause: error });
}

/** Whether an engine refused because the container's network is not there. By its name, which no customer knows. */
export function isNetworkMissing(error: unknown, network: string): boolean {
  return refusalOf(error)?.message.includes(`network ${network} not found`) === true;
}
