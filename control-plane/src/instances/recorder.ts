// Writes what became of instances: row, events, feed, freed GPUs, and the hints that follow the commit. Everything
// that changes an instance goes through here, under the row's lock, so that versions and events have no gaps.
import type { NodeId } from "@clodei/proto/ids";
import type { NodesService } from "../nodes/service.ts";
import type { PlacementService } from "../placement/service.ts";
import { recordChange } from "../platform/changes.ts";
import type { SystemTx, TenantTx } from "../platform/database.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import { draftOf, type Outcome } from "./attempts.ts";
import { desiredOf, holdsAllocation, isSameDesired, type Instance } from "./model.ts";
import { insertInstance, updateInstance } from "./store.ts";
import { type Actor, toChangePayload } from "./wire.ts";

/** What a recorder needs. */
export type RecorderOptions = {
  readonly nodes: Pick<NodesService, "bumpDesiredGeneration">;
  readonly placement: Pick<PlacementService, "release">;
  readonly wakeups: Pick<Wakeups, "notify">;
};

/** Records changes of one transaction. Call `finish` last. */
export class Recorder<T extends TenantTx | SystemTx> {
  readonly #options: RecorderOptions;
  readonly #tx: T;
  readonly #now: Date;
  readonly #changedNodes = new Set<NodeId>();

  constructor(options: RecorderOptions, tx: T, now: Date) {
    this.#options = options;
    this.#tx = tx;
    this.#now = now;
  }

  /** Records what became of an instance whose row is locked. Returns it as it is now. */
  async apply(before: Instance, outcome: Outcome, actor: Actor): Promise<Instance> {
    if (outcome === "unchanged") return before;
    const tx = this.#tx;
    const { events } = outcome;
    const next: Instance = {
      ...outcome.next,
      version: before.version + 1n,
      eventCount: before.eventCount + BigInt(events.length),
      updateTime: this.#now,
    };
    const firstSequence = before.eventCount + 1n;
    await updateInstance(tx, next, before.version, { firstSequence, events, actor, time: this.#now });
    await this.#publish(next);
    const isFreed = holdsAllocation(before) && !holdsAllocation(next);
    if (isFreed) {
      // What a customer asks for ends no attempt: its node does, or the system.
      if (!("system" in tx)) throw new Error("a customer's transaction cannot free an allocation");
      await this.#options.placement.release(tx, next.id, this.#now);
    }
    const isQueued = next.status.state === "PENDING" && before.status.state !== "PENDING";
    if (isFreed || isQueued) this.#hint("placement");
    this.#noteDesired(before, next);
    return next;
  }

  /** Records a new instance. */
  async create(this: Recorder<TenantTx>, instance: Instance, actor: Actor): Promise<void> {
    const events = [draftOf(instance)];
    await insertInstance(this.#tx, instance, { firstSequence: 1n, events, actor, time: this.#now });
    await this.#publish(instance);
    this.#hint("placement");
  }

  /**
   * Moves the desired sets on that changed. Last, and in one order: rows of nodes are locked after rows of
   * instances by everyone, so that no two transactions wait for each other.
   */
  async finish(): Promise<void> {
    for (const nodeId of [...this.#changedNodes].toSorted()) {
      await this.#options.nodes.bumpDesiredGeneration(this.#tx, nodeId);
    }
    this.#changedNodes.clear();
  }

  async #publish(instance: Instance): Promise<void> {
    await recordChange(this.#tx, {
      organizationId: instance.organizationId,
      kind: "instance",
      subjectId: instance.id,
      payload: toChangePayload(instance),
    });
    this.#hint(`organization:${instance.organizationId}`);
  }

  #noteDesired(before: Instance, next: Instance): void {
    const [old, wanted] = [desiredOf(before), desiredOf(next)];
    if (isSameDesired(old, wanted)) return;
    if (old !== undefined) this.#changedNodes.add(old.nodeId);
    if (wanted !== undefined) this.#changedNodes.add(wanted.nodeId);
  }

  #hint(topic: Parameters<Wakeups["notify"]>[0]): void {
    this.#tx.afterCommit(() => this.#options.wakeups.notify(topic));
  }
}
