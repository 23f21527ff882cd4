// The slice's services on a real public listener with real credentials, for tests.
import type { Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService as IdentityServiceDescriptor } from "@clodei/proto/gen/clodei/v1/identity_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import type { NodeId } from "@clodei/proto/ids";
import { identityHandlers } from "../identity/handlers.ts";
import { type CreatedApiKey, IdentityService } from "../identity/service.ts";
import { OrganizationsService } from "../organizations/service.ts";
import { createMetrics } from "../rpc/metrics.ts";
import { startPublicListener } from "../rpc/public-listener.ts";
import { RateLimiter } from "../rpc/rate-limit.ts";
import { TrustedProxies } from "../rpc/trusted-proxies.ts";
import { RequestValidator } from "../rpc/validation.ts";
import { enrollmentHandlers } from "./enrollment-handlers.ts";
import { nodeHandlers } from "./handlers.ts";
import type { TestFleet } from "./test-fleet.ts";

/** A listener, and who may call it. */
export type TestListener = AsyncDisposable & {
  readonly identity: IdentityService;
  readonly operator: CreatedApiKey;
  /** The key of an organization's admin. */
  readonly customerKey: string;
  /** A transport with this key; none where it is empty. */
  transport(apiKey: string): Transport;
};

/** Starts it over a fleet. Every node has the same allocation. */
export async function startTestListener(fleet: TestFleet): Promise<TestListener> {
  const { enrollment, authority, now: clock } = fleet;
  const { database, wakeups, log } = fleet.db;
  const identity = new IdentityService({ issuers: [], clock, log });
  const organizations = new OrganizationsService({ database, identity, clock });
  const operator = await database.system((tx) => identity.createOperator(tx, { name: "test" }));
  const { adminApiKey } = await database.system((tx) => organizations.create(tx, { name: "Customer" }));
  const allocations = (_tx: unknown, nodeIds: readonly NodeId[]) =>
    Promise.resolve(new Map(nodeIds.map((nodeId) => [nodeId, { gpuUuids: ["GPU-SIM-1"], cpuMillis: 500 }])));
  const limiter = (): RateLimiter => new RateLimiter({ perSecond: 10_000, burst: 10_000 });
  const listener = await startPublicListener({
    host: "127.0.0.1",
    port: 0,
    maxConnectionsPerAddress: 256,
    trustedProxies: new TrustedProxies([]),
    tls: await authority.issueListenerCertificate(["localhost"], new Date()),
    corsOrigins: [],
    routes(router) {
      router.service(
        NodeService,
        nodeHandlers({ database, wakeups, enrollment, clock, allocations, pollIntervalMs: 50 }),
      );
      router.service(EnrollmentService, enrollmentHandlers({ enrollment }));
      router.service(IdentityServiceDescriptor, identityHandlers());
    },
    authenticate: organizations.authenticate,
    stillHolds: organizations.stillHolds,
    addressLimiter: limiter(),
    callerLimiter: limiter(),
    validator: new RequestValidator(),
    recheckMs: 100,
    metrics: createMetrics(),
    log,
  });
  return {
    identity,
    operator,
    customerKey: adminApiKey,
    transport(apiKey) {
      const authenticate: Interceptor = (next) => (request) => {
        if (apiKey !== "") request.header.set("authorization", `Bearer ${apiKey}`);
        return next(request);
      };
      return createGrpcTransport({
        baseUrl: `https://localhost:${listener.port}`,
        nodeOptions: { ca: authority.certificatePem },
        interceptors: [authenticate],
      });
    },
    [Symbol.asyncDispose]: () => listener.close(0),
  };
}
