// One bridge network for each container, made beforehand: an engine takes longer to make a network than to start the
// container. No container is ever put where another one was: a network serves once, and goes with its container. Its
// addresses are named here and not left to the engine, whose own pools hold 31 networks where nobody configured them.
import { randomBytes, randomInt } from "node:crypto";
import { containerLabels } from "@clodei/proto/node-link";
import { networkBody, networkName, type Subnet } from "./container-body.ts";
import { changeTimeoutMs, type DockerClient, isMissing, refusalOf } from "./docker-client.ts";
import type { NetworkDetails } from "./engine-answers.ts";
import { EngineError } from "./engine-error.ts";

/** A gateway, a container, and room for neither a second one nor a mistake: six addresses. */
const subnetBits = 29;
const maxSubnetTries = 64;
/** An endpoint of a container that was just removed can take a moment to go. */
const maxRemovalTries = 5;
const removalRetryMs = 100;
/** Two starts at once find one. More would cost an agent's first and last seconds more than they give. */
export const readyNetworks = 2;
/** After a network was taken a container starts: so long the engine is left to that, where nothing else is said. */
const defaultRestMs = 1000;

/** The networks of a node's containers. */
export class ContainerNetworks {
  readonly #client: DockerClient;
  readonly #nodeId: string;
  readonly #pool: SubnetPool;
  readonly #restMs: number;
  /** Names of those that nobody has used. */
  #ready: string[] = [];
  /** Names of those that no container needs to name: they are being made, ready, or taken for a container to come. */
  readonly #reserved = new Set<string>();
  #takenMs = Number.NEGATIVE_INFINITY;

  /** @param pool A network in the notation "10.213.0.0/16" from which each container's network gets 8 addresses. */
  constructor(client: DockerClient, nodeId: string, pool: string, restMs = defaultRestMs) {
    this.#client = client;
    this.#nodeId = nodeId;
    this.#pool = parsePool(pool);
    this.#restMs = restMs;
  }

  /** Returns the name of a network that nothing was ever in. Reserved until `settle`. */
  async take(signal: AbortSignal): Promise<string> {
    this.#takenMs = performance.now();
    return this.#ready.shift() ?? (await this.#make(signal));
  }

  /** The container that a network was taken for names it by now, or never will. */
  settle(name: string): void {
    this.#reserved.delete(name);
  }

  /** Makes networks ready, but not while starts want the engine for themselves. */
  async prepare(signal: AbortSignal): Promise<void> {
    while (!signal.aborted && this.#ready.length < readyNetworks && performance.now() - this.#takenMs >= this.#restMs) {
      // Not cut off by the signal: the engine would go on making a network of which nobody knows.
      const name = await this.#make(AbortSignal.timeout(changeTimeoutMs));
      // After the call: those that were ready before it may be forgotten by now.
      this.#ready.push(name);
    }
  }

  /** Those that were made ready are not to be trusted: somebody took one away. The sweep removes what is left of them. */
  forgetReady(): void {
    for (const name of this.#ready) this.#reserved.delete(name);
    this.#ready = [];
  }

  /** Removes a network. One that is not there, or not this node's, is no error. */
  async remove(name: string, signal: AbortSignal): Promise<void> {
    if (await this.#isOwn(name, signal)) await this.#removeByName(name, signal);
  }

  /**
   * Removes this node's networks that are neither reserved nor named by a container.
   *
   * @param readNamed Reads the names that containers give. Asked after the networks were listed.
   */
  async sweep(readNamed: () => Promise<ReadonlySet<string>>, signal: AbortSignal): Promise<void> {
    const ready = [...this.#ready];
    const listed = await this.#list(signal);
    // An operator's `docker network prune` takes them, because they are empty.
    if (ready.some((name) => !listed.includes(name))) this.forgetReady();
    const suspects = listed.filter((name) => !this.#reserved.has(name));
    if (suspects.length === 0) return;
    const named = await readNamed();
    const failures: unknown[] = [];
    for (const name of suspects) {
      // One that an operator's own container is in must not keep the others here.
      if (!named.has(name)) await this.#removeByName(name, signal).catch((error: unknown) => failures.push(error));
    }
    if (failures.length > 0) throw failures[0];
  }

  async #make(signal: AbortSignal): Promise<string> {
    const start = randomInt(this.#pool.subnets);
    for (let step = 0; step < Math.min(maxSubnetTries, this.#pool.subnets); step += 1) {
      const id = randomBytes(6).toString("hex");
      const name = networkName(id);
      // Before it is there: a sweep may see it sooner than the answer comes.
      this.#reserved.add(name);
      try {
        const body = networkBody(this.#nodeId, id, subnetOf(this.#pool, start + step));
        await this.#client.json("create the network", { method: "POST", path: "/networks/create", body }, signal);
        return name;
      } catch (error) {
        // One whose answer was lost is for the sweep.
        this.#reserved.delete(name);
        // Others cut their addresses from the same range; and an engine that was killed while it made a network keeps
        // the bridge for one that nobody can see.
        const message = refusalOf(error)?.message ?? "";
        if (!/overlap|already exists|conflicts with network|already used/i.test(message)) throw error;
      }
    }
    throw new EngineError("failed", `no addresses are free for another network in ${this.#pool.text}`);
  }

  async #list(signal: AbortSignal): Promise<string[]> {
    const filters = JSON.stringify({ label: [`${containerLabels.nodeId}=${this.#nodeId}`] });
    const networks = await this.#client.get("list networks", "/networks", signal, { filters });
    return (networks as NetworkDetails[]).map((network) => network.Name);
  }

  async #isOwn(name: string, signal: AbortSignal): Promise<boolean> {
    try {
      const found = (await this.#client.get("look at the network", `/networks/${name}`, signal)) as NetworkDetails;
      return found.Labels?.[containerLabels.nodeId] === this.#nodeId;
    } catch (error) {
      if (isMissing(error)) return false;
      throw error;
    }
  }

  async #removeByName(name: string, signal: AbortSignal): Promise<void> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        await this.#client.json("remove the network", { method: "DELETE", path: `/networks/${name}` }, signal);
        return;
      } catch (error) {
        if (isMissing(error)) return;
        if (attempt === maxRemovalTries || refusalOf(error)?.status !== 403) throw error;
        await new Promise((resolve) => setTimeout(resolve, removalRetryMs * attempt));
      }
    }
  }
}

/** Where the addresses are cut from. */
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
