// The composition root: builds every part, in the order in which they need each other, and takes them down in the
// reverse. Nothing else knows the whole.
import { mkdir, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { ConnectRouter } from "@connectrpc/connect";
import { CatalogService as CatalogServiceDescriptor } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService as IdentityServiceDescriptor } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { Health } from "@clodei/proto/gen/grpc/health/v1/health";
import { ServerReflection } from "@clodei/proto/gen/grpc/reflection/v1/reflection";
import { ServerReflection as AlphaReflection } from "@clodei/proto/gen/grpc/reflection/v1alpha/reflection";
import { catalogHandlers } from "./catalog/handlers.ts";
import { CatalogService } from "./catalog/service.ts";
import { type Config, databaseSourceOf, readPem } from "./config.ts";
import { type NodeListener, startNodeListener } from "./dispatch/listener.ts";
import { identityHandlers } from "./identity/handlers.ts";
import { IdentityService } from "./identity/service.ts";
import { instanceHandlers } from "./instances/handlers.ts";
import { startScheduler } from "./instances/scheduler.ts";
import { InstancesService } from "./instances/service.ts";
import { Watches } from "./instances/watch.ts";
import type { Authority } from "./nodes/authority.ts";
import { claimAuthority } from "./nodes/authority-claim.ts";
import { openAuthority } from "./nodes/authority-store.ts";
import { enrollmentHandlers } from "./nodes/enrollment-handlers.ts";
import { Enrollment } from "./nodes/enrollment.ts";
import { nodeHandlers } from "./nodes/handlers.ts";
import { NodesService } from "./nodes/service.ts";
import { OrganizationsService } from "./organizations/service.ts";
import { PlacementService } from "./placement/service.ts";
import { pruneChanges } from "./platform/changes.ts";
import { type Clock, systemClock } from "./platform/clock.ts";
import { Database } from "./platform/database.ts";
import { pruneIdempotencyRecords } from "./platform/idempotency.ts";
import { listenAt } from "./platform/listen-error.ts";
import { createLog, type Log } from "./platform/log.ts";
import { openDatabase } from "./platform/open-database.ts";
import { startReconciler } from "./platform/reconciler.ts";
import { Wakeups } from "./platform/wakeups.ts";
import { HealthState, healthHandlers } from "./rpc/health.ts";
import { type FreshCertificate, keepCertificateFresh } from "./rpc/listener-certificate.ts";
import { createMetrics, type Metrics } from "./rpc/metrics.ts";
import { startOperationsListener } from "./rpc/operations-listener.ts";
import { type PublicListener, startPublicListener } from "./rpc/public-listener.ts";
import { RateLimiter } from "./rpc/rate-limit.ts";
import { createReflection } from "./rpc/reflection.ts";
import { TrustedProxies } from "./rpc/trusted-proxies.ts";
import { RequestValidator } from "./rpc/validation.ts";

/** A control plane that serves. */
export type RunningControlPlane = {
  /** "https://host:port" of the public listener; "http://…" where proxies end TLS before it. */
  readonly publicUrl: string;
  /** "host:port" of the node listener. */
  readonly nodeEndpoint: string;
  /** "host:port" of the replica listener, where there is one. */
  readonly replicaEndpoint: string | undefined;
  /** "http://127.0.0.1:port" of health and metrics. */
  readonly operationsUrl: string;
  /** PEM of the CA that signs the listeners' certificates, where the public one's is not configured. */
  readonly caPem: string;
  readonly database: Database;
  readonly identity: IdentityService;
  readonly organizations: OrganizationsService;
  /** Aborts when the process cannot go on: its embedded database ended. */
  readonly failed: AbortSignal;
  /** Drains, and ends everything that was started. */
  close(): Promise<void>;
};

/** The public services, in the order in which they are documented. */
export const publicServices = [
  InstanceService,
  CatalogServiceDescriptor,
  NodeService,
  EnrollmentService,
  IdentityServiceDescriptor,
] as const;

const healthCheckMs = 2_000;
/** An open stream asks this often whether its caller still may: what was taken away ends within a second. */
const recheckMs = 600;
const pruneIntervalMs = 10 * 60_000;
/** Mounted certificates are read again this often, so that a renewed file is taken without a restart. */
const certificateFileIntervalMs = 10 * 60_000;
/** A client that was idle may ask for so many seconds' worth at once. */
const burstSeconds = 5;

/** Starts a control plane. Everything that fails here fails before anything is served. */
export async function startControlPlane(
  config: Config,
  options: { readonly log?: Log } = {},
): Promise<RunningControlPlane> {
  const log = options.log ?? createLog(config.logLevel);
  const stack = new AsyncDisposableStack();
  try {
    const base = await startBase(config, log, stack);
    const domain = createDomain(config, base);
    const listeners = await startListeners(config, base, domain, stack);
    base.health.set("starting", false);
    const running = describe(config, base, domain, listeners);
    await writeListening(config.dataFolder, running, stack);
    const resources = stack.move();
    let closing: Promise<void> | undefined;
    return {
      ...running,
      close: () => (closing ??= drain(config, base, listeners).finally(() => resources.disposeAsync())),
    };
  } catch (error) {
    await stack.disposeAsync();
    throw error;
  }
}

// --- what everything stands on

type Base = {
  readonly log: Log;
  readonly clock: Clock;
  readonly metrics: Metrics;
  readonly health: HealthState;
  readonly database: Database;
  readonly wakeups: Wakeups;
  readonly authority: Authority;
  /** Aborts when the drain begins. */
  readonly draining: AbortController;
  readonly failed: AbortSignal;
};

async function startBase(config: Config, log: Log, stack: AsyncDisposableStack): Promise<Base> {
  const clock = systemClock;
  const metrics = createMetrics();
  const health = new HealthState();
  const opened = stack.use(await openDatabase(databaseSourceOf(config), { log }));
  const { app, system } = opened;
  const database = stack.use(new Database({ app, system, maxConnectionsPerPool: config.databaseConnections, log }));
  const wakeups = stack.use(new Wakeups({ connection: config.hints ? system : undefined, log }));
  await wakeups.start();
  const files =
    config.caCertificateFile === ""
      ? undefined
      : { certificateFile: config.caCertificateFile, privateKeyFile: config.caKeyFile };
  const source = { folder: join(config.dataFolder, "ca"), files, trustDomain: config.trustDomain };
  const authority = await openAuthority(source, clock());
  await database.system((tx) => claimAuthority(tx, authority.digestHex));
  const failed = opened.ended ?? new AbortController().signal;
  return { log, clock, metrics, health, database, wakeups, authority, draining: new AbortController(), failed };
}

// --- the slices

type Domain = {
  readonly identity: IdentityService;
  readonly organizations: OrganizationsService;
  readonly enrollment: Enrollment;
  readonly nodes: NodesService;
  readonly placement: PlacementService;
  readonly catalog: CatalogService;
  readonly instances: InstancesService;
  readonly watches: Watches;
  /** Told once the node listener listens. */
  readonly setNodeEndpoint: (endpoint: string) => void;
};

function createDomain(config: Config, base: Base): Domain {
  const { database, wakeups, clock, log, authority, metrics } = base;
  const { leaseMs, pollIntervalMs, imageAllowlist, allowedCountries } = config;
  let nodeEndpoint = config.nodeEndpoint;
  const identity = new IdentityService({ issuers: config.jwtIssuers, clock, log });
  const organizations = new OrganizationsService({ database, identity, clock });
  const enrollment = new Enrollment({
    database,
    authority,
    clock,
    hints: wakeups,
    allowedCountries,
    certificateLifetimeMs: config.nodeCertificateLifetimeMs,
    nodeEndpoint: () => nodeEndpoint,
  });
  const nodes = new NodesService({ enrollment, clock, wakeups, log, registry: metrics.registry, leaseMs });
  const placement = new PlacementService(nodes);
  const catalog = new CatalogService({ database, placement, imageAllowlist, maxAgeMs: pollIntervalMs });
  const instances = new InstancesService({ nodes, placement, wakeups, clock, imageAllowlist, allowedCountries });
  const drain = base.draining.signal;
  const watches = new Watches({ database, instances, wakeups, clock, drain, pollIntervalMs });
  return {
    identity,
    organizations,
    enrollment,
    nodes,
    placement,
    catalog,
    instances,
    watches,
    setNodeEndpoint(endpoint) {
      if (config.nodeEndpoint === "") nodeEndpoint = endpoint;
    },
  };
}

// --- the listeners

type Listeners = {
  readonly publicListener: PublicListener;
  readonly nodeListener: NodeListener;
  readonly operationsUrl: string;
};

async function startListeners(
  config: Config,
  base: Base,
  domain: Domain,
  stack: AsyncDisposableStack,
): Promise<Listeners> {
  const { database, wakeups, clock, log, metrics, health, authority } = base;
  const { nodes, instances, placement } = domain;
  const { heartbeatIntervalMs, leaseMs, pollIntervalMs, drainMs, publicNames } = config;
  const { operationsPort, nodeHost, nodePort } = config;
  const operations = await listenAt(
    { host: "127.0.0.1", port: operationsPort, settings: "--operations-port (CLODEI_OPERATIONS_PORT)" },
    () => startOperationsListener({ port: operationsPort, health, registry: metrics.registry }),
  );
  stack.use(operations);
  const nodeListener = await listenAt(
    { host: nodeHost, port: nodePort, settings: "--node-host and --node-port (CLODEI_NODE_HOST, CLODEI_NODE_PORT)" },
    () =>
      startNodeListener({
        database,
        wakeups,
        clock,
        log,
        registry: metrics.registry,
        nodes,
        instances,
        authority,
        config: {
          host: nodeHost,
          port: nodePort,
          maxConnectionsPerAddress: config.nodeConnectionsPerAddress,
          proxyProtocolFrom: config.nodeProxyProtocol ? new TrustedProxies(config.trustedProxies) : undefined,
          publicNames,
          replicas:
            config.replicaHost === ""
              ? undefined
              : { host: config.replicaHost, port: config.replicaPort, endpoint: config.replicaEndpoint },
          heartbeatIntervalMs,
          leaseMs,
          pollIntervalMs,
          drainMs,
        },
      }),
  );
  // Closed by the drain, or here when the start fails further on. Twice does no harm.
  stack.defer(() => nodeListener.close());
  domain.setNodeEndpoint(nodeListener.endpoint);
  stack.use(startScheduler({ database, nodes, placement, wakeups, clock, log, pollIntervalMs }));
  startHousekeeping(base, stack);
  const publicListener = await startPublic(config, base, domain, nodeListener, stack);
  return { publicListener, nodeListener, operationsUrl: operations.url };
}

async function startPublic(
  config: Config,
  base: Base,
  domain: Domain,
  nodeListener: NodeListener,
  stack: AsyncDisposableStack,
): Promise<PublicListener> {
  const { log, metrics } = base;
  const { organizations } = domain;
  const validator = new RequestValidator();
  validator.warmUp(publicServices.flatMap(({ methods }) => methods));
  const obtain = (): Promise<FreshCertificate> => obtainCertificate(config, base);
  const first = config.publicTls ? await obtain() : undefined;
  const settings = "--public-host and --public-port (CLODEI_PUBLIC_HOST, CLODEI_PUBLIC_PORT)";
  const publicListener = await listenAt({ host: config.publicHost, port: config.publicPort, settings }, () =>
    startPublicListener({
      host: config.publicHost,
      port: config.publicPort,
      maxConnectionsPerAddress: config.publicConnectionsPerAddress,
      tls: first,
      trustedProxies: new TrustedProxies(config.trustedProxies),
      corsOrigins: config.corsOrigins,
      routes: (router) => registerServices(router, config, base, domain, nodeListener),
      authenticate: organizations.authenticate,
      stillHolds: organizations.stillHolds,
      addressLimiter: new RateLimiter({ perSecond: config.addressRate, burst: config.addressRate * burstSeconds }),
      callerLimiter: new RateLimiter({ perSecond: config.callerRate, burst: config.callerRate * burstSeconds }),
      validator,
      recheckMs,
      metrics,
      log,
    }),
  );
  stack.defer(() => publicListener.close(0));
  const use = (next: FreshCertificate): void => publicListener.setCertificate(next);
  if (first !== undefined) stack.use(keepCertificateFresh({ listener: "public", first, obtain, use, log }));
  log.info({ port: publicListener.port, tls: config.publicTls }, "the public listener serves");
  return publicListener;
}

function registerServices(
  router: ConnectRouter,
  config: Config,
  base: Base,
  domain: Domain,
  nodeListener: NodeListener,
): void {
  const { database, wakeups, clock, health } = base;
  const { enrollment, placement, catalog, instances, watches } = domain;
  const services = [...publicServices, Health, ServerReflection, AlphaReflection];
  const reflection = createReflection(services);
  router.service(InstanceService, { ...instanceHandlers({ database, instances, watches }), ...nodeListener.handlers });
  router.service(CatalogServiceDescriptor, catalogHandlers({ catalog }));
  router.service(
    NodeService,
    nodeHandlers({
      database,
      wakeups,
      enrollment,
      clock,
      async allocations(tx, nodeIds) {
        const allocations = await placement.nodeAllocations(tx, nodeIds);
        return new Map([...allocations].map(([id, found]) => [id, { ...found, gpuUuids: [...found.gpuUuids] }]));
      },
      pollIntervalMs: config.pollIntervalMs,
    }),
  );
  router.service(EnrollmentService, enrollmentHandlers({ enrollment }));
  router.service(IdentityServiceDescriptor, identityHandlers());
  router.service(Health, healthHandlers(health, services));
  router.service(ServerReflection, reflection.v1);
  router.service(AlphaReflection, reflection.v1alpha);
}

async function obtainCertificate(config: Config, base: Base): Promise<FreshCertificate> {
  if (config.publicCertificateFile === "") {
    return base.authority.issueListenerCertificate(config.publicNames, base.clock());
  }
  return {
    certificateChainPem: readPem("CLODEI_PUBLIC_CERTIFICATE_FILE", config.publicCertificateFile),
    privateKeyPem: readPem("CLODEI_PUBLIC_KEY_FILE", config.publicKeyFile),
    renewTime: new Date(base.clock().getTime() + certificateFileIntervalMs),
  };
}

function startHousekeeping(base: Base, stack: AsyncDisposableStack): void {
  const { database, health, log, wakeups, clock } = base;
  stack.use(
    startReconciler({
      name: "health",
      topics: [],
      intervalMs: healthCheckMs,
      run: async () => health.set("database", !(await database.isHealthy())),
      log,
      wakeups,
    }),
  );
  stack.use(
    startReconciler({
      name: "pruning",
      topics: [],
      intervalMs: pruneIntervalMs,
      run: async (signal) => {
        while (!signal.aborted && (await pruneChanges(database, clock())) > 0);
        while (!signal.aborted && (await pruneIdempotencyRecords(database, clock())) > 0);
      },
      log,
      wakeups,
    }),
  );
}

// --- the end, and what others are told

/** Health says so first; then the listeners send their clients elsewhere, and what is open may finish. */
async function drain(config: Config, base: Base, listeners: Listeners): Promise<void> {
  base.log.info("draining");
  base.health.set("draining", true);
  base.draining.abort();
  await Promise.all([listeners.publicListener.close(config.drainMs), listeners.nodeListener.close()]);
}

function describe(
  config: Config,
  base: Base,
  domain: Domain,
  listeners: Listeners,
): Omit<RunningControlPlane, "close"> {
  const name = config.publicNames[0] ?? config.publicHost;
  return {
    publicUrl: `${config.publicTls ? "https" : "http"}://${name.includes(":") ? `[${name}]` : name}:${listeners.publicListener.port}`,
    nodeEndpoint: config.nodeEndpoint === "" ? listeners.nodeListener.endpoint : config.nodeEndpoint,
    replicaEndpoint: listeners.nodeListener.replicaEndpoint,
    operationsUrl: listeners.operationsUrl,
    caPem: base.authority.certificatePem,
    database: base.database,
    identity: domain.identity,
    organizations: domain.organizations,
    failed: base.failed,
  };
}

/** What a launcher and scripts read: where this process listens. */
export function listeningOf(
  running: Pick<RunningControlPlane, "publicUrl" | "nodeEndpoint" | "operationsUrl" | "caPem">,
) {
  const { publicUrl, nodeEndpoint, operationsUrl, caPem } = running;
  return { publicUrl, nodeEndpoint, operationsUrl, caPem, pid: process.pid };
}

async function writeListening(
  dataFolder: string,
  running: Omit<RunningControlPlane, "close">,
  stack: AsyncDisposableStack,
): Promise<void> {
  const folder = join(dataFolder, "run");
  const path = join(folder, "listening.json");
  await mkdir(folder, { recursive: true, mode: 0o755 });
  await writeFile(`${path}.new`, `${JSON.stringify(listeningOf(running))}\n`);
  await rename(`${path}.new`, path);
  stack.defer(() => rm(path, { force: true }));
}
