// StreamLogs: the output of an attempt, handed from its node to a customer, whichever replica the node's session is at.
// It owns what a customer sees when things move underneath: an instance that is not placed yet, a link that breaks and
// comes back, a node that is away or goes to another replica.
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { HandlerContext } from "@connectrpc/connect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { StreamLogsRequest, StreamLogsResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { parseId, type InstanceId, type NodeId, type OrganizationId } from "@clodei/proto/ids";
import type { InstancesService, LogTarget } from "../instances/service.ts";
import type { Database } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Log } from "../platform/log.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import { customerOf } from "../rpc/context.ts";
import type { DispatchLimits } from "./limits.ts";
import { LogLinkBroken, LogsNotHeld, type LogPiece, type LogRelay, type LogsQuery } from "./log-relay.ts";
import { LogCursor } from "./model.ts";
import type { ReplicaClient } from "./replica-client.ts";
import { Seldom } from "./seldom.ts";
import type { SessionKeeper } from "./session-keeper.ts";
import { readSessions } from "./store.ts";

/** What serving logs needs. */
export type StreamLogsOptions = {
  readonly database: Database;
  readonly instances: InstancesService;
  readonly wakeups: Wakeups;
  readonly log: Log;
  readonly keeper: SessionKeeper;
  readonly relay: LogRelay;
  /** Asks the replicas that hold the other nodes' sessions. */
  readonly replicas: ReplicaClient;
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

/** Where a node's output comes from now. */
type Source = {
  /** Names the node's session: with another one the output comes from elsewhere, or again. */
  readonly sessionId: string;
  readonly read: (query: LogsQuery) => AsyncIterable<LogPiece>;
  /** How long to wait after a break, where no hint comes. */
  readonly retryMs: number;
};

/** Serves StreamLogs. */
export class LogStreams {
  readonly #options: StreamLogsOptions;
  readonly #perCaller = new Map<string, number>();
  readonly #tellUnconfigured = new Seldom(tellAgainMs);

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
      const source = await this.#source(reader, place.nodeId);
      if (source === undefined) {
        if (!follow) throw this.#unreachable();
        await this.#arrival(place.nodeId, reader.signal);
        continue;
      }
      const outcome = yield* this.#relay(reader, source, attempt);
      if (outcome === "done") return;
      if (outcome === "not held") {
        const answer = answerNotHeld(target, attempt);
        if (answer === "ended") yield { event: { case: "end", value: { attempt } } };
        if (answer === "ended" || !follow) return;
        await changed;
        continue;
      }
      // Whoever does not follow goes after a session that moved, and does not wait for one that is gone.
      if (!follow && (await this.#source(reader, place.nodeId))?.sessionId === source.sessionId)
        throw this.#unreachable();
      // The link broke while following: not at once again, so that a node that refuses does not spin us.
      if (follow) await this.#options.wakeups.wait([`node:${place.nodeId}`], source.retryMs, reader.signal);
    }
  }

  /** Relays until the end, or until the link breaks. */
  async *#relay(
    reader: Reader,
    source: Source,
    attempt: number,
  ): AsyncGenerator<Response, "done" | "broken" | "not held"> {
    const { request, cursor } = reader;
    const positions = cursor.positions();
    cursor.again();
    try {
      const pieces = source.read({
        attempt: { instanceId: reader.instanceId, attempt },
        follow: request.follow,
        positions,
        // Positions take the place of the two.
        ...(positions.length > 0 || request.tailLines === undefined ? {} : { tailLines: request.tailLines }),
        ...(positions.length > 0 || request.sinceTime === undefined ? {} : { sinceTime: request.sinceTime }),
      });
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
      if (error instanceof LogLinkBroken) return "broken";
      throw error;
    }
  }

  /** Finds the node's session, here or at another replica. Undefined: nobody holds it. */
  async #source({ organizationId, signal }: Reader, nodeId: NodeId): Promise<Source | undefined> {
    const { keeper, relay, replicas, database, pollIntervalMs } = this.#options;
    const session = keeper.sessionOf(nodeId);
    if (session !== undefined) {
      const read = (query: LogsQuery) => relay.read(session, organizationId, query, signal);
      return { sessionId: session.id, read, retryMs: retryPauseMs };
    }
    const [standing] = await database.system((tx) => readSessions(tx, [nodeId]));
    if (standing === undefined || standing.endTime !== undefined || standing.replicaId === this.#options.replicaId) {
      return undefined;
    }
    const { sessionId, replicaId, replicaEndpoint: endpoint } = standing;
    if (endpoint === undefined) {
      if (this.#tellUnconfigured.isDue()) this.#options.log.warn(unconfigured);
      // Not to wait for: it is there, and nobody reaches it from here. A retry may come to the replica that holds it.
      throw this.#unreachable();
    }
    const read = (query: LogsQuery) =>
      replicas.readLogs({ replicaId, endpoint }, nodeId, organizationId, query, signal);
    // Where that replica died, the hint comes with the node's next session.
    return { sessionId, read, retryMs: pollIntervalMs };
  }

  /** Resolves when the node may have a session: here, by a hint elsewhere, or after the time. Never rejects. */
  async #arrival(nodeId: NodeId, signal: AbortSignal): Promise<void> {
    const { keeper, wakeups, pollIntervalMs } = this.#options;
    const arrived = new AbortController();
    const until = AbortSignal.any([signal, arrived.signal]);
    await Promise.race([
      keeper.arrival(pollIntervalMs, until),
      wakeups.wait([`node:${nodeId}`], pollIntervalMs, until),
    ]);
    arrived.abort();
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
const tellAgainMs = 10 * 60_000;
/** For the operator: customers see that the node cannot be reached, and cannot mend it. */
const unconfigured =
  "output was asked for of a node whose session another control plane holds, which others cannot ask for it: " +
  "set CLODEI_REPLICA_HOST on every control plane of this database";

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
