// ReplicaService: hands output of this process's nodes to another replica, which hands it to a customer. That one knows
// who may read. This one sees to it that only a replica asks, and that what it asks for is really that organization's,
// and really on that node: a mistake there must not become one here.
import { create } from "@bufbuild/protobuf";
import { type handleServerStreamingCall, Metadata } from "@grpc/grpc-js";
import {
  type RelayLogsRequest,
  type RelayLogsRequestSchema,
  RelayLogsResponseSchema,
  ReplicaService,
} from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { type NodeId, type OrganizationId, parseId } from "@clodei/proto/ids";
import type { InstancesService } from "../instances/service.ts";
import type { ReplicaCertificate } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Log } from "../platform/log.ts";
import { authorize } from "../rpc/authorization.ts";
import { isOurs } from "../rpc/errors.ts";
import { encodeMessage, type Encoded, type GrpcHandlers } from "./grpc-adapter.ts";
import { toGrpcError } from "./grpc-errors.ts";
import type { Received } from "./incoming.ts";
import type { DispatchLimits } from "./limits.ts";
import { LogLinkBroken, LogsNotHeld, type LogRelay, type LogsQuery, tooManyRelayed } from "./log-relay.ts";
import type { DispatchMetrics } from "./metrics.ts";
import type { NodeSession } from "./node-session.ts";
import type { SessionKeeper } from "./session-keeper.ts";

/** What serving other replicas needs. */
export type ReplicaServerOptions = {
  readonly database: Database;
  readonly instances: InstancesService;
  readonly clock: Clock;
  readonly log: Log;
  readonly limits: DispatchLimits;
  readonly metrics: DispatchMetrics;
  readonly keeper: SessionKeeper;
  readonly relay: LogRelay;
  /** Aborts when the process drains. */
  readonly draining: AbortSignal;
};

type RelayCall = Parameters<
  handleServerStreamingCall<Received<typeof RelayLogsRequestSchema>, Encoded<typeof RelayLogsResponseSchema>>
>[0];

/** Who is at the other end of a call, or undefined where its certificate is none of a replica. */
export type ReplicaOf = (call: Pick<RelayCall, "getAuthContext">) => ReplicaCertificate | undefined;

/** What is read, and from where. */
type Relayed = {
  readonly session: NodeSession;
  readonly organizationId: OrganizationId;
  readonly query: LogsQuery;
};

/** Serves ReplicaService. */
export class ReplicaServer {
  readonly #options: ReplicaServerOptions;
  /** What still runs, so that closing can wait for it. */
  readonly #running = new Set<Promise<void>>();
  #streams = 0;

  constructor(options: ReplicaServerOptions) {
    this.#options = options;
  }

  /** The handlers, for the adapter. */
  handlers(replicaOf: ReplicaOf): GrpcHandlers<typeof ReplicaService> {
    return {
      relayLogs: (call) => {
        const running: Promise<void> = this.#relayLogs(replicaOf(call), call).finally(() =>
          this.#running.delete(running),
        );
        this.#running.add(running);
      },
    };
  }

  /** Resolves once every call has ended. */
  async idle(): Promise<void> {
    while (this.#running.size > 0) await Promise.allSettled(this.#running);
  }

  #takeSlot(): Disposable | undefined {
    if (this.#streams >= this.#options.limits.maxReplicaStreams) return undefined;
    this.#streams += 1;
    return { [Symbol.dispose]: () => void (this.#streams -= 1) };
  }

  /** Never rejects. */
  async #relayLogs(peer: ReplicaCertificate | undefined, call: RelayCall): Promise<void> {
    const { draining, metrics, limits } = this.#options;
    const over = Promise.withResolvers<void>();
    const cancel = new AbortController();
    // Comes at the end of every call, however it ends.
    call.once("cancelled", () => {
      cancel.abort();
      over.resolve();
    });
    const signal = AbortSignal.any([cancel.signal, draining]);
    const mayGoOn = (): void => this.#admit(peer);
    metrics.replicaStreams.inc({ side: "serves" });
    try {
      mayGoOn();
      // Only of those that were admitted: whoever reaches the port may open streams, and none of them counts.
      using slot = this.#takeSlot();
      if (slot === undefined) throw tooManyRelayed(limits.nodeUnreachableRetryMs);
      const { session, organizationId, query } = await this.#find(call.request);
      signal.throwIfAborted();
      call.sendMetadata(new Metadata());
      for await (const message of this.#options.relay.read(session, organizationId, query, signal)) {
        mayGoOn();
        // Each piece waits for the one before to leave, so that a reader that does not read stops the agent.
        await write(call, encodeMessage(RelayLogsResponseSchema, create(RelayLogsResponseSchema, { message })), signal);
      }
      call.end();
    } catch (error) {
      call.emit("error", toGrpcError(this.#told(error, cancel.signal)));
    } finally {
      metrics.replicaStreams.dec({ side: "serves" });
    }
    // The status goes out behind what was written, which a reader may never take.
    const late = setTimeout(() => over.resolve(), limits.goodbyeTimeoutMs);
    await over.promise;
    clearTimeout(late);
  }

  /** Asked again for every piece: a connection may outlive its certificate. */
  #admit(peer: ReplicaCertificate | undefined): void {
    if (peer === undefined) {
      throw new DomainError(ErrorReason.CERTIFICATE_INVALID, "the client certificate is none of a control plane");
    }
    authorize(ReplicaService.method.relayLogs, { kind: "replica", replicaId: peer.replicaId });
    if (peer.notAfter <= this.#options.clock()) {
      throw new DomainError(ErrorReason.CERTIFICATE_INVALID, "the control plane's certificate has expired");
    }
  }

  /** Finds the node's session, where the attempt is the organization's and on the node. */
  async #find(request: Received<typeof RelayLogsRequestSchema>): Promise<Relayed> {
    if (request.kind === "violation") throw new DomainError(ErrorReason.PROTOCOL_VIOLATION, request.text);
    const { nodeId, organizationId, instanceId, attempt } = namesOf(request.message);
    const { keeper, database, instances, limits } = this.#options;
    const target = await database.tenant(organizationId, (tx) => instances.logTarget(tx, instanceId));
    if (target?.nodeId !== nodeId || attempt > target.placedAttempt) {
      throw new DomainError(
        ErrorReason.PERMISSION_DENIED,
        "the attempt is not that organization's, or not on that node",
      );
    }
    const session = keeper.sessionOf(nodeId);
    if (session === undefined) {
      throw new DomainError(ErrorReason.NODE_UNREACHABLE, "this control plane does not hold the node's session", {
        retryAfterMs: limits.nodeUnreachableRetryMs,
      });
    }
    const { follow, positions, tailLines, sinceTime } = request.message;
    return {
      session,
      organizationId,
      query: {
        attempt: { instanceId, attempt },
        follow,
        positions,
        ...(tailLines === undefined ? {} : { tailLines }),
        ...(sinceTime === undefined ? {} : { sinceTime }),
      },
    };
  }

  /** What the other replica is told. It goes on from its reader's positions, unless there is nothing to go on with. */
  #told(error: unknown, canceled: AbortSignal): unknown {
    const { draining, limits, log } = this.#options;
    const retry = { retryAfterMs: limits.nodeUnreachableRetryMs };
    if (canceled.aborted) return error;
    if (draining.aborted) return new DomainError(ErrorReason.UNAVAILABLE, "this control plane is draining", retry);
    if (error instanceof LogsNotHeld) return new DomainError(ErrorReason.NOT_FOUND, error.message);
    if (error instanceof LogLinkBroken) return new DomainError(ErrorReason.NODE_UNREACHABLE, error.message, retry);
    if (isOurs(error)) log.error({ err: error }, "a relay to another control plane failed");
    return error;
  }
}

/** The ids of a request, whose patterns the check has seen. */
function namesOf({ nodeId: node, organizationId: organization, attempt: of }: RelayLogsRequest) {
  const nodeId: NodeId | undefined = parseId("nod", node);
  const organizationId: OrganizationId | undefined = parseId("org", organization);
  const instanceId = parseId("ins", of?.instanceId ?? "");
  if (nodeId === undefined || organizationId === undefined || instanceId === undefined || of === undefined) {
    throw new DomainError(ErrorReason.PROTOCOL_VIOLATION, "an id is malformed");
  }
  return { nodeId, organizationId, instanceId, attempt: of.attempt };
}

/** Resolves when the bytes left for the wire, as far as the reader's window lets them. */
function write(call: RelayCall, bytes: Encoded<typeof RelayLogsResponseSchema>, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const aborted = (): void => reject(new Error("the call is over", { cause: signal.reason }));
    signal.addEventListener("abort", aborted, { once: true });
    if (signal.aborted) aborted();
    call.write(bytes, () => {
      signal.removeEventListener("abort", aborted);
      resolve();
    });
  });
}
