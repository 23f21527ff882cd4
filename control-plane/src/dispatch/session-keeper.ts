// Keeps the sessions of this process in line with the database: who may speak, whose session is the node's, who is
// being asked for, and what each node shall run. It is woken by hints and by a timer, and takes no input but the
// database's, so a hint that is lost costs a second.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { DesiredSet } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { NodeId } from "@clodei/proto/ids";
import type { InstancesService } from "../instances/service.ts";
import type { NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import type { CertificateGate, Check } from "./certificate-gate.ts";
import type { DispatchMetrics } from "./metrics.ts";
import type { NodeSession } from "./node-session.ts";
import { type PendingReconcile, reconcileContainers } from "./session-claims.ts";
import { readUnsettledSessions, type SessionRow } from "./store.ts";

/** What keeping sessions needs. */
export type SessionKeeperOptions = {
  readonly database: Database;
  readonly nodes: NodesService;
  readonly instances: InstancesService;
  readonly wakeups: Wakeups;
  readonly clock: Clock;
  readonly gate: CertificateGate;
  readonly metrics: DispatchMetrics;
  readonly log: Log;
  /** Between two looks at all sessions. */
  readonly pollIntervalMs: number;
  /** An agent that said nothing for this long has lost its session. */
  readonly leaseMs: number;
};

type Held = { readonly session: NodeSession; readonly subscription: Disposable };

/** Nodes in one query. */
const maxNodesPerQuery = 500;

/** The sessions that this process holds. */
export class SessionKeeper implements AsyncDisposable {
  readonly #options: SessionKeeperOptions;
  readonly #held = new Map<NodeId, Held>();
  readonly #arrivals = new Set<() => void>();
  readonly #hinted = new Set<NodeId>();
  readonly #stop = new AbortController();
  readonly #running: Promise<void>;
  #wake: (() => void) | undefined;

  constructor(options: SessionKeeperOptions) {
    this.#options = options;
    this.#running = this.#run();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort();
    this.#wake?.();
    await this.#running;
    for (const { subscription } of this.#held.values()) subscription[Symbol.dispose]();
  }

  /** Holds a session that was just welcomed. An older one of the same node in this process ends at once. */
  hold(session: NodeSession): void {
    const { nodeId } = session;
    const older = this.#held.get(nodeId);
    older?.subscription[Symbol.dispose]();
    const subscription = this.#options.wakeups.subscribe([`node:${nodeId}`], () => this.hint(nodeId));
    this.#held.set(nodeId, { session, subscription });
    older?.session.link.goodbye(ErrorReason.SESSION_REPLACED, replacedMessage);
    this.#options.metrics.sessions.set(this.#held.size);
    this.hint(nodeId);
    for (const arrival of [...this.#arrivals]) arrival();
  }

  /** Lets go of a session that is over. Does nothing to its successor. */
  release(session: NodeSession): void {
    const held = this.#held.get(session.nodeId);
    if (held?.session !== session) return;
    held.subscription[Symbol.dispose]();
    this.#held.delete(session.nodeId);
    this.#options.metrics.sessions.set(this.#held.size);
  }

  /** The session of a node, where this process holds it and it may still be spoken on. */
  sessionOf(nodeId: NodeId): NodeSession | undefined {
    const session = this.#held.get(nodeId)?.session;
    return session === undefined || !isLive(session) ? undefined : session;
  }

  /** All sessions that this process holds. */
  sessions(): NodeSession[] {
    return [...this.#held.values()].map(({ session }) => session);
  }

  /** Resolves at the next session that this process gets, of whatever node, or after the time. Never rejects. */
  arrival(timeoutMs: number, signal: AbortSignal): Promise<void> {
    if (signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const done = (): void => {
        this.#arrivals.delete(done);
        clearTimeout(timer);
        signal.removeEventListener("abort", done);
        resolve();
      };
      const timer = setTimeout(done, timeoutMs);
      this.#arrivals.add(done);
      signal.addEventListener("abort", done, { once: true });
    });
  }

  /** Looks at a node's session again, now. */
  hint(nodeId: NodeId): void {
    this.#hinted.add(nodeId);
    this.#wake?.();
  }

  async #run(): Promise<void> {
    let nextFullPassMs = performance.now();
    while (!this.#stop.signal.aborted) {
      const full = performance.now() >= nextFullPassMs;
      const nodeIds = full ? [...this.#held.keys()] : [...this.#hinted].filter((nodeId) => this.#held.has(nodeId));
      this.#hinted.clear();
      if (full) nextFullPassMs = performance.now() + this.#options.pollIntervalMs;
      try {
        for (let start = 0; start < nodeIds.length; start += maxNodesPerQuery) {
          await this.#pass(nodeIds.slice(start, start + maxNodesPerQuery), full);
        }
      } catch (error) {
        if (!this.#stop.signal.aborted) this.#options.log.warn({ err: error }, "sessions could not be looked at");
      }
      await this.#pause(nextFullPassMs - performance.now());
    }
  }

  #pause(timeoutMs: number): Promise<void> {
    if (this.#hinted.size > 0 || this.#stop.signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const done = (): void => {
        clearTimeout(timer);
        this.#wake = undefined;
        resolve();
      };
      const timer = setTimeout(done, Math.max(0, timeoutMs));
      this.#wake = done;
    });
  }

  async #pass(nodeIds: readonly NodeId[], full: boolean): Promise<void> {
    const { clock, gate, leaseMs } = this.#options;
    const sessions = nodeIds.flatMap((nodeId) => this.#held.get(nodeId)?.session ?? []).filter(isLive);
    if (sessions.length === 0) return;
    const { checks, unsettled, behind } = await this.#look(sessions);
    const now = clock();
    const nowMs = performance.now();
    for (const [index, session] of sessions.entries()) {
      const refusal = gate.judge(session.link.peer, checks[index], now);
      const row = unsettled.get(session.nodeId);
      if (row !== undefined && row.sessionId !== session.id) {
        // Before the certificate: a renewal supersedes the certificate of the session that it replaces.
        session.link.goodbye(ErrorReason.SESSION_REPLACED, replacedMessage);
      } else if (refusal !== undefined) {
        session.link.goodbye(refusal.reason, refusal.message, { cut: true });
      } else if (unsettled.has(session.nodeId)) {
        settle(session, row);
      }
      if (!full) continue;
      this.#checkPatience(session, nowMs);
      const pending = session.reconcileAfter;
      if (pending !== undefined && nowMs - session.beganAtMs >= leaseMs) await this.#giveUpJournal(session, pending);
    }
    if (behind.length > 0) await this.#sendSets(behind);
  }

  /** What of them is to be looked at: three questions for all, most of which are answered by nothing. */
  async #look(sessions: readonly NodeSession[]): Promise<{
    checks: readonly Check[];
    unsettled: ReadonlyMap<NodeId, SessionRow | undefined>;
    behind: NodeSession[];
  }> {
    const { database, gate } = this.#options;
    return database.look(async (tx) => {
      const readStanding = async () => {
        const checks = await gate.refresh(
          tx,
          sessions.map((session) => session.link.peer),
        );
        // Afterwards: whoever's certificate a renewal superseded is known as replaced by then.
        return { checks, unsettled: await readUnsettledSessions(tx, sessions) };
      };
      // Meanwhile: each answer that is waited for wakes the process once more.
      const [standing, generations] = await Promise.all([readStanding(), this.#newerGenerations(tx, sessions)]);
      return {
        ...standing,
        behind: sessions.filter((session) => generationToSend(session, generations) !== undefined),
      };
    });
  }

  /** Sends their nodes' desired sets to those whose generation grew. */
  async #sendSets(behind: readonly NodeSession[]): Promise<void> {
    const { database, instances } = this.#options;
    const sets = await database.system(
      async (tx) => {
        const sessions = behind.filter(isLive);
        const unsettled = await readUnsettledSessions(tx, sessions);
        const generations = await this.#newerGenerations(tx, sessions);
        const read = new Map<NodeSession, DesiredSet>();
        for (const session of sessions) {
          const generation = generationToSend(session, generations);
          if (generation === undefined) continue;
          // A session that is no longer the node's learns nothing more.
          if (unsettled.has(session.nodeId) && unsettled.get(session.nodeId)?.sessionId !== session.id) continue;
          read.set(session, await instances.desiredSet(tx, session.nodeId, generation));
        }
        return read;
      },
      // One snapshot: a set must not be older than the generation that it is sent under.
      { isolation: "repeatable read" },
    );
    for (const [session, set] of sets) if (isLive(session)) this.#sendDesired(session, set);
  }

  #newerGenerations(tx: SystemTx, sessions: readonly NodeSession[]): Promise<ReadonlyMap<NodeId, bigint>> {
    const sent = new Map(sessions.map((session) => [session.nodeId, session.sentGeneration]));
    return this.#options.nodes.newerGenerations(tx, sent);
  }

  /** Ends what has taken too long. */
  #checkPatience(session: NodeSession, nowMs: number): void {
    session.link.checkQueue();
    if (nowMs - session.heardAtMs > this.#options.leaseMs) {
      session.link.goodbye(ErrorReason.UNAVAILABLE, "nothing was heard for the lease", { cut: true });
    }
  }

  async #giveUpJournal(session: NodeSession, pending: PendingReconcile): Promise<void> {
    const { database, instances, log } = this.#options;
    if (!isLive(session)) return;
    // The agent does not send what its journal holds (it lost it). What it said in Hello is all that there is.
    log.warn({ nodeId: session.nodeId }, "a node did not send its journal: its containers are taken as Hello said");
    await database.system((tx) =>
      reconcileContainers(tx, instances, session.nodeId, session.hello, pending.bootChanged),
    );
    // After the commit: had it failed, the next pass would have to do it.
    session.reconcileAfter = undefined;
    this.hint(session.nodeId);
  }

  #sendDesired(session: NodeSession, set: DesiredSet): void {
    if (!session.wantsDesired(set.generation)) return;
    // What changed while this set was on its way is looked for once it left.
    session.sendDesired(set, () => this.hint(session.nodeId));
  }
}

const replacedMessage = "a newer session of this node replaced this one";

/** Does what the database says of a session that is its node's, or of which the database knows nothing. */
function settle(session: NodeSession, row: SessionRow | undefined): void {
  // No row: the database is an older copy of itself.
  if (row === undefined || row.endTime !== undefined)
    session.link.goodbye(ErrorReason.UNAVAILABLE, "the session ended");
  else if (row.probe !== undefined && row.probe.replyTime === undefined) session.probe(row.probe.nonce);
}

/** The node's generation, where it grew beyond what the session was sent, and the new set may be sent now. */
function generationToSend(session: NodeSession, generations: ReadonlyMap<NodeId, bigint>): bigint | undefined {
  const generation = generations.get(session.nodeId);
  // Not before Hello's containers were looked at: what is lost must not be taken for what is to be started.
  if (generation === undefined || session.reconcileAfter !== undefined) return undefined;
  return session.wantsDesired(generation) ? generation : undefined;
}

function isLive(session: NodeSession): boolean {
  return !session.link.isOver;
}
