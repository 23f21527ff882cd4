// A reconciler takes no input: it looks at the database and brings it closer to what should be. A hint runs it
// at once and a timer runs it anyway, so that a lost hint costs time and never correctness.
import { setTimeout as sleep } from "node:timers/promises";
import type { Log } from "./log.ts";
import type { Topic, Wakeups } from "./wakeups.ts";

/** What a reconciler does, and when. */
export type ReconcilerOptions = {
  readonly name: string;
  /** Hints that run it at once. */
  readonly topics: readonly Topic[];
  /** The longest pause between two runs. */
  readonly intervalMs: number;
  /** One pass. Never overlaps itself. An error is logged, and the next pass comes as ever. */
  readonly run: (signal: AbortSignal) => Promise<void>;
  readonly log: Log;
  readonly wakeups: Wakeups;
};

const errorPauseMs = 200;

/** Starts a reconciler. Disposing of it aborts the pass that runs and waits for its end. */
export function startReconciler(options: ReconcilerOptions): AsyncDisposable {
  const stop = new AbortController();
  const { signal } = stop;
  let hinted = false;
  let wake: (() => void) | undefined;
  const subscription = options.wakeups.subscribe(options.topics, () => {
    hinted = true;
    wake?.();
  });
  const pause = (): Promise<void> =>
    new Promise((resolve) => {
      if (hinted || signal.aborted) {
        resolve();
        return;
      }
      const timer = setTimeout(done, options.intervalMs);
      function done(): void {
        clearTimeout(timer);
        wake = undefined;
        resolve();
      }
      wake = done;
    });
  const loop = async (): Promise<void> => {
    while (!signal.aborted) {
      // A hint that comes during the pass must run another one: what it hints at may not have been seen.
      hinted = false;
      try {
        await options.run(signal);
      } catch (error) {
        if (!signal.aborted) options.log.error({ err: error, reconciler: options.name }, "a reconciler's pass failed");
        // Hints go on while the fault lasts: without a pause they would make it a busy loop.
        await sleep(errorPauseMs, undefined, { signal }).catch(() => undefined);
      }
      await pause();
    }
  };
  const running = loop();
  return {
    async [Symbol.asyncDispose](): Promise<void> {
      subscription[Symbol.dispose]();
      stop.abort();
      wake?.();
      await running;
    },
  };
}
