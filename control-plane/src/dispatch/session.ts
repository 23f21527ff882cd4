// One session: the stream to one agent, what waits to be sent on it, and what it was told last. It decides nothing;
// the node's place among sessions is the database's, and the session keeper compares the two.
import { create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import type { ServerDuplexStream } from "@grpc/grpc-js";
import {
  GoodbyeSchema,
  SessionResponseSchema,
  type SessionRequestSchema,
  type SessionResponse,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { Peer } from "./certificate-gate.ts";
import { encodeMessage, type Encoded } from "./grpc-adapter.ts";
import type { Received } from "./incoming.ts";
import type { DispatchLimits } from "./limits.ts";
import { OutgoingQueue, type Overflow } from "./outgoing-queue.ts";

/** The stream of grpc-js that carries a session. */
export type SessionStream = ServerDuplexStream<
  Received<typeof SessionRequestSchema>,
  Encoded<typeof SessionResponseSchema>
>;

/** What ends a session's stream from our side. */
export type GoodbyeOptions = {
  /** The agent may come back, after a random time up to this. */
  readonly reconnectWithinMs?: number;
  /** Whether the connection goes with the stream, where the agent does not end it in time. */
  readonly cut?: boolean;
};

/** A stream that speaks the session protocol. */
export class SessionLink {
  readonly peer: Peer;
  readonly #stream: SessionStream;
  readonly #queue: OutgoingQueue;
  readonly #limits: DispatchLimits;
  readonly #cutConnection: (address: string) => void;
  readonly #ended = new AbortController();
  #goodbye: ErrorReason | undefined;
  /** Asked for every session every second, which a signal's own getter is too slow for. */
  #isOver = false;

  constructor(options: {
    peer: Peer;
    stream: SessionStream;
    limits: DispatchLimits;
    cutConnection: (address: string) => void;
    onOverflow: (why: Overflow) => void;
  }) {
    this.peer = options.peer;
    this.#stream = options.stream;
    this.#limits = options.limits;
    this.#cutConnection = options.cutConnection;
    this.#queue = new OutgoingQueue(
      (bytes, flushed) => this.#stream.write(bytes, () => flushed()),
      options.limits,
      (why) => {
        options.onOverflow(why);
        this.#end();
        this.#cutConnection(this.peer.address);
      },
    );
    const over = (): void => this.#end();
    this.#stream.once("close", over);
    this.#stream.once("cancelled", over);
  }

  /** Aborts when nothing more can be said or heard. */
  get ended(): AbortSignal {
    return this.#ended.signal;
  }

  /** The reason of the Goodbye that was sent, if any. */
  get goodbyeReason(): ErrorReason | undefined {
    return this.#goodbye;
  }

  /** Whether nothing more can be said: it ended, or is about to. */
  get isOver(): boolean {
    return this.#isOver;
  }

  get queuedBytes(): number {
    return this.#queue.queuedBytes;
  }

  /** Sends a message, unless the session is over. */
  send(message: SessionResponse["message"], flushed?: () => void): void {
    if (this.#isOver) return;
    this.#write(message, flushed);
  }

  /** Ends the session, and says why. Only the first call counts. */
  goodbye(reason: ErrorReason, message: string, options: GoodbyeOptions = {}): void {
    if (this.#isOver) return;
    this.#goodbye = reason;
    this.#isOver = true;
    this.#write({
      case: "goodbye",
      value: create(GoodbyeSchema, {
        reason,
        message: message.slice(0, 1024),
        ...(options.reconnectWithinMs === undefined
          ? {}
          : { reconnectWithin: durationFromMs(options.reconnectWithinMs) }),
      }),
    });
    this.#finish(options.cut === true);
  }

  /** Drops an agent that has not read for too long. */
  checkQueue(): void {
    this.#queue.checkAge();
  }

  /** What the agent says, in order, until either side ends the stream. Never throws. */
  async *incoming(): AsyncGenerator<Received<typeof SessionRequestSchema>> {
    try {
      // Not destroyed at the end: the stream has to carry Goodbye and its status first.
      const messages: AsyncIterable<Received<typeof SessionRequestSchema>> = this.#stream.iterator({
        destroyOnReturn: false,
      });
      for await (const message of messages) {
        if (this.#isOver) return;
        yield message;
      }
    } catch {
      // The connection broke, or the agent canceled.
    }
  }

  /** Ends the stream without a word, where the agent has ended its side. */
  end(): void {
    if (!this.#isOver) this.#finish(false);
  }

  #end(): void {
    this.#isOver = true;
    this.#ended.abort();
  }

  // What was written goes out first; an agent that does not read it in time is left.
  #finish(cut: boolean): void {
    this.#stream.end();
    const timer = setTimeout(() => {
      // The connection of a replaced session may carry its successor: that one is never cut.
      if (cut) this.#cutConnection(this.peer.address);
      this.#stream.destroy();
      this.#end();
    }, this.#limits.goodbyeTimeoutMs);
    this.#ended.signal.addEventListener("abort", () => clearTimeout(timer), { once: true });
  }

  #write(message: SessionResponse["message"], flushed?: () => void): void {
    this.#queue.send(encodeMessage(SessionResponseSchema, create(SessionResponseSchema, { message })), flushed);
  }
}
