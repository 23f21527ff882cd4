// StreamLogs: the output of an attempt, handed from its node to a customer. It owns what a customer sees when
// things move underneath: an instance that is not placed yet, a link that breaks and comes back, a node that is away.
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { HandlerContext } from "@connectrpc/connect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { StreamLogsRequest, StreamLogsResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { parseId, type InstanceId, type OrganizationId } from "@clodei/proto/ids";
import type { InstancesService, LogTarget } from "../instances/service.ts";
import type { Database } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import { customerOf } from "../rpc/context.ts";
import type { DispatchLimits } from "./limits.ts";
import { LogLinkBroken, LogsNotHeld, type LogPiece, type LogRelay } from "./log-relay.ts";
import { LogCursor } from "./model.ts";
import type { NodeSession } from "./node-session.ts";
import type { SessionKeeper } from "./session-keeper.ts";
import { readSessions } from "./store.ts";

/** What serving logs needs. */
export type StreamLogsOptions = {
  readonly database: Database;
  readonly instances: InstancesService;
  readonly wakeups: Wakeups;
  readonly keeper: SessionKeeper;
  readonly relay: LogRelay;
  readonly limits: DispatchLimits;
  readonly pollIntervalMs: number;
  /** Names this process. */
  readonly replicaId: string;
  /** Aborts when the process drains. */
  readonly draining: AbortSignal;
};

type Response = MessageInitShape<typeof StreamLogsResponseSchema>;

/** What the reader asked for, settled. */
type Reader = {
  readonly organizationId: OrganizationId;
  readonly instanceId: InstanceId;
  readonly request: StreamLogsRequest;
  readonly cursor: LogCursor;
  readonly signal: AbortSignal;
};

/** Serves StreamLogs. */
export class LogStreams {
  readonly #options: StreamLogsOptions;
  readonly #perCaller = new Map<string, number>();

  constructor(options: StreamLogsOptions) {
    this.#options = options;
  }

  /** The handler of InstanceService.StreamLogs. */
  async *streamLogs(request: StreamLogsRequest, context: HandlerContext): AsyncGenerator<Response> {
    const caller = customerOf(context);
    const instanceId = parseId("ins", request.instanceId);
    if (instanceId === undefined) throw notFound();
    using _slot = this.#takeSlot(caller.callerId);
    const reader: Reader = {
      organizationId: caller.organizationId,
      instanceId,
      request,
      cursor: new LogCursor(request.positions, request.tailLines !== undefined || request.sinceTime !== undefined),
      signal: AbortSignal.any([context.signal, this.#options.draining]),
    };
    try {
      yield* this.#stream(reader);
    } catch (error) {
      if (this.#options.draining.aborted && !context.signal.aborted) {
        throw new DomainError(ErrorReason.UNAVAILABLE, "the server is draining: go on from the last position", {
          retryAfterMs: this.#options.limits.nodeUnreachableRetryMs,
        });
      }
      throw error;
    }
  }

  async *#stream(reader: Reader): AsyncGenerator<Response> {
    const { follow } = reader.request;
    // The attempt that was current at the first look: a restart does not change what is being read.
    let attempt = reader.request.attempt;
    for (;;) {
      reader.signal.throwIfAborted();
      // Subscribed before the look, so that a change between the two is not slept through.
      const changed = this.#change(reader);
      const target = await this.#target(reader);
      attempt = attempt === 0 ? target.attempt : attempt;
      if (attempt > target.attempt) throw new DomainError(ErrorReason.NOT_FOUND, "there is no such attempt yet");
      const place = placeOf(target, attempt);
      if (place === "never") {
        if (target.lost && attempt <= target.placedAttempt)
          throw new DomainError(ErrorReason.LOGS_GONE, "the instance's node is lost, and its output with it");
        yield { event: { case: "end", value: { attempt } } };
        return;
      }
      if (place === "not yet") {
        if (!follow) return;
        await changed;
        continue;
      }
      const session = this.#options.keeper.sessionOf(place.nodeId);
      if (session === undefined) {
        await this.#absent(place.nodeId, follow);
        await this.#options.keeper.arrival(this.#options.pollIntervalMs, reader.signal);
        continue;
      }
      const outcome = yield* this.#relay(reader, session, attempt);
      if (outcome === "done") return;
      if (outcome === "not held") {
        const answer = answerNotHeld(target, attempt);
        if (answer === "ended") yield { event: { case: "end", value: { attempt } } };
        if (answer === "ended" || !follow) return;
        await changed;
        continue;
      }
      // The link broke while following: not at once again, so that a node that refuses does not spin us.
      await this.#options.wakeups.wait([], retryPauseMs, reader.signal);
    }
  }

  /** Relays until the end, or until the link breaks where the reader follows. */
  async *#relay(
    reader: Reader,
    session: NodeSession,
    attempt: number,
  ): AsyncGenerator<Response, "done" | "broken" | "not held"> {
    const { request, cursor } = reader;
    const positions = cursor.positions();
    cursor.again();
    try {
      const pieces = this.#options.relay.read(
        session,
        reader.organizationId,
        {
          attempt: { instanceId: reader.instanceId, attempt },
          follow: request.follow,
          positions,
          // Positions take the place of the two.
          ...(positions.length > 0 || request.tailLines === undefined ? {} : { tailLines: request.tailLines }),
          ...(positions.length > 0 || request.sinceTime === undefined ? {} : { sinceTime: request.sinceTime }),
        },
        reader.signal,
      );
      for await (const piece of pieces) {
        if (piece.case === "end") {
          if (piece.value.attemptEnded) yield { event: { case: "end", value: { attempt } } };
          // A node that ends a stream that follows, and says that more will come, is asked again.
          return piece.value.attemptEnded || !request.follow ? "done" : "broken";
        }
        const event = take(cursor, attempt, piece);
        if (event !== undefined) yield { event };
      }
      return "broken";
    } catch (error) {
      reader.signal.throwIfAborted();
      if (error instanceof LogsNotHeld) return "not held";
      if (!(error instanceof LogLinkBroken)) throw error;
      if (!request.follow) throw this.#unreachable();
      return "broken";
    }
  }

  async #target(reader: Reader): Promise<LogTarget> {
    const target = await this.#options.database.tenant(reader.organizationId, (tx) =>
      this.#options.instances.logTarget(tx, reader.instanceId),
    );
    // What belongs to another organization does not exist.
    if (target === undefined) throw notFound();
    if (target.state === "DELETED") {
      throw new DomainError(ErrorReason.LOGS_GONE, "the instance was deleted, and its output with it");
    }
    return target;
  }

  /** The node has no session here. Whoever follows waits for it, unless another process has it. */
  async #absent(nodeId: Parameters<SessionKeeper["sessionOf"]>[0], follow: boolean): Promise<void> {
    if (!follow) throw this.#unreachable();
    const [standing] = await this.#options.database.system((tx) => readSessions(tx, [nodeId]));
    const elsewhere =
      standing !== undefined && standing.endTime === undefined && standing.replicaId !== this.#options.replicaId;
    if (elsewhere) throw this.#unreachable();
  }

  #unreachable(): DomainError {
    return new DomainError(ErrorReason.NODE_UNREACHABLE, "the instance's node cannot be reached now: retry", {
      retryAfterMs: this.#options.limits.nodeUnreachableRetryMs,
    });
  }

  #change(reader: Reader): Promise<void> {
    const topics = ["instances", `organization:${reader.organizationId}`] as const;
    return this.#options.wakeups.wait(topics, this.#options.pollIntervalMs, reader.signal);
  }

  #takeSlot(callerId: string): Disposable {
    const count = this.#perCaller.get(callerId) ?? 0;
    if (count >= this.#options.limits.maxLogStreamsPerCaller) {
      throw new DomainError(ErrorReason.RATE_LIMITED, "too many log streams are open: close one first", {
        retryAfterMs: this.#options.limits.nodeUnreachableRetryMs,
      });
    }
    this.#perCaller.set(callerId, count + 1);
    return {
      [Symbol.dispose]: (): void => {
        const left = (this.#perCaller.get(callerId) ?? 1) - 1;
        if (left === 0) this.#perCaller.delete(callerId);
        else this.#perCaller.set(callerId, left);
      },
    };
  }
}

/** Between a link that broke and the next try on a session that stands. */
const retryPauseMs = 200;

/** Where an attempt is: on a node, not placed yet, or over without ever having been placed. */
function placeOf(
  target: LogTarget,
  attempt: number,
): { readonly nodeId: NonNullable<LogTarget["nodeId"]> } | "not yet" | "never" {
  if (target.nodeId !== undefined && attempt <= target.placedAttempt) return { nodeId: target.nodeId };
  return isOver(target, attempt) ? "never" : "not yet";
}

/**
 * What it means that the node holds no output of an attempt: it has none yet, it never got as far as a container
 * (its image was not found, …) and so wrote nothing, or what it wrote is gone.
 */
function answerNotHeld(target: LogTarget, attempt: number): "wait" | "ended" {
  if (!isOver(target, attempt)) return "wait";
  if (attempt === target.attempt && !target.started) return "ended";
  throw new DomainError(ErrorReason.NOT_FOUND, "the node holds no output of this attempt");
}

function isOver(target: LogTarget, attempt: number): boolean {
  return attempt < target.attempt || target.state === "STOPPED" || target.state === "FAILED";
}

/** What of a piece the reader does not have yet. */
function take(cursor: LogCursor, attempt: number, piece: Exclude<LogPiece, { case: "end" }>): Response["event"] {
  if (piece.case === "chunk") {
    const chunk = cursor.takeChunk(piece.value);
    return chunk === undefined ? undefined : { case: "chunk", value: { ...chunk, attempt } };
  }
  const gap = cursor.takeGap(piece.value);
  return gap === undefined ? undefined : { case: "gap", value: { ...gap, attempt } };
}

function notFound(): DomainError {
  return new DomainError(ErrorReason.NOT_FOUND, "there is no such instance: ListInstances shows those that there are");
}
