// The three methods of NodeLinkService. Each asks first who speaks (the certificate), whether the method admits it
// (the schema), and whether it may still speak (the gate, again for every message); then it hands on.
import { create } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { sendUnaryData, ServerUnaryCall } from "@grpc/grpc-js";
import {
  NodeLinkService,
  RenewCertificateResponseSchema,
  type RenewCertificateRequestSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { NodeId } from "@clodei/proto/ids";
import type { NodesService } from "../nodes/service.ts";
import type { Database } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Log } from "../platform/log.ts";
import { authorize } from "../rpc/authorization.ts";
import type { CertificateGate, Peer } from "./certificate-gate.ts";
import type { Conversation } from "./conversation.ts";
import { encodeMessage, type Encoded, type GrpcHandlers } from "./grpc-adapter.ts";
import { toGrpcError } from "./grpc-errors.ts";
import type { Received } from "./incoming.ts";
import type { DispatchLimits } from "./limits.ts";
import type { LogRelay } from "./log-relay.ts";
import type { DispatchMetrics } from "./metrics.ts";
import { jitterMs } from "./model.ts";
import { SessionLink, type SessionStream } from "./session.ts";

/** What the node link needs. */
export type NodeLinkOptions = {
  readonly database: Database;
  readonly nodes: NodesService;
  readonly log: Log;
  readonly metrics: DispatchMetrics;
  readonly limits: DispatchLimits;
  readonly gate: CertificateGate;
  readonly relay: LogRelay;
  readonly conversation: Conversation;
  /** How long agents may take to come back after a drain. */
  readonly reconnectWithinMs: number;
  /** Aborts when the process drains. */
  readonly draining: AbortSignal;
  readonly cutConnection: (address: string) => void;
};

/** Who is at the other end of a call, or undefined where its certificate is none of a node. */
export type PeerOf = (call: Pick<SessionStream, "getAuthContext" | "getPeer">) => Peer | undefined;

/** Serves NodeLinkService. */
export class NodeLink {
  readonly #options: NodeLinkOptions;
  /** Links of all streams, welcomed or not, so that a drain reaches each. */
  readonly #links = new Set<SessionLink>();
  readonly #streamsPerNode = new Map<NodeId, number>();
  /** What still runs, so that closing can wait for it. */
  readonly #running = new Set<Promise<void>>();

  constructor(options: NodeLinkOptions) {
    this.#options = options;
  }

  /** The handlers, for the adapter. */
  handlers(peerOf: PeerOf): GrpcHandlers<typeof NodeLinkService> {
    return {
      session: (stream) => {
        const peer = peerOf(stream);
        if (peer === undefined) stream.emit("error", toGrpcError(notANode()));
        else this.#track(this.#session(peer, stream));
      },
      uploadLogs: (stream, respond) => {
        const peer = peerOf(stream);
        if (peer === undefined) respond(toGrpcError(notANode()));
        else this.#track(this.#uploadLogs(peer, stream, respond));
      },
      renewCertificate: (call, respond) => {
        const peer = peerOf(call);
        if (peer === undefined) respond(toGrpcError(notANode()));
        else this.#track(this.#renewCertificate(peer, call, respond));
      },
    };
  }

  /** Ends every session, and tells the agents to come back (to another process) after a random time. */
  drain(): void {
    for (const link of this.#links) this.#sayDraining(link);
  }

  /** Resolves once every call has ended. */
  async idle(): Promise<void> {
    while (this.#running.size > 0) await Promise.allSettled(this.#running);
  }

  #track(work: Promise<void>): void {
    const tracked: Promise<void> = work
      .catch((error: unknown) => this.#options.log.error({ err: error }, "a call of the node link failed"))
      .finally(() => this.#running.delete(tracked));
    this.#running.add(tracked);
  }

  #sayDraining(link: SessionLink): void {
    link.goodbye(ErrorReason.UNAVAILABLE, "the server is draining", {
      reconnectWithinMs: jitterMs(this.#options.reconnectWithinMs) + minReconnectMs,
    });
  }

  // ---- UploadLogs and RenewCertificate --------------------------------------------------------------------------

  async #uploadLogs(peer: Peer, ...call: DropFirst<Parameters<LogRelay["serve"]>>): Promise<void> {
    const [stream, respond] = call;
    try {
      await this.#admit(NodeLinkService.method.uploadLogs, peer);
    } catch (error) {
      respond(toGrpcError(error));
      return;
    }
    await this.#options.relay.serve(peer, stream, respond);
  }

  async #renewCertificate(
    peer: Peer,
    call: ServerUnaryCall<
      Received<typeof RenewCertificateRequestSchema>,
      Encoded<typeof RenewCertificateResponseSchema>
    >,
    respond: sendUnaryData<Encoded<typeof RenewCertificateResponseSchema>>,
  ): Promise<void> {
    try {
      await this.#admit(NodeLinkService.method.renewCertificate, peer);
      if (call.request.kind === "violation") {
        throw new DomainError(ErrorReason.PROTOCOL_VIOLATION, call.request.text);
      }
      const { certificateRequest } = call.request.message;
      const renewed = await this.#options.database.system((tx) =>
        this.#options.nodes.renew(tx, peer.nodeId, certificateRequest),
      );
      const response = create(RenewCertificateResponseSchema, {
        certificate: renewed.certificate,
        trustBundle: [...renewed.trustBundle],
        expireTime: timestampFromDate(renewed.expireTime),
        nodeEndpoint: renewed.nodeEndpoint,
      });
      respond(null, encodeMessage(RenewCertificateResponseSchema, response));
    } catch (error) {
      respond(toGrpcError(error));
    }
  }

  /** @throws DomainError where the peer may not call the method now. */
  async #admit(method: Parameters<typeof authorize>[0], peer: Peer): Promise<void> {
    authorize(method, { kind: "node", nodeId: peer.nodeId, certificateSerial: peer.certificateSerial });
    const refusal = await this.#options.gate.refusal(peer);
    if (refusal !== undefined) throw new DomainError(refusal.reason, refusal.message);
  }

  // ---- Session --------------------------------------------------------------------------------------------------

  async #session(peer: Peer, stream: SessionStream): Promise<void> {
    const { limits, metrics, log } = this.#options;
    const link = new SessionLink({
      peer,
      stream,
      limits,
      cutConnection: this.#options.cutConnection,
      onOverflow: (why) => {
        metrics.agentsDropped.inc({ why });
        log.warn(
          { nodeId: peer.nodeId, why, queuedBytes: link.queuedBytes },
          "an agent that does not read was dropped",
        );
      },
    });
    this.#links.add(link);
    const streams = (this.#streamsPerNode.get(peer.nodeId) ?? 0) + 1;
    this.#streamsPerNode.set(peer.nodeId, streams);
    try {
      if (this.#options.draining.aborted) this.#sayDraining(link);
      if (streams > limits.maxSessionStreamsPerNode)
        link.goodbye(ErrorReason.RATE_LIMITED, "too many sessions at once");
      await this.#options.conversation.run(link);
      link.end();
    } catch (error) {
      this.#sayFailed(link, error);
    } finally {
      this.#links.delete(link);
      const left = (this.#streamsPerNode.get(peer.nodeId) ?? 1) - 1;
      if (left === 0) this.#streamsPerNode.delete(peer.nodeId);
      else this.#streamsPerNode.set(peer.nodeId, left);
    }
  }

  #sayFailed(link: SessionLink, error: unknown): void {
    if (error instanceof DomainError) {
      link.goodbye(error.reason, error.message, { cut: true });
      return;
    }
    // Not to be told; the agent comes back, and finds everything as it was before this message.
    this.#options.log.error({ err: error, nodeId: link.peer.nodeId }, "a session failed");
    link.goodbye(ErrorReason.UNAVAILABLE, "an error of ours: reconnect", {
      reconnectWithinMs: jitterMs(this.#options.reconnectWithinMs) + minReconnectMs,
      cut: true,
    });
  }
}

/** The least of a reconnect_within: a zero would be no time at all to spread over. */
const minReconnectMs = 100;

type DropFirst<T extends readonly unknown[]> = T extends readonly [unknown, ...infer R] ? R : never;

function notANode(): DomainError {
  return new DomainError(ErrorReason.CERTIFICATE_INVALID, "the client certificate is none of a node");
}
