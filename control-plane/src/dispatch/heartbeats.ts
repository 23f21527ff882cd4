// Heartbeats of all sessions are recorded together: one transaction for what came in a while, instead of one for each
// of thousands of agents. One that comes alone is recorded at once. A heartbeat is acknowledged after the commit,
// because an agent counts its lease from the last one that was.
//
// What a heartbeat says of its node is rarely news, and then taken in after it is acknowledged, some nodes at a time.
// When a whole fleet comes back everything is news: no agent's lease may run out because others' words are written down.
import type { NodesService, HeartbeatFacts } from "../nodes/service.ts";
import type { Heartbeat } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import type { NodeSession } from "./node-session.ts";
import { recordSessionHeartbeats } from "./store.ts";

/** Nodes in one transaction. */
const maxBatch = 500;
/** Nodes whose news one transaction takes in: others that want to change one of them wait for it. */
const maxNews = 16;

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
  /** Those that are acknowledged and say something new. */
  readonly #news = new Map<NodeSession, Heartbeat>();
  #timer: NodeJS.Timeout | undefined;
  #recordedMs = Number.NEGATIVE_INFINITY;
  #flushing: Promise<void> = Promise.resolve();
  #applying: Promise<void> | undefined;
  /** The transaction that takes in news, while there is one. */
  #application: Promise<void> = Promise.resolve();
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
        for (const [session, heartbeat] of await this.#record(batch)) this.#news.set(session, heartbeat);
      } catch (error) {
        // Not acknowledged: the agents send the next one, and the lease has room for two that are lost.
        this.#options.log.warn({ err: error, heartbeats: batch.length }, "heartbeats could not be recorded");
      }
    }
    if (this.#news.size > 0) this.#applying ??= this.#apply().finally(() => (this.#applying = undefined));
  }

  /** Extends leases, and acknowledges. Returns those that say something new. */
  #record(batch: readonly Beat[]): Promise<Beat[]> {
    return this.#ofStanding(batch, async (tx, heard) => {
      const news = new Set(
        (await this.#options.nodes.recordHeartbeats(tx, heard.map(factsOf))).map(({ nodeId }) => nodeId),
      );
      tx.afterCommit(() => {
        for (const [session, heartbeat] of heard) session.acknowledgeHeartbeat(heartbeat.sequence);
      });
      return heard.filter(([session]) => news.has(session.nodeId));
    });
  }

  async #apply(): Promise<void> {
    while (this.#news.size > 0 && !this.#closed) {
      const some = this.#news.entries().take(maxNews).toArray();
      for (const [session] of some) this.#news.delete(session);
      this.#application = this.#ofStanding(some, async (tx, standing) => {
        await this.#options.nodes.applyHeartbeats(tx, standing.map(factsOf));
        return [];
      }).then(
        () => undefined,
        // Still news at the next heartbeat.
        (error: unknown) => this.#options.log.warn({ err: error }, "what heartbeats say could not be taken in"),
      );
      await this.#application;
    }
  }

  /** Works on the heartbeats of sessions that are their nodes', in one transaction. The others speak for nobody. */
  async #ofStanding(
    batch: readonly Beat[],
    work: (tx: SystemTx, standing: readonly Beat[]) => Promise<Beat[]>,
  ): Promise<Beat[]> {
    const live = batch.filter(([session]) => !session.link.isOver);
    if (live.length === 0) return [];
    return await this.#options.database.system(async (tx) => {
      const current = await recordSessionHeartbeats(
        tx,
        live.map(([session]) => ({ nodeId: session.nodeId, sessionId: session.id })),
        this.#options.clock(),
      );
      return await work(
        tx,
        live.filter(([session]) => current.has(session.id)),
      );
    });
  }
}

function forgetGpus(heartbeats: Map<NodeSession, Heartbeat>, session: NodeSession): void {
  const heartbeat = heartbeats.get(session);
  if (heartbeat !== undefined) heartbeats.set(session, { ...heartbeat, gpus: [] });
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
