// One bridge network for each instance. Its addresses are named here and not left to the engine, whose own pools hold
// 31 networks where nobody configured them.
import { createHash } from "node:crypto";
import type { InstanceId } from "@clodei/proto/ids";
import { containerLabels } from "@clodei/proto/node-link";
import type { NetworkInspectInfo } from "dockerode";
import { bridgeNames, networkBody, networkName, type NetworkPlace, type Subnet } from "./container-body.ts";
import { changeTimeoutMs, type DockerClient, isMissing, lookTimeoutMs, refusalOf } from "./docker-client.ts";
import { EngineError } from "./engine-error.ts";

/** A gateway, a container, and room for neither a second one nor a mistake: six addresses. */
const subnetBits = 29;
const maxSubnetTries = 64;
/** An endpoint of a container that was just removed can take a moment to go. */
const maxRemovalTries = 5;
const removalRetryMs = 100;

/** The networks of a node's instances. */
export class InstanceNetworks {
  readonly #client: DockerClient;
  readonly #nodeId: string;
  readonly #pool: SubnetPool;

  /** @param pool A network in the notation "10.213.0.0/16" from which each instance gets 8 addresses. */
  constructor(client: DockerClient, nodeId: string, pool: string) {
    this.#client = client;
    this.#nodeId = nodeId;
    this.#pool = parsePool(pool);
  }

  /** Makes the instance's network; one that is there is taken. */
  async ensure(instanceId: InstanceId, signal: AbortSignal): Promise<void> {
    const start = createHash("sha256").update(instanceId).digest().readUInt32BE(0);
    const bridges = bridgeNames(instanceId);
    for (let step = 0; step < maxSubnetTries; step += 1) {
      const [bridge = ""] = bridges;
      try {
        await this.#create(instanceId, { ...subnetOf(this.#pool, start + step), bridge }, signal);
        return;
      } catch (error) {
        const message = refusalOf(error)?.message ?? "";
        if (/overlap/i.test(message)) continue;
        if (!/already exists|conflicts with network|already used/i.test(message)) throw error;
        // Its name, or its bridge's, is taken: by itself, made by a call whose answer was lost, or by somebody else.
        if (await this.#isOwn(instanceId, signal)) return;
        // An engine that was killed while it made the network keeps the bridge for a network that nobody can see.
        bridges.shift();
        if (bridges.length === 0) throw error;
      }
    }
    throw new EngineError("failed", `no addresses are free for another network in ${this.#pool.text}`);
  }

  /** Removes the instance's network. One that is not there, or not this node's, is no error. */
  async remove(instanceId: InstanceId, signal: AbortSignal): Promise<void> {
    if (await this.#isOwn(instanceId, signal)) await this.#removeByName(networkName(instanceId), signal);
  }

  /** Instances that have a network on this node. */
  async list(signal: AbortSignal): Promise<string[]> {
    const filters = { label: [`${containerLabels.nodeId}=${this.#nodeId}`] };
    const networks = await this.#client.call(
      "list networks",
      { signal, timeoutMs: lookTimeoutMs },
      (docker, abortSignal) => docker.listNetworks({ filters, abortSignal }),
    );
    return networks.map((network) => network.Labels?.[containerLabels.instanceId] ?? "").filter((id) => id !== "");
  }

  async #create(instanceId: InstanceId, place: NetworkPlace, signal: AbortSignal): Promise<void> {
    const body = networkBody(this.#nodeId, instanceId, place);
    await this.#client.call("create the network", { signal, timeoutMs: changeTimeoutMs }, (docker, abortSignal) =>
      docker.createNetwork({ ...body, abortSignal }),
    );
  }

  async #isOwn(instanceId: InstanceId, signal: AbortSignal): Promise<boolean> {
    try {
      const path = `/networks/${networkName(instanceId)}`;
      const found = (await this.#client.get("look at the network", path, signal)) as NetworkInspectInfo;
      return found.Labels?.[containerLabels.nodeId] === this.#nodeId;
    } catch (error) {
      if (isMissing(error)) return false;
      throw error;
    }
  }

  async #removeByName(name: string, signal: AbortSignal): Promise<void> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        await this.#client.call("remove the network", { signal, timeoutMs: changeTimeoutMs }, (docker, abortSignal) =>
          docker.getNetwork(name).remove({ abortSignal }),
        );
        return;
      } catch (error) {
        if (isMissing(error)) return;
        if (attempt === maxRemovalTries || refusalOf(error)?.status !== 403) throw error;
        await new Promise((resolve) => setTimeout(resolve, removalRetryMs * attempt));
      }
    }
  }
}

/** Where the instances' addresses are cut from. */
interface SubnetPool {
  readonly text: string;
  readonly base: number;
  readonly subnets: number;
}

function parsePool(text: string): SubnetPool {
  const match = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})\/(\d{1,2})$/.exec(text);
  const [, ...parts] = match?.map(Number) ?? [];
  const [a = -1, b = -1, c = -1, d = -1, bits = -1] = parts;
  const base = a * 2 ** 24 + b * 2 ** 16 + c * 2 ** 8 + d;
  const valid = match !== null && [a, b, c, d].every((part) => part <= 255) && bits >= 8 && bits <= subnetBits;
  if (!valid || base % 2 ** (32 - bits) !== 0) throw new RangeError(`${text} is no network for instances`);
  return { text, base, subnets: 2 ** (subnetBits - bits) };
}

function subnetOf(pool: SubnetPool, index: number): Subnet {
  const address = pool.base + (index % pool.subnets) * 2 ** (32 - subnetBits);
  return { subnet: `${addressText(address)}/${subnetBits}`, gateway: addressText(address + 1) };
}

function addressText(address: number): string {
  return [24, 16, 8, 0].map((shift) => Math.floor(address / 2 ** shift) % 256).join(".");
}
