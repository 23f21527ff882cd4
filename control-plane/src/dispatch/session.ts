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
  /** Made where somebody asks for it: two kilobytes that most of thousands of sessions never need. */
  #ended: AbortController | undefined;
  #isGone = false;
  /** Ends `receive`. */
  #leave: () => void = () => undefined;
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

  /** Whether nothing more can be said or heard. */
  get isGone(): boolean {
    return this.#isGone;
  }

  /** Aborts when nothing more can be said or heard. */
  get ended(): AbortSignal {
    this.#ended ??= new AbortController();
    if (this.#isGone) this.#ended.abort();
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

  /**
   * Hands over what the agent says, in order and one at a time, until either side ends the stream. A message that takes
   * no promise to take is done with at once: for most of an agent's life each one is a heartbeat, and what a loop would
   * keep between two of them is kept for thousands of agents.
   *
   * @param take Returns a promise where the next message has to wait.
   * @returns Resolves at the end. Rejects with what `take` rejected with; `take` itself must not throw.
   */
  receive(take: (message: Received<typeof SessionRequestSchema>) => Promise<void> | undefined): Promise<void> {
    const stream = this.#stream;
    return new Promise((resolve) => {
      let taking: Promise<void> | undefined;
      const leave = (): void => {
        stream.off("data", hear).pause();
        // What is being taken in is first done with: the end of a session must not overtake its beginning.
        resolve(taking);
      };
      const goOn = (): void => {
        taking = undefined;
        if (this.#isOver) leave();
        else stream.resume();
      };
      const hear = (message: Received<typeof SessionRequestSchema>): void => {
        if (this.#isOver) return leave();
        taking = take(message);
        if (taking === undefined) return;
        stream.pause();
        taking.then(goOn, leave);
      };
      // The agent has no more to say, or the connection broke, or the agent canceled.
      stream.once("end", leave).once("error", leave);
      this.#leave = leave;
      stream.on("data", hear);
      if (this.#isGone) leave();
    });
  }

  /** Ends the stream without a word, where the agent has ended its side. */
  end(): void {
    if (!this.#isOver) this.#finish(false);
  }

  #end(): void {
    this.#isOver = true;
    this.#isGone = true;
    this.#ended?.abort();
    this.#leave();
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
    this.ended.addEventListener("abort", () => clearTimeout(timer), { once: true });
  }

  #write(message: SessionResponse["message"], flushed?: () => void): void {
    this.#queue.send(encodeMessage(SessionResponseSchema, create(SessionResponseSchema, { message })), flushed);
  }
}
