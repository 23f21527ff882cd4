// Heartbeats of all sessions are recorded together: one transaction for what came in a while, instead of one for each
// of thousands of agents. One that comes alone is recorded at once. A heartbeat is acknowledged after the commit,
// because an agent counts its lease from the last one that was.
import type { Heartbeat } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import type { NodeSession } from "./node-session.ts";
import { recordSessionHeartbeats } from "./store.ts";

/** Nodes in one transaction. */
const maxBatch = 500;

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
    const waiting = this.#waiting.get(session);
    if (waiting !== undefined) this.#waiting.set(session, { ...waiting, gpus: [] });
    await this.#flushing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearTimeout(this.#timer);
    await this.#flushing;
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
      // Each session's loop holds its last message until the next one comes.
      for (const [, heartbeat] of batch) heartbeat.gpus = [];
    }
  }

  async #record(batch: readonly (readonly [NodeSession, Heartbeat])[]): Promise<void> {
    // A session that is over speaks for nobody.
    const live = batch.filter(([session]) => !session.link.isOver);
    if (live.length === 0) return;
    await this.#options.database.system(async (tx) => {
      const current = await recordSessionHeartbeats(
        tx,
        live.map(([session]) => ({ nodeId: session.nodeId, sessionId: session.id })),
        this.#options.clock(),
      );
      const heard = live.filter(([session]) => current.has(session.id));
      await this.#options.nodes.recordHeartbeats(
        tx,
        heard.map(([session, heartbeat]) => ({
          nodeId: session.nodeId,
          gpus: heartbeat.gpus,
          acceptingWork: heartbeat.acceptingWork,
          acceptingWorkMessage: heartbeat.acceptingWorkMessage,
          observedGeneration: heartbeat.observedGeneration,
        })),
      );
      tx.afterCommit(() => {
        for (const [session, heartbeat] of heard) session.acknowledgeHeartbeat(heartbeat.sequence);
      });
    });
  }
}
