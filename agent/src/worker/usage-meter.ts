// Journals for how long containers ran: as far as they were seen to run, and no further.

import type { Logger } from "pino";
import { messageOf } from "../error-reason.ts";
import type { AttemptBook } from "./attempt-book.ts";
import { isOver, keyText } from "./model.ts";
import type { AttemptKey } from "./model.ts";

/** What a meter works with. */
export interface UsageMeterOptions {
  readonly book: AttemptBook;
  readonly intervalMs: number;
  readonly log: Logger;
}

/** Meters the node's containers. */
export class UsageMeter {
  readonly #options: UsageMeterOptions;
  /** When each running container was last seen to run, on the boot's clock: so far its time is proved. */
  readonly #seenMs = new Map<string, number>();
  #meteredMs = Number.NEGATIVE_INFINITY;

  constructor(options: UsageMeterOptions) {
    this.#options = options;
  }

  /** A container was seen to run, at a time of the boot's clock. */
  saw(key: AttemptKey, atMs: number): void {
    this.#seenMs.set(keyText(key), atMs);
  }

  /** Journals what was seen, where an interval has passed since the last time. */
  meterWhenDue(): void {
    const nowMs = performance.now();
    if (nowMs - this.#meteredMs < this.#options.intervalMs) return;
    this.#meteredMs = nowMs;
    this.flush();
  }

  /** Journals what was seen now. */
  flush(): void {
    const { book, log } = this.#options;
    try {
      book.meter(this.#seenMs);
    } catch (error) {
      // The next interval begins where the last journaled one ended, so nothing is lost by this.
      log.warn({ error: messageOf(error) }, "usage could not be journaled");
    }
    const going = new Set(book.all().flatMap((record) => (isOver(record.phase) ? [] : [keyText(record)])));
    for (const text of this.#seenMs.keys()) if (!going.has(text)) this.#seenMs.delete(text);
  }
}
