// The node listener: everything of dispatch put together, in the order in which it starts, and undone in the reverse.
import { randomUUID } from "node:crypto";
import type { ServiceImpl } from "@connectrpc/connect";
import { Server } from "@grpc/grpc-js";
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
import { Connections } from "./connections.ts";
import { Conversation } from "./conversation.ts";
import { ListenerCredentials, type ListenerTlsMaterial } from "./credentials.ts";
import { addGrpcService } from "./grpc-adapter.ts";
import { HeartbeatBatcher } from "./heartbeats.ts";
import { createMessageCheck } from "./incoming.ts";
import { dispatchLimits, type DispatchLimits } from "./limits.ts";
import { LogRelay } from "./log-relay.ts";
import { createDispatchMetrics, type DispatchMetrics } from "./metrics.ts";
import { NodeLink } from "./node-link.ts";
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
  /** Tells nodes' certificates from others, and makes the listener's own. */
  readonly authority: Pick<Authority, "issued" | "certificatePem" | "issueListenerCertificate">;
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
  /** Smaller bounds, for tests. */
  readonly limits?: Partial<DispatchLimits>;
};

/** A node listener that serves. */
export type NodeListener = {
  /** "host:port", as nodes are told it. */
  readonly endpoint: string;
  readonly port: number;
  /** The method that dispatch serves on the public listener. */
  readonly handlers: Pick<ServiceImpl<typeof InstanceService>, "streamLogs">;
  /** How many sessions this process holds. */
  sessionCount(): number;
  /** Replaces the listener's certificate; connections that stand go on. Happens by itself at half-life. */
  renewCertificate(): Promise<void>;
  /** Sends every agent elsewhere, ends log streams, and closes. */
  close(): Promise<void>;
};

/** Agents have their session on their connection. One that has nothing on it for so long is nobody's. */
const idleConnectionMs = 60_000;
/** Agents come back to other processes spread over this time. */
const reconnectWithinMs = 5_000;
const leaseCheckMs = 1_000;
/** A GPU that two nodes report is for an operator to look at, and offered once whatever is said. */
const sharedGpusCheckMs = 5_000;

/** Starts the node listener. */
export async function startNodeListener(deps: NodeListenerDeps): Promise<NodeListener> {
  const parts = assemble(deps);
  const { config, log } = deps;
  const obtain = (): Promise<FreshCertificate> =>
    deps.authority.issueListenerCertificate(config.publicNames, deps.clock());
  const first = await obtain();
  const credentials = new ListenerCredentials(materialOf(first, deps));
  const use = (next: FreshCertificate): void => credentials.renew(materialOf(next, deps));
  const server = createServer(parts.limits);
  addGrpcService(
    server,
    NodeLinkService,
    parts.link.handlers((call) => peerOf(call, deps.authority)),
    createMessageCheck(NodeLinkService.methods.map(({ input }) => input)),
  );
  const injector = server.createConnectionInjector(credentials);
  const connections = new Connections({
    injector,
    maxConnections: parts.limits.maxConnections,
    maxConnectionsPerAddress: config.maxConnectionsPerAddress,
    proxyProtocol:
      config.proxyProtocolFrom === undefined
        ? "off"
        : { from: config.proxyProtocolFrom, timeoutMs: parts.limits.proxyHeaderTimeoutMs },
    onRefused(why) {
      if (why === "too_many") parts.metrics.connectionsRefused.inc();
      else parts.metrics.proxyConnectionsRefused.inc({ why });
    },
  });
  parts.setCut((address) => connections.cut(address));
  const port = await connections.listen(config.host, config.port).catch(async (error: unknown) => {
    // Else what was assembled would keep the process that cannot serve alive.
    injector.destroy();
    await parts.keeper[Symbol.asyncDispose]();
    await parts.heartbeats[Symbol.asyncDispose]();
    server.forceShutdown();
    throw error;
  });
  const reconcilers = startReconcilers(deps);
  const certificates = keepCertificateFresh({ listener: "node", first, obtain, use, log });
  const endpoint = `${bracketed(config.publicNames[0] ?? config.host)}:${port}`;
  log.info({ endpoint }, "the node listener serves");

  const close = async (): Promise<void> => {
    await certificates[Symbol.asyncDispose]();
    const stopped = connections.stopAccepting();
    parts.draining.abort();
    parts.link.drain();
    // GOAWAY on every connection; what has not ended in time is cut.
    injector.drain(config.drainMs);
    const cut = setTimeout(() => connections.cutAll(), config.drainMs);
    await parts.link.idle();
    injector.destroy();
    await stopped;
    clearTimeout(cut);
    await reconcilers[Symbol.asyncDispose]();
    await parts.keeper[Symbol.asyncDispose]();
    await parts.heartbeats[Symbol.asyncDispose]();
    server.forceShutdown();
  };
  let closing: Promise<void> | undefined;
  return {
    endpoint,
    port,
    handlers: { streamLogs: (request, context) => parts.logs.streamLogs(request, context) },
    sessionCount: () => parts.keeper.sessions().length,
    renewCertificate: async () => use(await obtain()),
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
  readonly limits: DispatchLimits;
  readonly metrics: DispatchMetrics;
  readonly keeper: SessionKeeper;
  readonly heartbeats: HeartbeatBatcher;
  readonly link: NodeLink;
  readonly logs: LogStreams;
  readonly draining: AbortController;
  readonly setCut: (cut: (address: string) => void) => void;
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
    pollIntervalMs,
    leaseMs,
  });
  const claims = new SessionClaims({ database, wakeups, clock, limits, leaseMs, replicaId, nodes, instances });
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
  const logs = new LogStreams({
    database,
    instances,
    wakeups,
    keeper,
    relay,
    limits,
    pollIntervalMs,
    replicaId,
    draining: draining.signal,
  });
  const setCut = (next: (address: string) => void): void => {
    cut = next;
  };
  return { limits, metrics, keeper, heartbeats, link, logs, draining, setCut };
}

function createServer(limits: DispatchLimits): Server {
  return new Server({
    "grpc.max_receive_message_length": limits.maxMessageBytes,
    // A whole desired set may pass 4 MiB; what an agent cannot take, it refuses itself.
    "grpc.max_send_message_length": -1,
    "grpc.max_concurrent_streams": limits.maxStreamsPerConnection,
    // No pings: a session that is not heard ends with its lease, and pinging thousands of agents costs CPU.
    "grpc.max_connection_idle_ms": idleConnectionMs,
    // Its bookkeeping costs memory for every connection, and nothing reads it.
    "grpc.enable_channelz": 0,
  });
}

function materialOf(certificate: FreshCertificate, deps: NodeListenerDeps): ListenerTlsMaterial {
  return {
    certificateChainPem: certificate.certificateChainPem,
    privateKeyPem: certificate.privateKeyPem,
    clientCaPem: deps.authority.certificatePem,
  };
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

function bracketed(host: string): string {
  return host.includes(":") ? `[${host}]` : host;
}
