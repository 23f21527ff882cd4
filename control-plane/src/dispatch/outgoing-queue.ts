// What waits for one agent to read it. grpc-js buffers without limit, and its own measure counts messages and not
// bytes, so the bytes are counted here: an agent that does not read is dropped, and takes the whole state again
// when it comes back.
import type { DispatchLimits } from "./limits.ts";

/** Hands bytes to the transport, which calls back when they left for the wire. */
export type WriteBytes = (bytes: Buffer, flushed: () => void) => void;

/** Why an agent is dropped. */
export type Overflow = "too_many_bytes" | "not_read_in_time";

/** What gRPC puts before every message: without it, many empty ones would weigh nothing. */
const frameHeaderBytes = 5;

/** The messages that wait for one agent. */
export class OutgoingQueue {
  readonly #write: WriteBytes;
  readonly #limits: Pick<DispatchLimits, "maxQueuedBytes" | "maxQueuedMs">;
  readonly #onOverflow: (why: Overflow) => void;
  /** When each waiting message was sent, in order. */
  readonly #waitingSinceMs: number[] = [];
  #queuedBytes = 0;
  #overflowed = false;

  constructor(
    write: WriteBytes,
    limits: Pick<DispatchLimits, "maxQueuedBytes" | "maxQueuedMs">,
    onOverflow: (why: Overflow) => void,
  ) {
    this.#write = write;
    this.#limits = limits;
    this.#onOverflow = onOverflow;
  }

  /** Bytes that wait. */
  get queuedBytes(): number {
    return this.#queuedBytes;
  }

  /**
   * Sends a message, unless the agent has been dropped. One message may pass the bound alone, so that a large
   * desired set can be sent at all; the next one finds the queue full.
   *
   * @param flushed Called when the message left for the wire.
   */
  send(bytes: Buffer, flushed?: () => void): void {
    if (this.#overflowed) return;
    const length = bytes.length + frameHeaderBytes;
    if (this.#queuedBytes > 0 && this.#queuedBytes + length > this.#limits.maxQueuedBytes) {
      this.#overflow("too_many_bytes");
      return;
    }
    this.#queuedBytes += length;
    this.#waitingSinceMs.push(performance.now());
    this.#write(bytes, () => {
      this.#queuedBytes -= length;
      this.#waitingSinceMs.shift();
      flushed?.();
    });
  }

  /** Drops the agent where its oldest message has waited too long. Called from time to time. */
  checkAge(): void {
    const oldest = this.#waitingSinceMs[0];
    if (oldest !== undefined && performance.now() - oldest > this.#limits.maxQueuedMs)
      this.#overflow("not_read_in_time");
  }

  #overflow(why: Overflow): void {
    if (this.#overflowed) return;
    this.#overflowed = true;
    this.#onOverflow(why);
  }
}
