// Heartbeats of all sessions are recorded together: one transaction for what came in a while, instead of one for each
// of thousands of agents. One that comes alone is recorded at once. A heartbeat is acknowledged after the commit,
// because an agent counts its lease from the last one that was.
//
// What a heartbeat says of its node is rarely news, and then taken in apart from that, some nodes at a time.
// When a whole fleet comes back everything is news: no agent's lease may run out because others' words are written down.
import { setImmediate as nextTurn } from "node:timers/promises";
import type { Heartbeat } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { NodeId } from "@clodei/proto/ids";
import type { HeartbeatFacts, NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import { type Database, DatabaseAwayError } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import type { NodeSession } from "./node-session.ts";
import { lockStandingSessions, recordSessionHeartbeats } from "./store.ts";

/** Nodes in one transaction. */
const maxBatch = 500;
/** Nodes whose news one transaction takes in: others that want to change one of them wait for it. */
const maxNews = 16;
/** Acknowledged at a time: each is encoded and encrypted, and meanwhile the process does nothing else. */
const maxAcknowledged = 20;

type Beat = readonly [NodeSession, Heartbeat];

/** Collects heartbeats, and records them. */
export class HeartbeatBatcher implements AsyncDisposable {
  readonly #options: {
    readonly database: Database;
    readonly nodes: NodesService;
    readonly clock: Clock;
    readonly log: Log;
    readonly batchMs: number;
  };
  /** The newest heartbeat of each session: an older one that waits has nothing to add. */
  #waiting = new Map<NodeSession, Heartbeat>();
  #timer: NodeJS.Timeout | undefined;
  #recordedMs = Number.NEGATIVE_INFINITY;
  #flushing: Promise<void> = Promise.resolve();
  /** Acknowledged ones that say something new, or may: the newest of each session. */
  readonly #news = new Map<NodeSession, Heartbeat>();
  /** Whose news the transaction takes in that is under way. */
  #inApplication: ReadonlySet<NodeSession> = new Set();
  /** That transaction, or the last one. */
  #application: Promise<void> = Promise.resolve();
  #applying: Promise<void> | undefined;
  #closed = false;

  constructor(options: { database: Database; nodes: NodesService; clock: Clock; log: Log; batchMs: number }) {
    this.#options = options;
  }

  /** Takes a heartbeat in. It is recorded, and acknowledged, in a moment. */
  add(session: NodeSession, heartbeat: Heartbeat): void {
    this.#waiting.set(session, heartbeat);
    this.#timer ??= setTimeout(
      () => {
        this.#timer = undefined;
        this.#recordedMs = performance.now();
        this.#flushing = this.#flushing.then(() => this.#flush());
      },
      Math.max(0, this.#recordedMs + this.#options.batchMs - performance.now()),
    );
  }

  /**
   * Makes room for a new inventory of the session: what its heartbeats said of GPUs before is not to be recorded after it.
   * A GPU that has just fallen ill would be given away until the next heartbeat.
   */
  async beforeInventory(session: NodeSession): Promise<void> {
    forgetGpus(this.#waiting, session);
    await this.#flushing;
    forgetGpus(this.#news, session);
    await this.#application;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    await this.#flushing;
    await this.#applying;
  }

  async #flush(): Promise<void> {
    const waiting = [...this.#waiting];
    this.#waiting = new Map();
    for (let start = 0; start < waiting.length; start += maxBatch) {
      const batch = waiting.slice(start, start + maxBatch);
      try {
        await this.#record(batch);
      } catch (error) {
        // Not acknowledged: the agents send the next one, and the lease has room for two that are lost.
        this.#options.log.warn({ err: error, heartbeats: batch.length }, "heartbeats could not be recorded");
      }
    }
    if (this.#news.size > 0) this.#applying ??= this.#apply().finally(() => (this.#applying = undefined));
  }

  /** Extends leases, notes whose news is to be taken in, and acknowledges. */
  async #record(batch: readonly Beat[]): Promise<void> {
    const live = batch.filter(isLive);
    if (live.length === 0) return;
    const { database, nodes, clock } = this.#options;
    // Whose older one still waits to be taken in: it would be the last word. Before the transaction, because the locks of
    // this one may be gone, and the older one be taken in, before we hear of the commit.
    const overtaking = new Set(live.map(sessionOf).filter((session) => this.#isBehind(session)));
    const { heard, saysNew } = await database.system(async (tx) => {
      const current = await recordSessionHeartbeats(tx, live.map(sessionOf), clock());
      const standing = live.filter(([session]) => current.has(session.id));
      const news = await nodes.recordHeartbeats(tx, standing.map(factsOf));
      return { heard: standing, saysNew: new Set<NodeId>(news.map(({ nodeId }) => nodeId)) };
    });
    for (const [session, heartbeat] of heard) {
      if (overtaking.has(session) || saysNew.has(session.nodeId)) this.#news.set(session, heartbeat);
    }
    await acknowledge(heard);
  }

  #isBehind(session: NodeSession): boolean {
    return this.#news.has(session) || this.#inApplication.has(session);
  }

  async #apply(): Promise<void> {
    const { log } = this.#options;
    while (this.#news.size > 0 && !this.#closed) {
      const some = this.#news.entries().take(maxNews).toArray();
      this.#inApplication = new Set(some.map(([session]) => session));
      for (const session of this.#inApplication) this.#news.delete(session);
      this.#application = this.#takeIn(some).catch((error: unknown) => {
        // Still news at the next heartbeat.
        log.warn({ err: error, heartbeats: some.length }, "what heartbeats say could not be taken in");
        if (error instanceof DatabaseAwayError) this.#news.clear();
      });
      await this.#application;
      this.#inApplication = new Set();
    }
  }

  async #takeIn(news: readonly Beat[]): Promise<void> {
    const live = news.filter(isLive);
    if (live.length === 0) return;
    await this.#options.database.system(async (tx) => {
      const current = await lockStandingSessions(tx, live.map(sessionOf));
      const standing = live.filter(([session]) => current.has(session.id));
      await this.#options.nodes.applyHeartbeats(tx, standing.map(factsOf));
    });
  }
}

async function acknowledge(beats: readonly Beat[]): Promise<void> {
  for (let start = 0; start < beats.length; start += maxAcknowledged) {
    if (start > 0) await nextTurn();
    for (const [session, { sequence }] of beats.slice(start, start + maxAcknowledged)) {
      session.acknowledgeHeartbeat(sequence);
    }
  }
}

function forgetGpus(heartbeats: Map<NodeSession, Heartbeat>, session: NodeSession): void {
  const heartbeat = heartbeats.get(session);
  if (heartbeat !== undefined) heartbeats.set(session, { ...heartbeat, gpus: [] });
}

/** A session that is over speaks for nobody. */
function isLive([session]: Beat): boolean {
  return !session.link.isOver;
}

function sessionOf([session]: Beat): NodeSession {
  return session;
}

function factsOf([session, heartbeat]: Beat): HeartbeatFacts {
  return {
    nodeId: session.nodeId,
    gpus: heartbeat.gpus,
    acceptingWork: heartbeat.acceptingWork,
    acceptingWorkMessage: heartbeat.acceptingWorkMessage,
    observedGeneration: heartbeat.observedGeneration,
  };
}
