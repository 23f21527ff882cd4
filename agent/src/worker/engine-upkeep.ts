// What the engine needs beside the instances: its events are heard, networks are ready before a start asks for one, and
// what belongs to no attempt is removed.

import type { Logger } from "pino";
import type { ContainerEngine } from "../containers/engine.ts";
import { messageOf } from "../error-reason.ts";
import { sleep } from "../sleep.ts";

/** What belongs to no attempt is looked for this often, at most. */
const sweepEveryMs = 15_000;
/** Whether networks that starts took are to be replaced is looked at this often. */
const prepareEveryMs = 250;
/** Where none could be made: the addresses are used up, or the engine refuses. */
const prepareAgainMs = 15_000;
/** After the engine's events broke off. */
const listenAgainMs = 1000;

/** Keeps house in the engine. */
export class EngineUpkeep {
  readonly #engine: ContainerEngine;
  readonly #log: Logger;
  #sweptMs = Number.NEGATIVE_INFINITY;

  constructor(engine: ContainerEngine, log: Logger) {
    this.#engine = engine;
    this.#log = log;
  }

  /** Calls `onEvent` for each of the engine's events, and after each time that they broke off, until the signal. */
  async listen(signal: AbortSignal, onEvent: () => void): Promise<void> {
    while (!signal.aborted) {
      try {
        for await (const _ of this.#engine.events(signal)) onEvent();
      } catch (error) {
        if (!signal.aborted) this.#log.debug({ error: messageOf(error) }, "the engine's events broke off");
      }
      // What happened while nobody listened is seen at the next look.
      onEvent();
      await sleep(listenAgainMs, signal);
    }
  }

  /**
   * Keeps networks ready for the next starts, and takes them away in the end: another process could not tell them.
   *
   * @param dropMs So long that may take.
   */
  async keepNetworks(signal: AbortSignal, dropMs: number, takesWork: () => boolean): Promise<void> {
    while (!signal.aborted) {
      try {
        if (takesWork()) await this.#engine.prepareNetworks(signal);
        await sleep(prepareEveryMs, signal);
      } catch (error) {
        if (!signal.aborted) this.#log.warn({ error: messageOf(error) }, "no network could be made ready");
        await sleep(prepareAgainMs, signal);
      }
    }
    try {
      await this.#engine.dropNetworks(AbortSignal.timeout(dropMs));
    } catch (error) {
      this.#log.debug({ error: messageOf(error) }, "networks were left to the next start");
    }
  }

  /**
   * Removes what belongs to no attempt: networks without a container, and containers with this node's label alone. Does
   * nothing where it did so a moment ago.
   */
  async sweep(signal: AbortSignal): Promise<void> {
    const nowMs = performance.now();
    if (nowMs - this.#sweptMs < sweepEveryMs) return;
    this.#sweptMs = nowMs;
    try {
      const removed = await this.#engine.removeNameless(signal);
      if (removed > 0) this.#log.warn({ removed }, "removed containers that named no attempt");
      const cleared = await this.#engine.clearStrays(signal);
      if (cleared > 0) this.#log.warn({ cleared }, "ended what was left of containers that the engine does not know");
    } catch (error) {
      if (!signal.aborted) this.#log.warn({ error: messageOf(error) }, "looking for what was left behind failed");
    }
    try {
      await this.#engine.sweepNetworks(signal);
    } catch (error) {
      if (!signal.aborted)
        this.#log.warn({ error: messageOf(error) }, "a network that nobody needs could not be removed");
    }
  }
}
