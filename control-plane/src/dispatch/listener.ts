// The node listener, and the link to other replicas behind it: everything of dispatch put together, in the order in
// which it starts, and undone in the reverse.
import { randomUUID } from "node:crypto";
import type { ServiceImpl } from "@connectrpc/connect";
import { NodeLinkService } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import type { Registry } from "prom-client";
import type { InstancesService } from "../instances/service.ts";
import type { Authority, NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import { startReconciler } from "../platform/reconciler.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import { type FreshCertificate, keepCertificateFresh } from "../rpc/listener-certificate.ts";
import type { TrustedProxies } from "../rpc/trusted-proxies.ts";
import { CertificateGate, type Peer } from "./certificate-gate.ts";
import { Conversation } from "./conversation.ts";
import { endpointOf, GrpcListener } from "./grpc-listener.ts";
import { HeartbeatBatcher } from "./heartbeats.ts";
import { dispatchLimits, type DispatchLimits } from "./limits.ts";
import { LogRelay } from "./log-relay.ts";
import { createDispatchMetrics, type DispatchMetrics } from "./metrics.ts";
import { NodeLink } from "./node-link.ts";
import { type ReplicaLink, type ReplicaLinkConfig, startReplicaLink } from "./replica-link.ts";
import { ReplicaServer } from "./replica-service.ts";
import { SessionClaims } from "./session-claims.ts";
import { SessionKeeper } from "./session-keeper.ts";
import { LogStreams } from "./stream-logs.ts";

/** What the node listener is made of. */
export type NodeListenerDeps = {
  readonly database: Database;
  readonly wakeups: Wakeups;
  readonly clock: Clock;
  readonly log: Log;
  readonly registry: Registry;
  readonly nodes: NodesService;
  readonly instances: InstancesService;
  /** Tells nodes' and replicas' certificates from others, and makes the listeners' own. */
  readonly authority: Pick<
    Authority,
    "issued" | "issuedReplica" | "certificatePem" | "issueListenerCertificate" | "issueReplicaCertificate"
  >;
  readonly config: NodeListenerConfig;
};

/** What an operator chooses. */
export type NodeListenerConfig = {
  /** The address to listen on. */
  readonly host: string;
  /** 0: any. */
  readonly port: number;
  readonly maxConnectionsPerAddress: number;
  /** Where given, every connection must come from one of these, and begin with a PROXY header. */
  readonly proxyProtocolFrom?: TrustedProxies | undefined;
  /** Names and addresses in the listener's certificate. The first is the one in the endpoint. */
  readonly publicNames: readonly string[];
  readonly heartbeatIntervalMs: number;
  readonly leaseMs: number;
  readonly pollIntervalMs: number;
  /** How long a drain may take before connections are cut. */
  readonly drainMs: number;
  /** Where other replicas ask for output of this process's nodes. Absent: they cannot. */
  readonly replicas?: ReplicaLinkConfig | undefined;
  /** Smaller bounds, for tests. */
  readonly limits?: Partial<DispatchLimits>;
};

/** A node listener that serves. */
export type NodeListener = {
  /** "host:port", as nodes are told it. */
  readonly endpoint: string;
  readonly port: number;
  /** "host:port", as other replicas are told it, where they may ask. */
  readonly replicaEndpoint: string | undefined;
  /** The method that dispatch serves on the public listener. */
  readonly handlers: Pick<ServiceImpl<typeof InstanceService>, "streamLogs">;
  /** How many sessions this process holds. */
  sessionCount(): number;
  /** Replaces the certificates of both links; connections that stand go on. Happens by itself at half-life. */
  renewCertificate(): Promise<void>;
  /** Sends every agent elsewhere, ends log streams, and closes. */
  close(): Promise<void>;
};

/** Agents come back to other processes spread over this time. */
const reconnectWithinMs = 5_000;
const leaseCheckMs = 2_000;
/** A GPU that two nodes report is for an operator to look at, and offered once whatever is said. */
const sharedGpusCheckMs = 5_000;

/** Starts the node listener. */
export async function startNodeListener(deps: NodeListenerDeps): Promise<NodeListener> {
  const { config, log } = deps;
  // What was started goes again where a later part cannot start: a process that cannot serve must end.
  await using stack = new AsyncDisposableStack();
  const parts = assemble(deps);
  stack.use(parts.heartbeats);
  stack.use(parts.keeper);
  const replicas = await startReplicas(deps, parts);
  stack.defer(() => replicas.close());
  const logs = createLogStreams(deps, parts, replicas);
  const obtain = (): Promise<FreshCertificate> =>
    deps.authority.issueListenerCertificate(config.publicNames, deps.clock());
  const first = await obtain();
  const listener = await listen(deps, parts, first);
  const use = (next: FreshCertificate): void => listener.renew(next);
  stack.use(startReconcilers(deps));
  const certificates = keepCertificateFresh({ listener: "node", first, obtain, use, log });
  const endpoint = endpointOf(config.publicNames[0] ?? config.host, listener.port);
  log.info({ endpoint }, "the node listener serves");

  const rest = stack.move();
  const close = async (): Promise<void> => {
    await certificates[Symbol.asyncDispose]();
    const endCalls = (): Promise<void> => {
      parts.draining.abort();
      parts.link.drain();
      return parts.link.idle();
    };
    await Promise.all([listener.close(config.drainMs, endCalls), replicas.close()]);
    await rest.disposeAsync();
  };
  let closing: Promise<void> | undefined;
  return {
    endpoint,
    port: listener.port,
    replicaEndpoint: replicas.endpoint,
    handlers: { streamLogs: (request, context) => logs.streamLogs(request, context) },
    sessionCount: () => parts.keeper.sessions().length,
    renewCertificate: async () => {
      use(await obtain());
      await replicas.renewCertificate();
    },
    close: () => (closing ??= close()),
  };
}

/** What looks at all nodes, connected here or not: each replica does, and the first one changes something. */
function startReconcilers({ database, nodes, wakeups, log }: NodeListenerDeps): AsyncDisposable {
  const stack = new AsyncDisposableStack();
  stack.use(
    startReconciler({
      name: "node-leases",
      topics: [],
      intervalMs: leaseCheckMs,
      wakeups,
      log,
      run: async () => {
        if (!(await database.look((tx) => nodes.hasExpiredLeases(tx)))) return;
        while ((await database.system((tx) => nodes.expireLeases(tx))).length > 0);
      },
    }),
  );
  stack.use(
    startReconciler({
      name: "shared-gpus",
      topics: [],
      intervalMs: sharedGpusCheckMs,
      wakeups,
      log,
      run: () => database.system((tx) => nodes.noteSharedGpus(tx)),
    }),
  );
  return stack;
}

type Parts = {
  readonly replicaId: string;
  readonly limits: DispatchLimits;
  readonly metrics: DispatchMetrics;
  readonly keeper: SessionKeeper;
  readonly heartbeats: HeartbeatBatcher;
  readonly relay: LogRelay;
  readonly link: NodeLink;
  readonly draining: AbortController;
  readonly setCut: (cut: (address: string) => void) => void;
  readonly setReplicaEndpoint: (endpoint: string | undefined) => void;
};

function assemble(deps: NodeListenerDeps): Parts {
  const { database, nodes, instances, wakeups, clock, log, config } = deps;
  const limits: DispatchLimits = { ...dispatchLimits, ...config.limits };
  const metrics = createDispatchMetrics(deps.registry);
  const replicaId = randomUUID();
  const draining = new AbortController();
  const { leaseMs, pollIntervalMs, heartbeatIntervalMs } = config;
  const gate = new CertificateGate({ database, nodes, clock, limits });
  const keeper = new SessionKeeper({
    database,
    nodes,
    instances,
    wakeups,
    clock,
    gate,
    metrics,
    log,
    pollIntervalMs: Math.min(pollIntervalMs, limits.sessionLookMs),
    leaseMs,
  });
  let replicaEndpoint: string | undefined;
  const claims = new SessionClaims({
    database,
    wakeups,
    clock,
    limits,
    leaseMs,
    replicaId,
    replicaEndpoint: () => replicaEndpoint,
    nodes,
    instances,
  });
  const heartbeats = new HeartbeatBatcher({ database, nodes, clock, log, batchMs: limits.heartbeatBatchMs });
  const relay = new LogRelay({ gate, limits, metrics });
  let cut: (address: string) => void = () => undefined;
  const conversation = new Conversation({
    database,
    wakeups,
    nodes,
    instances,
    clock,
    log,
    metrics,
    limits,
    gate,
    claims,
    keeper,
    heartbeats,
    relay,
    heartbeatIntervalMs,
    leaseMs,
  });
  const link = new NodeLink({
    database,
    nodes,
    log,
    metrics,
    limits,
    gate,
    relay,
    conversation,
    reconnectWithinMs,
    draining: draining.signal,
    cutConnection: (address) => cut(address),
  });
  const setCut = (next: (address: string) => void): void => {
    cut = next;
  };
  const setReplicaEndpoint = (endpoint: string | undefined): void => {
    replicaEndpoint = endpoint;
  };
  return { replicaId, limits, metrics, keeper, heartbeats, relay, link, draining, setCut, setReplicaEndpoint };
}

/** Before nodes come: a session is written down with the endpoint of who holds it. */
async function startReplicas(deps: NodeListenerDeps, parts: Parts): Promise<ReplicaLink> {
  const { database, instances, clock, log, authority, config } = deps;
  const { replicaId, limits, metrics, keeper, relay, draining } = parts;
  const server = new ReplicaServer({
    database,
    instances,
    clock,
    log,
    limits,
    metrics,
    keeper,
    relay,
    draining: draining.signal,
  });
  const link = await startReplicaLink({
    replicaId,
    authority,
    clock,
    log,
    limits,
    metrics,
    server,
    config: config.replicas,
  });
  parts.setReplicaEndpoint(link.endpoint);
  return link;
}

function createLogStreams(deps: NodeListenerDeps, parts: Parts, replicas: ReplicaLink): LogStreams {
  const { database, instances, wakeups, log, config } = deps;
  const { keeper, relay, limits, replicaId, draining } = parts;
  return new LogStreams({
    database,
    instances,
    wakeups,
    log,
    keeper,
    relay,
    replicas: replicas.client,
    limits,
    pollIntervalMs: config.pollIntervalMs,
    replicaId,
    draining: draining.signal,
  });
}

async function listen(deps: NodeListenerDeps, parts: Parts, first: FreshCertificate): Promise<GrpcListener> {
  const { config, authority } = deps;
  const { limits, metrics, link } = parts;
  const { maxConnectionsPerAddress, proxyProtocolFrom } = config;
  const listener = await GrpcListener.start(config, {
    service: NodeLinkService,
    handlers: link.handlers((call) => peerOf(call, authority)),
    certificate: first,
    clientCaPem: authority.certificatePem,
    maxMessageBytes: limits.maxMessageBytes,
    maxStreamsPerConnection: limits.maxStreamsPerConnection,
    maxConnections: limits.maxConnections,
    maxConnectionsPerAddress,
    proxyProtocol:
      proxyProtocolFrom === undefined ? "off" : { from: proxyProtocolFrom, timeoutMs: limits.proxyHeaderTimeoutMs },
    onRefused(why) {
      if (why === "too_many") metrics.connectionsRefused.inc();
      else metrics.proxyConnectionsRefused.inc({ why });
    },
  });
  parts.setCut((address) => listener.cut(address));
  return listener;
}

function peerOf(
  call: { getAuthContext(): { sslPeerCertificate?: { raw: Buffer } }; getPeer(): string },
  authority: Pick<Authority, "issued">,
): Peer | undefined {
  const raw = call.getAuthContext().sslPeerCertificate?.raw;
  const certificate = raw === undefined ? undefined : authority.issued(raw);
  if (certificate === undefined) return undefined;
  return {
    nodeId: certificate.nodeId,
    certificateSerial: certificate.serial,
    certificateExpireTime: certificate.notAfter,
    address: call.getPeer(),
  };
}
