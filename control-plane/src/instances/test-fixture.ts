// The slice on a real database with a fleet of rows, for tests: everything is real but the agents.
import { create, toBinary } from "@bufbuild/protobuf";
import { type Client, createClient, createRouterTransport, type Interceptor } from "@connectrpc/connect";
import {
  type AttemptPhase,
  AttemptStatusSchema,
  type DesiredSet,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import { CatalogService as CatalogServiceDescriptor } from "@clodei/proto/gen/clodei/v1/catalog_service";
import type { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { GpuHealth, MigMode, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import { newId, type NodeId, type OrganizationId } from "@clodei/proto/ids";
import { defaultImageAllowlist } from "@clodei/proto/image-reference";
import { Registry } from "prom-client";
import { catalogHandlers } from "../catalog/handlers.ts";
import { CatalogService } from "../catalog/service.ts";
import { Authority } from "../nodes/authority.ts";
import { Enrollment } from "../nodes/enrollment.ts";
import { NodesService } from "../nodes/service.ts";
import { PlacementService } from "../placement/service.ts";
import type { Clock } from "../platform/clock.ts";
import { startTestDatabase, type TestDatabase } from "../platform/test-database.ts";
import type { Caller, CustomerCaller } from "../rpc/caller.ts";
import { createRequestValues } from "../rpc/context.ts";
import { createInterceptors } from "../rpc/interceptors.ts";
import { createMetrics } from "../rpc/metrics.ts";
import { RateLimiter } from "../rpc/rate-limit.ts";
import { RequestValidator } from "../rpc/validation.ts";
import { instanceHandlers } from "./handlers.ts";
import { Scheduler, type SchedulerOptions } from "./scheduler.ts";
import { InstancesService } from "./service.ts";
import { Watches } from "./watch.ts";

/** The parts under test. `now` is the time that they see. */
export type Fixture = AsyncDisposable & {
  readonly db: TestDatabase;
  readonly nodes: NodesService;
  readonly placement: PlacementService;
  readonly instances: InstancesService;
  readonly scheduler: Scheduler;
  readonly schedulerOptions: SchedulerOptions;
  readonly drain: AbortController;
  now: Date;
  /** A client of the handlers, behind the interceptors of the public listener. */
  client(caller: Caller): Client<typeof InstanceService>;
  catalog(caller: Caller): Client<typeof CatalogServiceDescriptor>;
};

/** Starts the parts, without reconcilers. */
export async function startFixture(): Promise<Fixture> {
  const db = await startTestDatabase();
  const { database, wakeups, log } = db;
  const drain = new AbortController();
  const clock = (): Date => fixture.now;
  const nodes = await createNodes(db, clock);
  const placement = new PlacementService(nodes);
  const imageAllowlist = defaultImageAllowlist;
  const instances = new InstancesService({ nodes, placement, wakeups, clock, imageAllowlist, allowedCountries });
  const pollIntervalMs = 1_000;
  const schedulerOptions = { database, nodes, placement, wakeups, clock, log, pollIntervalMs };
  const watches = new Watches({ database, instances, wakeups, clock, drain: drain.signal, pollIntervalMs });
  const catalog = new CatalogService({ database, placement, imageAllowlist, maxAgeMs: 0 });
  const validator = new RequestValidator();
  const transport = (caller: Caller) =>
    createRouterTransport(
      (router) => {
        // StreamLogs is another slice's.
        router.service(InstanceService, { ...instanceHandlers({ database, instances, watches }) });
        router.service(CatalogServiceDescriptor, catalogHandlers({ catalog }));
      },
      { router: { interceptors: [identify(caller), ...interceptors(db, drain.signal, validator)] } },
    );
  const fixture: Fixture = {
    db,
    nodes,
    placement,
    instances,
    scheduler: new Scheduler(schedulerOptions),
    schedulerOptions,
    drain,
    now: new Date(),
    client: (caller) => createClient(InstanceService, transport(caller)),
    catalog: (caller) => createClient(CatalogServiceDescriptor, transport(caller)),
    [Symbol.asyncDispose]: () => db[Symbol.asyncDispose](),
  };
  return fixture;
}

/** There are no nodes in San Marino. */
const allowedCountries = ["ES", "FR", "SM"];

async function createNodes({ database, wakeups, log }: TestDatabase, clock: Clock): Promise<NodesService> {
  const now = new Date();
  const { certificatePem, privateKeyPem } = await Authority.generate(now);
  const enrollment = new Enrollment({
    database,
    authority: await Authority.fromPem(certificatePem, privateKeyPem, "clodei.test", now),
    clock,
    hints: wakeups,
    allowedCountries,
    certificateLifetimeMs: 86_400_000,
    nodeEndpoint: () => "localhost:1",
  });
  return new NodesService({ enrollment, clock, wakeups, log, registry: new Registry(), leaseMs: 30_000 });
}

function identify(caller: Caller): Interceptor {
  const values = () =>
    createRequestValues({
      requestId: "test",
      address: "127.0.0.1",
      hasTooManyOpen: false,
      caller,
      method: undefined,
      isStream: false,
      code: undefined,
    });
  return (next) => (request) => next({ ...request, contextValues: values() });
}

function interceptors(db: TestDatabase, shutdownSignal: AbortSignal, validator: RequestValidator): Interceptor[] {
  const limiter = () => new RateLimiter({ perSecond: 10_000, burst: 10_000 });
  return createInterceptors({
    authenticate: () => Promise.reject(new Error("the gate is not part of this test")),
    stillHolds: () => Promise.resolve(true),
    addressLimiter: limiter(),
    callerLimiter: limiter(),
    validator,
    shutdownSignal,
    recheckMs: 60_000,
    metrics: createMetrics(),
    log: db.log,
  });
}

/** A member of an organization of its own. */
export function createCustomer(organizationId: OrganizationId = newId("org")): CustomerCaller {
  return {
    kind: "customer",
    organizationId,
    organizationName: "test",
    callerId: newId("key"),
    credential: "api_key",
    roles: new Set([Role.MEMBER]),
    emailVerified: true,
  };
}

/** Adds a ready node with simulated GPUs to the fleet. */
export async function addNode(
  { db }: Fixture,
  fields: { gpus?: number; model?: string; country?: string; cpuCount?: number; memoryMib?: number } = {},
): Promise<NodeId> {
  const nodeId = newId("nod");
  const { gpus = 0, model = "H100-SXM", country = "ES", cpuCount = 64, memoryMib = 256_512 } = fields;
  const inventory = create(NodeInventorySchema, {
    host: { hostname: "node", cpuCount, memoryMib },
    gpus: Array.from({ length: gpus }, (_, index) => ({
      uuid: `GPU-SIM-${nodeId.slice(-12)}-${index}`,
      model,
      memoryMib: 81_559,
      migMode: MigMode.DISABLED,
      health: GpuHealth.HEALTHY,
      simulated: true,
      index,
    })),
  });
  await db.database.system((tx) =>
    tx.execute(
      `insert into nodes (id, name, country, region, datacenter, tier, state, connected, accepting_work, inventory)
       values ($1, $2, $3, 'madrid', 'kumo-1', 4, 'ready', true, true, $4)`,
      [nodeId, nodeId.slice(-10), country, toBinary(NodeInventorySchema, inventory)],
    ),
  );
  return nodeId;
}

let sequence = 0n;

/** The desired set of a node, as dispatch would send it now. */
export function readDesiredSet({ db, nodes, instances }: Fixture, nodeId: NodeId): Promise<DesiredSet> {
  return db.database.system(async (tx) => {
    const generations = await nodes.newerGenerations(tx, new Map([[nodeId, -1n]]));
    return instances.desiredSet(tx, nodeId, generations.get(nodeId) ?? 0n);
  });
}

/** Reports a phase of an attempt, as a node's session does. */
export async function reportPhase(
  { db, instances }: Fixture,
  nodeId: NodeId,
  attempt: { readonly id: string; readonly attempt: number },
  phase: AttemptPhase,
  fields: { exitCode?: number; reason?: InstanceReason; message?: string } = {},
): Promise<{ readonly foreign: number }> {
  sequence += 1n;
  const status = create(AttemptStatusSchema, {
    sequence,
    instanceId: attempt.id,
    attempt: attempt.attempt,
    phase,
    ...fields,
  });
  return db.database.system((tx) => instances.applyStatuses(tx, nodeId, [status]));
}
