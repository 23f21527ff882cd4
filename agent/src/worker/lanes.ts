// One lane an instance: at most one step of an instance is under way, at most so many in all, and a step that failed
// waits before it is taken again.

import type { InstanceId } from "@clodei/proto/ids";
import type { Logger } from "pino";
import { EngineError } from "../containers/engine-error.ts";
import { messageOf } from "../error-reason.ts";
import type { Executor } from "./executor.ts";
import type { Action, AttemptKey, StartingAttempt } from "./model.ts";

/** Pulls and creates at once: more only make each other slower on one disk. */
const maxStarts = 8;
/** Everything else at once. A stop may take two minutes, so there must be room for others. */
const maxOthers = 64;
const firstRetryMs = 250;
const maxRetryMs = 30_000;
/** So often a start is tried while the engine answers, before the attempt is given up as an error of the node. */
const maxStartTries = 8;

interface Lane {
  readonly action: Action;
  readonly controller: AbortController;
  readonly done: Promise<void>;
}

interface Failure {
  readonly count: number;
  readonly notBeforeMs: number;
  /** Failures while the engine answered. */
  readonly ownCount: number;
}

/** The steps under way. */
export class Lanes {
  readonly #executor: Executor;
  readonly #log: Logger;
  readonly #onDone: () => void;
  readonly #isWanted: (key: AttemptKey) => boolean;
  readonly #lanes = new Map<InstanceId, Lane>();
  readonly #failures = new Map<InstanceId, Failure>();
  #closed = false;

  constructor(options: {
    readonly executor: Executor;
    readonly log: Logger;
    readonly onDone: () => void;
    readonly isWanted: (key: AttemptKey) => boolean;
  }) {
    this.#executor = options.executor;
    this.#log = options.log;
    this.#onDone = options.onDone;
    this.#isWanted = options.isWanted;
  }

  get isIdle(): boolean {
    return this.#lanes.size === 0;
  }

  /** The instances of which a step is under way. */
  busy(): Set<InstanceId> {
    return new Set(this.#lanes.keys());
  }

  /** The starts under way. */
  starts(): StartingAttempt[] {
    return [...this.#lanes.values()].flatMap(({ action }) => (action.kind === "start" ? [action] : []));
  }

  /** Begins what there is room for. Returns after how many milliseconds a step that failed may be taken again. */
  take(actions: readonly Action[]): number {
    const nowMs = performance.now();
    let retryMs = Number.POSITIVE_INFINITY;
    for (const action of actions) {
      if (this.#closed || this.#lanes.has(action.instanceId)) continue;
      const waitMs = (this.#failures.get(action.instanceId)?.notBeforeMs ?? 0) - nowMs;
      if (waitMs > 0) retryMs = Math.min(retryMs, waitMs);
      else if (this.#hasRoom(action)) this.#begin(action);
    }
    return retryMs;
  }

  /** Cuts off starts that nobody wants any more. */
  abortUnwanted(): void {
    for (const { action, controller } of this.#lanes.values()) {
      if (action.kind === "start" && !this.#isWanted(action)) controller.abort();
    }
  }

  /** Cuts everything off and waits for it. */
  async close(): Promise<void> {
    this.#closed = true;
    const lanes = [...this.#lanes.values()];
    for (const { controller } of lanes) controller.abort();
    await Promise.all(lanes.map(({ done }) => done));
  }

  #hasRoom(action: Action): boolean {
    const starts = this.starts().length;
    return action.kind === "start" ? starts < maxStarts : this.#lanes.size - starts < maxOthers;
  }

  #begin(action: Action): void {
    const controller = new AbortController();
    const done = this.#run(action, controller.signal).finally(() => {
      this.#lanes.delete(action.instanceId);
      this.#onDone();
    });
    this.#lanes.set(action.instanceId, { action, controller, done });
  }

  async #run(action: Action, signal: AbortSignal): Promise<void> {
    try {
      await this.#executor.take(action, signal);
      this.#failures.delete(action.instanceId);
    } catch (error) {
      if (signal.aborted) return;
      this.#fail(action, error);
    }
  }

  #fail(action: Action, error: unknown): void {
    const before = this.#failures.get(action.instanceId);
    const count = (before?.count ?? 0) + 1;
    // While the engine is away nothing is the attempt's fault, and nothing is planned: once it is back, whoever was
    // cut off by it goes on at once.
    const away = error instanceof EngineError && error.kind === "away";
    const ownCount = (before?.ownCount ?? 0) + (error instanceof EngineError && !away ? 1 : 0);
    const waitMs = away ? firstRetryMs : Math.min(maxRetryMs, firstRetryMs * 2 ** Math.min(count - 1, 10));
    this.#failures.set(action.instanceId, { count, ownCount, notBeforeMs: performance.now() + waitMs });
    this.#log.warn(
      { instanceId: action.instanceId, attempt: action.attempt, step: action.kind, count, error: messageOf(error) },
      "a step failed and is taken again",
    );
    if (action.kind !== "start" || ownCount < maxStartTries) return;
    try {
      this.#executor.giveUp(action, error);
      this.#failures.delete(action.instanceId);
    } catch (failure) {
      this.#log.warn({ error: messageOf(failure) }, "giving up could not be journaled; it is tried again");
    }
  }
}
