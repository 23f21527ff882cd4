// The link between replicas: the listener by which others reach this process, the client by which it reaches them, and
// the one certificate that both show.
import { ReplicaService } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import type { Authority } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import { listenAt } from "../platform/listen-error.ts";
import type { Log } from "../platform/log.ts";
import { type FreshCertificate, keepCertificateFresh } from "../rpc/listener-certificate.ts";
import { endpointOf, GrpcListener } from "./grpc-listener.ts";
import type { DispatchLimits } from "./limits.ts";
import type { DispatchMetrics } from "./metrics.ts";
import { ReplicaClient } from "./replica-client.ts";
import type { ReplicaServer } from "./replica-service.ts";

/** How the other control planes reach this one. */
export type ReplicaLinkConfig = {
  readonly host: string;
  /** 0: any. */
  readonly port: number;
  /** "host:port". Empty: the two above. */
  readonly endpoint: string;
};

/** What the link is made of. */
export type ReplicaLinkDeps = {
  readonly replicaId: string;
  readonly authority: Pick<Authority, "issuedReplica" | "certificatePem" | "issueReplicaCertificate">;
  readonly clock: Clock;
  readonly log: Log;
  readonly limits: DispatchLimits;
  readonly metrics: DispatchMetrics;
  readonly server: ReplicaServer;
  /** Undefined: this process asks others, and none asks it. */
  readonly config: ReplicaLinkConfig | undefined;
};

/** A link that stands. */
export type ReplicaLink = {
  /** "host:port", as other replicas are told it, where they may ask. */
  readonly endpoint: string | undefined;
  readonly client: ReplicaClient;
  /** Replaces the certificate; streams that are open go on. Happens by itself at half-life. */
  renewCertificate(): Promise<void>;
  /** Ends what others ask for, which the server does when the process drains; then what this process asks of others. */
  close(): Promise<void>;
};

/** Makes the certificate, and listens where the configuration says so. */
export async function startReplicaLink(deps: ReplicaLinkDeps): Promise<ReplicaLink> {
  const { authority, limits, metrics, log, config, replicaId, clock } = deps;
  const obtain = (): Promise<FreshCertificate> => authority.issueReplicaCertificate(replicaId, clock());
  const first = await obtain();
  const client = new ReplicaClient({ authority, tls: first, limits, metrics, clock, log });
  const listener = config === undefined ? undefined : await listen(deps, config, first);
  const use = (next: FreshCertificate): void => {
    client.renew(next);
    listener?.grpc.renew(next);
  };
  const certificates = keepCertificateFresh({ listener: "replica", first, obtain, use, log });
  if (listener !== undefined) log.info({ endpoint: listener.endpoint, replicaId }, "the replica listener serves");
  const close = async (): Promise<void> => {
    await certificates[Symbol.asyncDispose]();
    // The calls are told to end at once. What a reader that does not read keeps open is not waited for.
    await listener?.grpc.close(limits.goodbyeTimeoutMs, () => deps.server.idle());
    client[Symbol.dispose]();
  };
  let closing: Promise<void> | undefined;
  return {
    endpoint: listener?.endpoint,
    client,
    renewCertificate: async () => use(await obtain()),
    close: () => (closing ??= close()),
  };
}

async function listen(
  deps: ReplicaLinkDeps,
  config: ReplicaLinkConfig,
  first: FreshCertificate,
): Promise<{ readonly grpc: GrpcListener; readonly endpoint: string }> {
  const { authority, limits, metrics, server } = deps;
  const { host, port } = config;
  const settings = "--replica-host and --replica-port (CLODEI_REPLICA_HOST, CLODEI_REPLICA_PORT)";
  const handlers = server.handlers((call) => {
    const raw = call.getAuthContext().sslPeerCertificate?.raw;
    return raw === undefined ? undefined : authority.issuedReplica(raw);
  });
  const grpc = await listenAt({ host, port, settings }, () =>
    GrpcListener.start(config, {
      service: ReplicaService,
      handlers,
      certificate: first,
      clientCaPem: authority.certificatePem,
      maxMessageBytes: limits.maxMessageBytes,
      maxStreamsPerConnection: limits.maxStreamsPerReplica,
      maxConnections: limits.maxReplicaConnections,
      maxConnectionsPerAddress: limits.maxReplicaConnectionsPerAddress,
      // Replicas reach each other one by one: a balancer between them would lead to any of them.
      proxyProtocol: "off",
      onRefused: () => metrics.replicaConnectionsRefused.inc(),
    }),
  );
  return { grpc, endpoint: config.endpoint === "" ? endpointOf(host, grpc.port) : config.endpoint };
}
