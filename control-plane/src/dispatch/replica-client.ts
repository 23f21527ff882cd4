// Asks other replicas for output of nodes whose sessions they hold. It has one connection to each, made when it is
// needed, and yields what the relay of this process would: whoever reads need not know where the session is.
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { RelayLogsRequestSchema } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import type { NodeId, OrganizationId } from "@clodei/proto/ids";
import type { Authority } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Log } from "../platform/log.ts";
import type { DispatchLimits } from "./limits.ts";
import { LogLinkBroken, LogsNotHeld, type LogPiece, type LogsQuery, tooManyRelayed } from "./log-relay.ts";
import type { DispatchMetrics } from "./metrics.ts";
import { type ReplicaAddress, ReplicaConnection, type ReplicaTlsMaterial } from "./replica-connection.ts";
import { Seldom } from "./seldom.ts";

/** What asking other replicas needs. */
export type ReplicaClientOptions = {
  readonly authority: Pick<Authority, "issuedReplica" | "certificatePem">;
  readonly tls: ReplicaTlsMaterial;
  readonly limits: DispatchLimits;
  readonly metrics: DispatchMetrics;
  readonly clock: Clock;
  readonly log: Log;
};

const tellAgainMs = 60_000;

/** Reads from other replicas. */
export class ReplicaClient implements Disposable {
  readonly #options: ReplicaClientOptions;
  /** The connection that new streams of a replica are opened on. */
  readonly #current = new Map<string, ReplicaConnection>();
  /** These, and those whose last streams are still open. */
  readonly #all = new Set<ReplicaConnection>();
  /** When a connection to a replica failed to open last. */
  readonly #failedAtMs = new Map<string, number>();
  readonly #tellRefusal = new Seldom(tellAgainMs);
  #tls: ReplicaTlsMaterial;

  constructor(options: ReplicaClientOptions) {
    this.#options = options;
    this.#tls = options.tls;
  }

  /** New streams show the new certificate; those that are open go on. */
  renew(tls: ReplicaTlsMaterial): void {
    this.#tls = tls;
    for (const connection of this.#current.values()) connection.retire();
    this.#current.clear();
  }

  /**
   * Asks the replica for output of one of its nodes, and yields it. Ends after the agent's `end`.
   *
   * @throws what `LogRelay.read` throws. LogLinkBroken also where the replica cannot be reached, or has no such session.
   */
  async *readLogs(
    address: ReplicaAddress,
    nodeId: NodeId,
    organizationId: OrganizationId,
    query: LogsQuery,
    signal: AbortSignal,
  ): AsyncGenerator<LogPiece> {
    signal.throwIfAborted();
    const { limits, metrics } = this.#options;
    const connection = this.#connectionTo(address);
    using slot = connection.takeStream();
    if (slot === undefined) throw tooManyRelayed(limits.nodeUnreachableRetryMs);
    const leave = new AbortController();
    const late = setTimeout(() => leave.abort(), limits.replicaAnswerTimeoutMs);
    metrics.replicaStreams.inc({ side: "asks" });
    try {
      const request: MessageInitShape<typeof RelayLogsRequestSchema> = { ...query, nodeId, organizationId };
      const answers = connection.client.relayLogs(create(RelayLogsRequestSchema, request), {
        signal: AbortSignal.any([signal, leave.signal]),
        onHeader: () => clearTimeout(late),
      });
      for await (const { message } of answers) {
        // Something that a newer version has to say.
        if (message.case === undefined) continue;
        if (message.case === "chunk") metrics.replicaLogBytes.inc(message.value.data.length);
        yield message;
        if (message.case === "end") return;
      }
      throw new LogLinkBroken("the replica ended the stream before its end");
    } catch (error) {
      signal.throwIfAborted();
      throw this.#toLogError(error, address);
    } finally {
      clearTimeout(late);
      leave.abort();
      metrics.replicaStreams.dec({ side: "asks" });
    }
  }

  /** Closes all connections. */
  [Symbol.dispose](): void {
    for (const connection of this.#all) connection.close();
  }

  #connectionTo(address: ReplicaAddress): ReplicaConnection {
    const { replicaId } = address;
    const standing = this.#current.get(replicaId);
    const { limits, metrics, authority, clock } = this.#options;
    // The handshake looked at its certificate once, and the connection may stand for longer.
    if (standing !== undefined && !standing.hasExpired(clock())) return standing;
    standing?.retire();
    // Many readers wait for a replica that is gone: one of them tries at a time.
    const failedAtMs = this.#failedAtMs.get(replicaId) ?? Number.NEGATIVE_INFINITY;
    if (performance.now() - failedAtMs < limits.replicaRetryMs) {
      throw new LogLinkBroken("the replica could not be reached a moment ago");
    }
    // It stands in the database as another version of the program may have written it.
    if (!URL.canParse(`https://${address.endpoint}`)) throw new LogLinkBroken("the replica's endpoint is none");
    if (this.#all.size >= limits.maxReplicaConnections) throw new LogLinkBroken("too many connections to replicas");
    const connection = new ReplicaConnection({
      ...address,
      tls: this.#tls,
      authority,
      limits,
      clock,
      onClosed: (failure) => {
        this.#all.delete(connection);
        if (this.#current.get(replicaId) === connection) this.#current.delete(replicaId);
        metrics.replicaConnections.set(this.#all.size);
        if (failure !== undefined) this.#noteFailure(address, failure);
        else this.#failedAtMs.delete(replicaId);
      },
    });
    this.#current.set(replicaId, connection);
    this.#all.add(connection);
    metrics.replicaConnections.set(this.#all.size);
    return connection;
  }

  /** Told once, and not at every try. */
  #noteFailure({ replicaId, endpoint }: ReplicaAddress, failure: Error): void {
    const { limits, metrics, log } = this.#options;
    metrics.replicaConnectionsFailed.inc();
    if (!this.#failedAtMs.has(replicaId)) {
      log.warn(
        { err: failure, replicaId, endpoint },
        "the control plane that holds a node's session cannot be reached",
      );
    }
    // Replicas come and go: those that are gone for good are forgotten with the others.
    if (this.#failedAtMs.size >= limits.maxReplicaConnections) this.#failedAtMs.clear();
    this.#failedAtMs.set(replicaId, performance.now());
  }

  #toLogError(error: unknown, { replicaId }: ReplicaAddress): Error {
    if (!(error instanceof ConnectError)) return error instanceof Error ? error : new LogLinkBroken(String(error));
    const { limits, log } = this.#options;
    const reason = error.findDetails(ErrorInfoSchema)[0]?.reason;
    if (reason === "NOT_FOUND") return new LogsNotHeld();
    if (reason === "RATE_LIMITED") return tooManyRelayed(limits.nodeUnreachableRetryMs);
    const isUsual = error.code === Code.Unavailable || error.code === Code.Canceled;
    if (!isUsual && this.#tellRefusal.isDue()) {
      log.warn({ err: error, replicaId }, "another control plane refused to relay output");
    }
    return new LogLinkBroken(error.rawMessage);
  }
}
