// What other slices ask of nodes: is this certificate good, what did this agent say, which nodes are there. Every
// call takes the transaction, so that a use case owns one; hints follow its commit.
import { createHash } from "node:crypto";
import { clone } from "@bufbuild/protobuf";
import { GpuHealth, type NodeInventory, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { NodeId } from "@clodei/proto/ids";
import { Counter, type Registry } from "prom-client";
import type { Clock } from "../platform/clock.ts";
import type { SystemTx, Tx } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import type { Enrollment, Identity } from "./enrollment.ts";
import { markCertificateUsed, readCertificates, readEndedCertificates } from "./enrollment-store.ts";
import {
  type CertificateCheck,
  certificateFault,
  describeSharedGpus,
  type FleetNode,
  type NodeState,
  takesNewWork,
} from "./model.ts";
import { assertMayWork, type Hints, hintAfterCommit, lockNode, requireNode } from "./standing.ts";
import * as store from "./store.ts";

export { takesNewWork } from "./model.ts";
export type { CertificateCheck, FleetNode } from "./model.ts";
export type { NodeStanding } from "./store.ts";
export type { Authority } from "./authority.ts";
export type { ReplicaCertificate } from "./certificates.ts";
export type { Identity } from "./enrollment.ts";

/** What an agent says of itself when it opens a session. */
export type HelloFacts = {
  readonly agentVersion: string;
  readonly inventory: NodeInventory;
  readonly observedGeneration: bigint;
};

/** What a heartbeat says. */
export type HeartbeatFacts = {
  readonly nodeId: NodeId;
  readonly gpus: readonly { readonly uuid: string; readonly health: GpuHealth; readonly healthMessage: string }[];
  readonly acceptingWork: boolean;
  readonly acceptingWorkMessage: string;
  readonly observedGeneration: bigint;
};

/** What the service is made of. */
export type NodesOptions = {
  readonly enrollment: Enrollment;
  readonly clock: Clock;
  readonly wakeups: Hints;
  readonly log: Log;
  readonly registry: Registry;
  /** Time without a heartbeat after which a node counts as unreachable. */
  readonly leaseMs: number;
};

/** Leases that end in one transaction: an outage of the whole fleet is worked off in pieces. */
const maxLeasesPerPass = 500;

/** The fleet. */
export class NodesService {
  readonly #options: NodesOptions;
  readonly #quarantines: Counter;

  constructor(options: NodesOptions) {
    this.#options = options;
    this.#quarantines = new Counter({
      name: "clodei_node_quarantines_total",
      help: "Nodes that were quarantined because two processes used their identity.",
      registers: [options.registry],
    });
  }

  // ---- certificates ---------------------------------------------------------------------------------------------

  /**
   * What is known of certificates by their serials (`NodeCertificate.serial`), to be asked for every message, because
   * a session outlives its handshake. A serial that we never issued is not in the answer.
   */
  async checkCertificates(tx: SystemTx, serials: readonly string[]): Promise<ReadonlyMap<string, CertificateCheck>> {
    const records = await readCertificates(tx, serials);
    const now = this.#options.clock();
    return new Map(
      records.map((record) => [
        record.serial,
        {
          nodeId: record.nodeId,
          state: record.nodeState,
          expireTime: record.expireTime,
          fault: certificateFault(record, now),
        },
      ]),
    );
  }

  /**
   * Of certificates that were good when they were checked last, those that are not any more, but for the time: its
   * passing needs no question.
   */
  endedCertificates(tx: SystemTx, serials: readonly string[]): Promise<string[]> {
    return readEndedCertificates(tx, serials);
  }

  /**
   * The certificate was used: older ones of its node are superseded. To be called when a session opens with it.
   * Sessions that still stand on an older one end at their next check.
   */
  async certificateUsed(tx: SystemTx, serial: string): Promise<void> {
    await markCertificateUsed(tx, serial, this.#options.clock());
  }

  /**
   * Renews a node's certificate over the node link. The old one is good until the new one is used.
   *
   * @throws DomainError INVALID_ARGUMENT, NOT_FOUND, NODE_REVOKED, NODE_QUARANTINED.
   */
  renew(tx: SystemTx, nodeId: NodeId, certificateRequest: Uint8Array): Promise<Identity> {
    return this.#options.enrollment.renew(tx, nodeId, certificateRequest);
  }

  // ---- what agents say ------------------------------------------------------------------------------------------

  /**
   * Takes in a Hello: the node is ready, with this inventory, for one lease.
   *
   * @throws DomainError NOT_FOUND, NODE_REVOKED, NODE_QUARANTINED.
   */
  async recordHello(tx: SystemTx, nodeId: NodeId, facts: HelloFacts): Promise<void> {
    const before = await lockNode(tx, nodeId);
    assertMayWork(before.state);
    await store.updateNode(tx, nodeId, {
      state: "ready",
      message: "",
      connected: true,
      agentVersion: facts.agentVersion,
      inventory: facts.inventory,
      observedGeneration: facts.observedGeneration,
      // Until its first heartbeat says so, moments later: an agent whose engine is away would take work and not begin it.
      acceptingWork: false,
      acceptingWorkMessage: "its agent has not said yet whether it takes work",
    });
    await store.extendLeases(tx, [nodeId], this.#options.leaseMs);
    this.#hint(tx, "nodes", "instances");
  }

  /**
   * Takes in that several nodes were heard: extends their leases. One node once. A revoked one is not extended: end its
   * session.
   *
   * @returns those whose heartbeats say something new, for `applyHeartbeats`.
   */
  async recordHeartbeats(tx: SystemTx, heartbeats: readonly HeartbeatFacts[]): Promise<HeartbeatFacts[]> {
    const standing = await store.extendLeases(tx, heartbeats.map(nodeOf), this.#options.leaseMs);
    return heartbeats.filter((heartbeat) => isNews(heartbeat, standing.get(heartbeat.nodeId)));
  }

  /** Takes in what heartbeats say, where it is still news. */
  async applyHeartbeats(tx: SystemTx, heartbeats: readonly HeartbeatFacts[]): Promise<void> {
    const standing = await store.lockForHeartbeat(tx, heartbeats.map(nodeOf));
    for (const heartbeat of heartbeats)
      if (isNews(heartbeat, standing.get(heartbeat.nodeId))) await this.#applyHeartbeat(tx, heartbeat);
  }

  /** Takes in a changed inventory. @throws DomainError NOT_FOUND. */
  async recordInventory(tx: SystemTx, nodeId: NodeId, inventory: NodeInventory): Promise<void> {
    const node = await lockNode(tx, nodeId);
    if (node.state === "revoked") return;
    await store.updateNode(tx, nodeId, { inventory });
    this.#hint(tx, "nodes", "placement", "instances");
  }

  /** The node's session ended. Its state stays until the lease ends, but it gets no new work. @throws DomainError NOT_FOUND. */
  async recordDisconnect(tx: SystemTx, nodeId: NodeId): Promise<void> {
    const node = await lockNode(tx, nodeId);
    if (!node.connected) return;
    await store.updateNode(tx, nodeId, { connected: false });
    this.#hint(tx, "nodes");
  }

  /** Whether there is a node whose agent was not heard for the lease: cheap enough to be asked all the time. */
  hasExpiredLeases(tx: SystemTx): Promise<boolean> {
    return store.hasExpiredLeases(tx);
  }

  /**
   * Nodes whose agents were not heard for the lease become unreachable; what runs there goes on.
   *
   * @returns the nodes that became unreachable, some at a time: call it again while there are any.
   */
  async expireLeases(tx: SystemTx): Promise<NodeId[]> {
    const expired = await store.lockExpiredLeases(tx, maxLeasesPerPass);
    const unreachable: NodeId[] = [];
    for (const { nodeId, state } of expired) {
      if (state === "ready") {
        await store.updateNode(tx, nodeId, {
          state: "unreachable",
          connected: false,
          message: "its agent is not heard",
        });
        unreachable.push(nodeId);
      } else {
        await store.updateNode(tx, nodeId, { connected: false });
      }
    }
    if (expired.length > 0) this.#hint(tx, "nodes", "instances");
    return unreachable;
  }

  /**
   * Two processes use the node's identity: it takes no new work until an operator enrolls it again.
   *
   * @returns whether this call quarantined it; false where it was quarantined or revoked before.
   * @throws DomainError NOT_FOUND.
   */
  async quarantine(tx: SystemTx, nodeId: NodeId, message: string): Promise<boolean> {
    const node = await lockNode(tx, nodeId);
    if (node.state === "quarantined" || node.state === "revoked") return false;
    await store.updateNode(tx, nodeId, { state: "quarantined", message });
    tx.afterCommit(() => {
      this.#quarantines.inc();
      this.#options.log.error({ event: "node_quarantined", nodeId, why: message }, "a node was quarantined");
    });
    this.#hint(tx, "nodes", "instances", `node:${nodeId}`);
    return true;
  }

  // ---- what the control plane wants of a node -------------------------------------------------------------------

  /**
   * The node's desired set changed: its generation moves on, in the transaction that changed it. A tenant's
   * transaction may call it too. The replica that holds the node's session is told after the commit.
   */
  async bumpDesiredGeneration(tx: Tx, nodeId: NodeId): Promise<bigint> {
    const generation = await store.bumpDesiredGeneration(tx, nodeId);
    if (generation === undefined) throw new Error(`there is no node ${nodeId}`);
    this.#hint(tx, "nodes", `node:${nodeId}`);
    return generation;
  }

  /**
   * Of nodes whose desired sets are known in these generations, those that have newer ones: little enough to be asked
   * every second for all sessions.
   */
  newerGenerations(tx: SystemTx, known: ReadonlyMap<NodeId, bigint>): Promise<ReadonlyMap<NodeId, bigint>> {
    return store.readNewerGenerations(tx, known);
  }

  /** Every node that is not revoked, with its inventory: what placement chooses from (see `takesNewWork`). */
  fleet(tx: SystemTx): Promise<FleetNode[]> {
    return store.readFleet(tx);
  }

  /** Where nodes stand, revoked ones too: cheap enough to be asked every second for all nodes in use. */
  standings(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<ReadonlyMap<NodeId, store.NodeStanding>> {
    return store.readStandings(tx, nodeIds);
  }

  /** Every GPU with which something is wrong, by node, and what: few, and cheap enough to be asked every second. */
  gpuTroubles(tx: SystemTx): Promise<ReadonlyMap<NodeId, ReadonlyMap<string, string>>> {
    return store.readGpuTroubles(tx);
  }

  /** Writes onto nodes which of their GPUs others report as well (a cloned disk, a card that was moved, a wrong report). */
  async noteSharedGpus(tx: SystemTx): Promise<void> {
    const shared = await store.readSharedGpus(tx);
    const told = await store.readSharedGpuMessages(tx);
    const concerned = new Set([
      ...told.keys(),
      ...shared.flatMap(({ reporters }) => reporters.map(({ nodeId }) => nodeId)),
    ]);
    const messages = [...concerned].map((nodeId) => {
      const own = shared.filter(({ reporters }) => reporters.some((reporter) => reporter.nodeId === nodeId));
      return [nodeId, own.length === 0 ? "" : describeSharedGpus(nodeId, own)] as const;
    });
    const changed = new Map(messages.filter(([nodeId, message]) => message !== (told.get(nodeId) ?? "")));
    for (const { nodeId } of await store.lockNodes(tx, [...changed.keys()])) {
      await store.updateNode(tx, nodeId, { sharedGpusMessage: changed.get(nodeId) ?? "" });
    }
    if (changed.size > 0) this.#hint(tx, "nodes");
  }

  /** Nodes by id, revoked ones too, in the order of their ids. */
  nodes(tx: SystemTx, nodeIds: readonly NodeId[]): Promise<FleetNode[]> {
    return store.readNodes(tx, nodeIds);
  }

  async #applyHeartbeat(tx: SystemTx, heartbeat: HeartbeatFacts): Promise<void> {
    const before = await requireNode(tx, heartbeat.nodeId);
    const state = stateOnceHeard(before.state);
    const inventory = withHealth(before.inventory, heartbeat.gpus);
    await store.updateNode(tx, heartbeat.nodeId, {
      state,
      ...(state === "ready" ? { message: "" } : {}),
      connected: true,
      ...(inventory === undefined ? {} : { inventory }),
      acceptingWork: heartbeat.acceptingWork,
      acceptingWorkMessage: heartbeat.acceptingWorkMessage,
      observedGeneration: heartbeat.observedGeneration,
      heartbeatDigest: digestOf(heartbeat),
    });
    this.#hint(tx, "nodes");
    // Instances show whether their node is reachable, and their GPUs healthy.
    if (before.state !== state || inventory !== undefined) this.#hint(tx, "instances");
    const takesNow = takesNewWork({ ...before, state, connected: true, acceptingWork: heartbeat.acceptingWork });
    if (takesNow && (!takesNewWork(before) || inventory !== undefined)) this.#hint(tx, "placement");
  }

  #hint(tx: Tx, ...topics: Parameters<Hints["notify"]>[0][]): void {
    hintAfterCommit(tx, this.#options.wakeups, ...topics);
  }
}

function nodeOf({ nodeId }: HeartbeatFacts): NodeId {
  return nodeId;
}

/** Whether a heartbeat says what is not known of its node. Of one that is revoked, or that there is not, nothing is kept. */
function isNews(heartbeat: HeartbeatFacts, standing: store.HeartbeatState | undefined): boolean {
  if (standing === undefined) return false;
  const { state, connected, digest } = standing;
  return !connected || stateOnceHeard(state) !== state || digestOf(heartbeat) !== digest;
}

function stateOnceHeard(state: NodeState): NodeState {
  return state === "quarantined" ? state : "ready";
}

/** What of a heartbeat is kept. Times and use of the GPUs are not: they change with every one. */
function digestOf(heartbeat: HeartbeatFacts): string {
  const kept = [
    heartbeat.gpus.map(({ uuid, health, healthMessage }) => [uuid, health, healthMessage]),
    heartbeat.acceptingWork,
    heartbeat.acceptingWorkMessage,
    String(heartbeat.observedGeneration),
  ];
  return createHash("sha256").update(JSON.stringify(kept)).digest("base64url");
}

/** The inventory with the health that a heartbeat reports; undefined where nothing is different. */
function withHealth(inventory: NodeInventory | undefined, gpus: HeartbeatFacts["gpus"]): NodeInventory | undefined {
  if (inventory === undefined) return undefined;
  const reported = new Map(gpus.map((gpu) => [gpu.uuid, gpu]));
  const next = clone(NodeInventorySchema, inventory);
  let changed = false;
  for (const gpu of next.gpus) {
    const status = reported.get(gpu.uuid);
    // Absent or not stated is no news: a heartbeat may be partial, and unknown is not healthy.
    if (status === undefined || status.health === GpuHealth.UNSPECIFIED) continue;
    if (gpu.health === status.health && gpu.healthMessage === status.healthMessage) continue;
    gpu.health = status.health;
    gpu.healthMessage = status.healthMessage;
    changed = true;
  }
  return changed ? next : undefined;
}
