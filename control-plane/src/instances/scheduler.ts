// Gives waiting instances their place, and follows what becomes of nodes. Reconcilers that take no input: a hint
// runs them at once, a timer anyway. Any number of replicas may run them; placement itself happens under one lock.
import type { InstanceId, NodeId } from "@clodei/proto/ids";
import type { NodesService, NodeStanding } from "../nodes/service.ts";
import {
  AllocationConflict,
  explainWaiting,
  type FleetNode,
  fitsEmptyNode,
  lockPlacement,
  occupy,
  place,
  type Placement,
  type PlacementRequest,
  type PlacementService,
  queueKey,
} from "../placement/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import { startReconciler } from "../platform/reconciler.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import type { Outcome } from "./attempts.ts";
import type { Instance } from "./model.ts";
import { Recorder } from "./recorder.ts";
import { forPlacement, placementRequestOf } from "./spec.ts";
import {
  type GpuHolder,
  hasPending,
  lockInstance,
  lockInstances,
  purgeDeleted,
  selectExpired,
  selectGpuHolders,
  selectNodesInUse,
  selectOnNode,
  selectPending,
} from "./store.ts";
import { expire, explainPending, loseNode, noteGpuHealth, noteReachability, schedule } from "./transitions.ts";
import type { Actor } from "./wire.ts";

/** What the scheduler needs. */
export type SchedulerOptions = {
  readonly database: Database;
  readonly nodes: Pick<NodesService, "standings" | "gpuTroubles" | "bumpDesiredGeneration">;
  readonly placement: PlacementService;
  readonly wakeups: Wakeups;
  readonly clock: Clock;
  readonly log: Log;
  /** How often to look without a hint. */
  readonly pollIntervalMs: number;
};

/** Placements in one transaction: the first of a burst are not to wait for the last. */
const maxPlacementsPerTransaction = 64;
/** Rows in one transaction where many instances change for one reason. */
const maxChangesPerTransaction = 200;
/** What one pass looks at; more than that wait for the first of them to leave the queue. */
const maxPendingPerPass = 10_000;
const pendingPage = 500;
/** Below the 4096 that a desired set holds by more than what is placed on one node between two looks at nodes. */
const maxInstancesPerNode = 3_500;
const retentionIntervalMs = 3_600_000;
/** Deleted instances can be read that long. */
const deletedRetentionMs = 30 * 24 * 3_600_000;
const maxPurgedPerTransaction = 500;

const system: Actor = { kind: "SYSTEM", id: "" };

/** Starts everything that happens to instances by itself. */
export function startScheduler(options: SchedulerOptions): AsyncDisposable {
  const scheduler = new Scheduler(options);
  const { log, wakeups, pollIntervalMs: intervalMs } = options;
  const stack = new AsyncDisposableStack();
  stack.use(
    startReconciler({
      name: "placement",
      topics: ["placement"],
      intervalMs,
      run: (signal) => scheduler.placePending(signal),
      log,
      wakeups,
    }),
  );
  stack.use(
    startReconciler({
      name: "instances-of-nodes",
      topics: ["instances"],
      intervalMs,
      run: (signal) => scheduler.followNodes(signal),
      log,
      wakeups,
    }),
  );
  stack.use(
    startReconciler({
      name: "instance-retention",
      topics: [],
      intervalMs: retentionIntervalMs,
      run: (signal) => scheduler.purge(signal),
      log,
      wakeups,
    }),
  );
  return stack;
}

/** One pass of each kind. */
export class Scheduler {
  readonly #options: SchedulerOptions;
  /** Nodes that hold something of as many instances as they may, at the last look at nodes. */
  #fullNodes: ReadonlySet<NodeId> = new Set();

  constructor(options: SchedulerOptions) {
    this.#options = options;
  }

  /** Places who can be placed, the first come first, and fails who waited for too long. */
  async placePending(signal: AbortSignal): Promise<void> {
    // Where nobody waits, nobody has waited for too long, either.
    if (!(await this.#options.database.look(hasPending))) return;
    let again = true;
    while (again && !signal.aborted) {
      try {
        again = await this.#options.database.system((tx) => this.#placeSome(tx));
      } catch (error) {
        // The database's word is the last: the next pass reads again who has what.
        if (!(error instanceof AllocationConflict)) throw error;
        this.#options.log.warn({ err: error }, "a placement was refused by the database");
        again = false;
      }
    }
    while (!signal.aborted && (await this.#expire())) {
      // The next ones.
    }
  }

  /** Writes onto instances what became of their nodes: revoked, silent, back, with GPUs that fell ill. */
  async followNodes(signal: AbortSignal): Promise<void> {
    const { database, nodes } = this.#options;
    const { inUse, standings } = await database.look(async (tx) => {
      const used = await selectNodesInUse(tx);
      const ids = used.map(({ nodeId }) => nodeId);
      return { inUse: used, standings: await nodes.standings(tx, ids) };
    });
    const full = inUse.filter(({ instances }) => instances >= maxInstancesPerNode);
    this.#fullNodes = new Set(full.map(({ nodeId }) => nodeId));
    // Nobody has anything on a node: there is nobody to follow one.
    if (inUse.length === 0) return;
    for (const { nodeId, hasReachable, hasUnreachable } of inUse) {
      const standing = standings.get(nodeId);
      if (standing === undefined) continue;
      const now = this.#options.clock();
      if (standing.state === "revoked") {
        await this.#changeOnNode(nodeId, undefined, (instance) => loseNode(instance, now), signal);
        continue;
      }
      const reachable = isReachable(standing);
      if (reachable ? hasUnreachable : hasReachable) {
        await this.#changeOnNode(nodeId, !reachable, (instance) => noteReachability(instance, reachable), signal);
      }
    }
    await this.#followGpus(signal);
  }

  async #followGpus(signal: AbortSignal): Promise<void> {
    const { database, nodes } = this.#options;
    const { troubles, changed } = await database.look(async (tx) => {
      const byNode = await nodes.gpuTroubles(tx);
      const holders = await selectGpuHolders(tx, [...byNode.keys()]);
      const isOther = ({ nodeId, gpus }: GpuHolder): boolean =>
        gpus.some(({ uuid, trouble }) => trouble !== byNode.get(nodeId)?.get(uuid));
      return { troubles: byNode, changed: holders.filter(isOther).map(({ id }) => id) };
    });
    for (let begin = 0; begin < changed.length && !signal.aborted; begin += maxChangesPerTransaction) {
      const ids = changed.slice(begin, begin + maxChangesPerTransaction);
      await database.system((tx) =>
        this.#change(tx, ids, (instance) => {
          const own = instance.place === undefined ? undefined : troubles.get(instance.place.nodeId);
          return noteGpuHealth(instance, own ?? new Map());
        }),
      );
    }
  }

  /** Removes what was deleted long ago. */
  async purge(signal: AbortSignal): Promise<void> {
    const { database, placement, clock } = this.#options;
    const now = clock();
    const before = new Date(now.getTime() - deletedRetentionMs);
    let purged = maxPurgedPerTransaction;
    while (!signal.aborted && purged === maxPurgedPerTransaction) {
      purged = await database.system((tx) => purgeDeleted(tx, before, maxPurgedPerTransaction));
    }
    await database.system((tx) => placement.pruneAllocations(tx, now));
  }

  /** @returns whether there may be more. */
  async #expire(): Promise<boolean> {
    const { database, clock } = this.#options;
    const now = clock();
    return database.system(async (tx) => {
      const ids = await selectExpired(tx, now, maxChangesPerTransaction);
      await this.#change(tx, ids, (instance) => expire(instance, now));
      return ids.length === maxChangesPerTransaction;
    });
  }

  /** @returns whether to look again at once. */
  async #placeSome(tx: SystemTx): Promise<boolean> {
    const now = this.#options.clock();
    // Read without the lock, so that replicas do not queue for it when nobody waits; versions are checked below.
    const waiting = await readPending(tx);
    const pending = waiting.filter(({ status }) => status.state === "PENDING" && status.deadline > now);
    if (pending.length === 0) return false;
    await lockPlacement(tx);
    const decisions = decideAll(pending, await this.#readFleet(tx), maxPlacementsPerTransaction);
    const recorder = new Recorder(this.#options, tx, now);
    let again = decisions.more;
    for (const { instance, request, placement, message } of decisions.list) {
      if (placement === undefined && explainPending(instance, message, now) === "unchanged") continue;
      const locked = await lockInstance(tx, instance.id);
      if (locked?.version !== instance.version) {
        // Its customer was faster. What was meant for it is free for the others, at the next look.
        again = true;
        continue;
      }
      if (placement === undefined) {
        await recorder.apply(locked, explainPending(locked, message, now), system);
      } else {
        const { id: instanceId, organizationId, attempt } = locked;
        await this.#options.placement.allocate(tx, { instanceId, organizationId, attempt }, request, placement, now);
        await recorder.apply(locked, schedule(locked, placement), system);
      }
    }
    await recorder.finish();
    return again;
  }

  async #readFleet(tx: SystemTx): Promise<FleetNode[]> {
    const fleet = await this.#options.placement.readFleet(tx);
    return fleet.map((node) =>
      this.#fullNodes.has(node.id) ? { ...node, obstacle: node.obstacle ?? "not_accepting" } : node,
    );
  }

  async #changeOnNode(
    nodeId: NodeId,
    reachable: boolean | undefined,
    transition: (instance: Instance) => Outcome,
    signal: AbortSignal,
  ): Promise<void> {
    let changed = maxChangesPerTransaction;
    while (!signal.aborted && changed === maxChangesPerTransaction) {
      changed = await this.#options.database.system(async (tx) => {
        const ids = await selectOnNode(tx, nodeId, reachable, maxChangesPerTransaction);
        await this.#change(tx, ids, transition);
        return ids.length;
      });
    }
  }

  async #change(tx: SystemTx, ids: readonly InstanceId[], transition: (instance: Instance) => Outcome): Promise<void> {
    if (ids.length === 0) return;
    const recorder = new Recorder(this.#options, tx, this.#options.clock());
    for (const instance of await lockInstances(tx, ids)) await recorder.apply(instance, transition(instance), system);
    await recorder.finish();
  }
}

/** What shall become of a waiting instance: a place, or the reason why there is none. */
export type Decision = {
  readonly instance: Instance;
  readonly request: PlacementRequest;
  readonly placement: Placement | undefined;
  readonly message: string;
};

/**
 * Decides about waiting instances in the order of their queue. A request that some node could take when empty holds
 * up those behind it in its own queue; one that no node could ever take holds up nobody.
 */
export function decideAll(
  pending: readonly Instance[],
  fleet: readonly FleetNode[],
  maxPlacements: number,
): { readonly list: Decision[]; readonly more: boolean } {
  const list: Decision[] = [];
  const blocked = new Set<string>();
  const messages = new Map<string, string>();
  let current = fleet;
  let placements = 0;
  for (const instance of pending) {
    const request = placementRequestOf(instance);
    const queue = queueKey(request);
    const placement = blocked.has(queue) ? undefined : place(request, current);
    if (placement !== undefined) {
      if (placements === maxPlacements) return { list, more: true };
      placements += 1;
      current = occupy(current, request, placement);
      list.push({ instance, request, placement, message: "" });
      continue;
    }
    if (current.some((node) => node.obstacle === undefined && fitsEmptyNode(request, node))) blocked.add(queue);
    const key = JSON.stringify(request);
    const message = messages.get(key) ?? explainWaiting(request, fleet);
    messages.set(key, message);
    list.push({ instance, request, placement, message });
  }
  return { list, more: false };
}

/** A node in quarantine takes no new work, and may answer all the same. */
function isReachable(node: NodeStanding): boolean {
  return node.state === "ready" || (node.state === "quarantined" && node.connected);
}

async function readPending(tx: SystemTx): Promise<Instance[]> {
  const pending: Instance[] = [];
  let page: Instance[];
  do {
    const last = pending.at(-1);
    const after = last?.status.state === "PENDING" ? { queueTime: last.status.queueTime, id: last.id } : undefined;
    page = await selectPending(tx, after, pendingPage);
    pending.push(...page.map((instance) => ({ ...instance, spec: forPlacement(instance.spec) })));
  } while (page.length === pendingPage && pending.length < maxPendingPerPass);
  return pending;
}
