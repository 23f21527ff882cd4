// Keeps one collector running for each container whose output must be kept, and waits for it before the container, and
// with it the engine's copy, goes.

import type { InstanceId } from "@clodei/proto/ids";
import type { Logger } from "pino";
import { messageOf } from "../error-reason.ts";
import type { LogStore } from "../logs/log-store.ts";
import { sleep } from "../sleep.ts";
import { keyText } from "./model.ts";
import type { AttemptKey } from "./model.ts";

/** A collector that fails (the engine restarts) begins again after this. */
const retryMs = 500;

/**
 * For so long a container that ended waits for its output to be copied. Copying 64 MiB takes a second or two; more
 * means that the engine cannot give it, and a stuck reader must not hold the instance's next attempt back for ever.
 */
const settleMs = 60_000;

interface Collector {
  readonly instanceId: InstanceId;
  readonly controller: AbortController;
  readonly done: Promise<void>;
}

/** The collectors of this process. */
export class LogCollectors {
  readonly #logs: LogStore;
  readonly #log: Logger;
  readonly #collectors = new Map<string, Collector>();
  readonly #complete = new Set<string>();

  constructor(logs: LogStore, log: Logger) {
    this.#logs = logs;
    this.#log = log;
  }

  /** Begins to collect, unless that is being done or was done. */
  begin(key: AttemptKey): void {
    const text = keyText(key);
    if (this.#collectors.has(text) || this.#complete.has(text)) return;
    const controller = new AbortController();
    const done = this.#collect(key, controller.signal).finally(() => this.#collectors.delete(text));
    this.#collectors.set(text, { instanceId: key.instanceId, controller, done });
  }

  /** There will be output. */
  async expect(key: AttemptKey): Promise<void> {
    await this.#logs.expect(key);
  }

  /** There will be no output any more: the container never came to be, or is gone. */
  finish(key: AttemptKey): void {
    this.#logs
      .finish(key)
      .catch((error: unknown) =>
        this.#log.warn({ error: messageOf(error) }, "the end of an attempt's output could not be noted"),
      );
  }

  /** Waits until the output of a container that ended is kept as a whole; not for ever. */
  async settle(key: AttemptKey, signal: AbortSignal): Promise<void> {
    this.begin(key);
    const collector = this.#collectors.get(keyText(key));
    if (collector !== undefined) {
      const timer = new AbortController();
      const onAbort = (): void => timer.abort();
      signal.addEventListener("abort", onAbort, { once: true });
      await Promise.race([collector.done, sleep(settleMs, timer.signal)]);
      signal.removeEventListener("abort", onAbort);
      timer.abort();
      signal.throwIfAborted();
      if (!this.#complete.has(keyText(key))) {
        this.#log.warn(
          { instanceId: key.instanceId, attempt: key.attempt },
          "the end of a container's output could not be read in time",
        );
        collector.controller.abort();
        await collector.done;
      }
    }
    this.#complete.delete(keyText(key));
  }

  /** Ends the instance's collectors and removes its logs. */
  async remove(instanceId: InstanceId): Promise<void> {
    const ofInstance = [...this.#collectors.values()].filter((collector) => collector.instanceId === instanceId);
    for (const { controller } of ofInstance) controller.abort();
    await Promise.all(ofInstance.map(({ done }) => done));
    for (const text of this.#complete) if (text.startsWith(`${instanceId}/`)) this.#complete.delete(text);
    await this.#logs.remove(instanceId);
  }

  /** Ends every collector. What they wrote stays, and the next process goes on from it. */
  async close(): Promise<void> {
    const all = [...this.#collectors.values()];
    for (const { controller } of all) controller.abort();
    await Promise.all(all.map(({ done }) => done));
  }

  async #collect(key: AttemptKey, signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        await this.#logs.collect(key, signal);
        if (!signal.aborted) this.#complete.add(keyText(key));
        return;
      } catch (error) {
        if (signal.aborted) return;
        this.#log.warn(
          { instanceId: key.instanceId, attempt: key.attempt, error: messageOf(error) },
          "collecting output failed; goes on",
        );
        await sleep(retryMs, signal);
      }
    }
  }
}
