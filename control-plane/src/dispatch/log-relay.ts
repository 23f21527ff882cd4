// Carries an attempt's output from its node to a reader: OpenLogs goes out on the session, the agent answers by
// opening UploadLogs, and what comes on it is handed on piece by piece. Nothing is collected here: while the reader
// does not take a piece, none is read from the agent, and HTTP/2 makes the agent wait.
import { randomUUID } from "node:crypto";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import type { sendUnaryData, ServerReadableStream } from "@grpc/grpc-js";
import {
  CloseLogsSchema,
  LogsRefusedReason,
  OpenLogsSchema,
  UploadLogsResponseSchema,
  type LogsRefused,
  type UploadLogsRequest,
  type UploadLogsRequestSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { NodeId, OrganizationId } from "@clodei/proto/ids";
import { DomainError } from "../platform/errors.ts";
import type { CertificateGate, Peer } from "./certificate-gate.ts";
import { encodeMessage, type Encoded } from "./grpc-adapter.ts";
import { toGrpcError } from "./grpc-errors.ts";
import type { Received } from "./incoming.ts";
import type { DispatchLimits } from "./limits.ts";
import type { DispatchMetrics } from "./metrics.ts";
import type { NodeSession } from "./node-session.ts";

/** The stream of grpc-js that carries output. */
export type UploadStream = ServerReadableStream<
  Received<typeof UploadLogsRequestSchema>,
  Encoded<typeof UploadLogsResponseSchema>
>;

/** A piece of output, or its end. */
export type LogPiece = Exclude<UploadLogsRequest["message"], { case: "start" } | { case: undefined }>;

/** What OpenLogs asks for, but for the stream's name. */
export type LogsQuery = Omit<MessageInitShape<typeof OpenLogsSchema>, "$typeName" | "streamId">;

/** The link to the agent broke. The stream can be opened again, from where it stood. */
export class LogLinkBroken extends Error {
  constructor(message: string) {
    super(message);
    this.name = "LogLinkBroken";
  }
}

/** The node holds no output of the attempt. */
export class LogsNotHeld extends Error {
  constructor() {
    super("the node holds no output of this attempt");
    this.name = "LogsNotHeld";
  }
}

type Upload = {
  readonly stream: UploadStream;
  readonly peer: Peer;
  readonly messages: AsyncIterator<Received<typeof UploadLogsRequestSchema>>;
};

type OpenStream = {
  readonly id: string;
  readonly nodeId: NodeId;
  readonly arrived: PromiseWithResolvers<Upload>;
  /** Settles when the reader has what it wanted, or wants no more. */
  readonly done: PromiseWithResolvers<void>;
};

/** Relays output. */
export class LogRelay {
  readonly #open = new Map<string, OpenStream>();
  readonly #perNode = new Map<NodeId, Map<OrganizationId, number>>();
  readonly #gate: CertificateGate;
  readonly #limits: DispatchLimits;
  readonly #metrics: DispatchMetrics;

  constructor(options: { gate: CertificateGate; limits: DispatchLimits; metrics: DispatchMetrics }) {
    this.#gate = options.gate;
    this.#limits = options.limits;
    this.#metrics = options.metrics;
  }

  /**
   * Asks the node for output, and yields it. Ends after the agent's `end`.
   *
   * @throws LogLinkBroken where the link broke, LogsNotHeld where the agent has none, DomainError where there are
   *   too many streams, and the signal's reason where it aborts.
   */
  async *read(
    session: NodeSession,
    organizationId: OrganizationId,
    query: LogsQuery,
    signal: AbortSignal,
  ): AsyncGenerator<LogPiece> {
    const { nodeId } = session;
    using _slot = this.#takeSlot(nodeId, organizationId);
    const stream: OpenStream = {
      id: randomUUID(),
      nodeId,
      arrived: Promise.withResolvers<Upload>(),
      done: Promise.withResolvers<void>(),
    };
    // Rejected where nobody waits any more: that is no error of anybody.
    stream.arrived.promise.catch(() => undefined);
    this.#open.set(stream.id, stream);
    let finished = false;
    try {
      session.link.send({ case: "openLogs", value: create(OpenLogsSchema, { ...query, streamId: stream.id }) });
      const upload = await this.#arrival(stream, session, signal);
      for await (const piece of this.#pieces(upload, session, signal)) {
        finished = piece.case === "end";
        yield piece;
        if (finished) return;
      }
      throw new LogLinkBroken("the agent ended the stream before its end");
    } finally {
      this.#open.delete(stream.id);
      if (!finished) session.link.send({ case: "closeLogs", value: create(CloseLogsSchema, { streamId: stream.id }) });
      stream.done.resolve();
    }
  }

  /** The agent cannot give a stream. Ignored where it is not this node's. */
  refuse(nodeId: NodeId, refused: LogsRefused): void {
    const stream = this.#open.get(refused.streamId);
    if (stream === undefined || stream.nodeId !== nodeId) return;
    const { reason } = refused;
    stream.arrived.reject(
      reason === LogsRefusedReason.TOO_MANY ? tooManyStreams(this.#limits.nodeUnreachableRetryMs) : new LogsNotHeld(),
    );
  }

  /** Serves UploadLogs: finds the reader who asked, and stays until it has done. */
  async serve(
    peer: Peer,
    stream: UploadStream,
    respond: sendUnaryData<Encoded<typeof UploadLogsResponseSchema>>,
  ): Promise<void> {
    const messages = stream.iterator({ destroyOnReturn: false });
    try {
      const open = await this.#matchUpload(peer, messages);
      open.arrived.resolve({ stream, peer, messages });
      const closed = new Promise<void>((resolve) => stream.once("close", () => resolve()));
      await Promise.race([open.done.promise, closed]);
      respond(null, encodeMessage(UploadLogsResponseSchema, create(UploadLogsResponseSchema)));
    } catch (error) {
      respond(toGrpcError(error));
    }
  }

  async #matchUpload(
    peer: Peer,
    messages: AsyncIterator<Received<typeof UploadLogsRequestSchema>>,
  ): Promise<OpenStream> {
    const first = await withTimeout(messages.next(), this.#limits.firstMessageTimeoutMs, () =>
      violation("the stream's name did not come in time"),
    );
    if (first.done === true) throw violation("the stream ended before its name");
    if (first.value.kind === "violation") throw violation(first.value.text);
    const { message } = first.value.message;
    if (message.case !== "start") throw violation("the first message must name the stream");
    const open = this.#open.get(message.value.streamId);
    // One that is over and one of another node look the same.
    if (open === undefined || open.nodeId !== peer.nodeId) {
      throw new DomainError(ErrorReason.NOT_FOUND, "nobody waits for this stream");
    }
    return open;
  }

  async #arrival(stream: OpenStream, session: NodeSession, signal: AbortSignal): Promise<Upload> {
    const broken = (): void => stream.arrived.reject(new LogLinkBroken("the session ended"));
    const aborted = (): void => stream.arrived.reject(signal.reason);
    const late = setTimeout(
      () => stream.arrived.reject(new LogLinkBroken("the agent did not open the stream in time")),
      this.#limits.logsOpenTimeoutMs,
    );
    session.link.ended.addEventListener("abort", broken, { once: true });
    signal.addEventListener("abort", aborted, { once: true });
    if (session.link.isOver) broken();
    if (signal.aborted) aborted();
    try {
      return await stream.arrived.promise;
    } finally {
      clearTimeout(late);
      session.link.ended.removeEventListener("abort", broken);
      signal.removeEventListener("abort", aborted);
    }
  }

  async *#pieces(upload: Upload, session: NodeSession, signal: AbortSignal): AsyncGenerator<LogPiece> {
    // Either of the two ends the wait for a message that may never come. (A race against a promise would keep every
    // message of a long stream in memory until that promise settles.)
    const stop = AbortSignal.any([signal, session.link.ended]);
    const onStop = (): void => void upload.stream.destroy();
    stop.addEventListener("abort", onStop, { once: true });
    if (stop.aborted) onStop();
    try {
      for (;;) {
        const next = await upload.messages.next().catch(() => undefined);
        signal.throwIfAborted();
        if (stop.aborted) throw new LogLinkBroken("the session ended");
        if (next === undefined || next.done === true) return;
        const refusal = await this.#gate.refusal(upload.peer);
        if (refusal !== undefined) throw new LogLinkBroken(refusal.message);
        if (next.value.kind === "violation") throw new LogLinkBroken(next.value.text);
        const { message } = next.value.message;
        if (message.case === undefined || message.case === "start") throw new LogLinkBroken("not a piece of output");
        if (message.case === "chunk") this.#metrics.logBytes.inc(message.value.data.length);
        yield message;
      }
    } finally {
      stop.removeEventListener("abort", onStop);
    }
  }

  /**
   * An organization holds at most as many of a node's streams as it leaves free: alone it has half of them, and however
   * many keys it has, there are some for the others.
   */
  #takeSlot(nodeId: NodeId, organizationId: OrganizationId): Disposable {
    const held = this.#perNode.get(nodeId) ?? new Map<OrganizationId, number>();
    const free = this.#limits.maxLogStreamsPerNode - held.values().reduce((sum, count) => sum + count, 0);
    const own = held.get(organizationId) ?? 0;
    if (own >= free) throw tooManyStreams(this.#limits.nodeUnreachableRetryMs);
    this.#perNode.set(nodeId, held.set(organizationId, own + 1));
    this.#metrics.logStreams.inc();
    return {
      [Symbol.dispose]: (): void => {
        const left = (held.get(organizationId) ?? 1) - 1;
        if (left > 0) held.set(organizationId, left);
        else held.delete(organizationId);
        if (held.size === 0) this.#perNode.delete(nodeId);
        this.#metrics.logStreams.dec();
      },
    };
  }
}

/** What a reader is told where there are as many streams as there may be. */
/** Too many for one link between replicas, or for the node: a reader may have none of them. */
export function tooManyRelayed(retryAfterMs: number): DomainError {
  return new DomainError(ErrorReason.RATE_LIMITED, "too many log streams are open: close one, or try again later", {
    retryAfterMs,
  });
}

function tooManyStreams(retryAfterMs: number): DomainError {
  return new DomainError(ErrorReason.RATE_LIMITED, "too many log streams of this node are open: close one first", {
    retryAfterMs,
  });
}

function violation(message: string): DomainError {
  return new DomainError(ErrorReason.PROTOCOL_VIOLATION, message);
}

async function withTimeout<T>(promise: Promise<T>, timeoutMs: number, late: () => Error): Promise<T> {
  const timeout = Promise.withResolvers<never>();
  const timer = setTimeout(() => timeout.reject(late()), timeoutMs);
  try {
    return await Promise.race([promise, timeout.promise]);
  } finally {
    clearTimeout(timer);
  }
}
