// What waits to be sent in a session, in order. The transport takes a message when the one before was written, so a
// slow link shows here as a queue that grows: reports then stay in the journal, and a heartbeat takes the place of the
// one that was not sent.

import { create } from "@bufbuild/protobuf";
import { SessionRequestSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { SessionRequest } from "@clodei/proto/gen/clodei/node/v1/node_link_service";

/** What a message says. */
export type SessionMessage = Exclude<SessionRequest["message"], { case: undefined }>;

/** From so many on nothing more is put in. Probes are answered one by one, so only a broken peer comes here. */
const maxWaiting = 256;

/** The outgoing messages of a session. */
export class Outbox implements AsyncIterable<SessionRequest> {
  readonly #waiting: SessionMessage[] = [];
  #wake = Promise.withResolvers<void>();
  #closed = false;
  #onRoom: () => void = () => undefined;

  /** How many messages wait. */
  get length(): number {
    return this.#waiting.length;
  }

  /** Calls `listener` whenever a message was taken. */
  set onRoom(listener: () => void) {
    this.#onRoom = listener;
  }

  /** Puts a message in; false where the queue is full or closed, and the message is dropped. */
  push(message: SessionMessage): boolean {
    if (this.#closed) return false;
    // Only the newest state matters to a peer that reads slowly.
    if (message.case === "heartbeat" && this.#waiting.at(-1)?.case === "heartbeat") this.#waiting.pop();
    if (this.#waiting.length >= maxWaiting) return false;
    this.#waiting.push(message);
    this.#wake.resolve();
    return true;
  }

  /** Ends the stream after what waits. */
  close(): void {
    this.#closed = true;
    this.#wake.resolve();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<SessionRequest> {
    for (;;) {
      const message = this.#waiting.shift();
      if (message !== undefined) {
        yield create(SessionRequestSchema, { message });
        this.#onRoom();
        continue;
      }
      if (this.#closed) return;
      this.#wake = Promise.withResolvers<void>();
      await this.#wake.promise;
    }
  }
}
