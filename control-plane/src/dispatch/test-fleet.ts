// What the tests of dispatch stand on: a real database, the real slices before this one, real listeners with TLS,
// and nodes that were really enrolled. Only the agents are scripted (scripted-agent.ts).
import "reflect-metadata"; // before @peculiar/x509, which needs it at import
import * as x509 from "@peculiar/x509";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { createHandlerContext, type HandlerContext } from "@connectrpc/connect";
import { InstanceSpecSchema } from "@clodei/proto/gen/clodei/v1/instance";
import {
  InstanceService,
  StreamLogsRequestSchema,
  type StreamLogsResponseSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import { type ApiKeyId, newId, type InstanceId, type NodeId, type OrganizationId } from "@clodei/proto/ids";
import { Registry } from "prom-client";
import { InstancesService } from "../instances/service.ts";
import { startScheduler } from "../instances/scheduler.ts";
import { Authority } from "../nodes/authority.ts";
import { Enrollment } from "../nodes/enrollment.ts";
import { revokeNode } from "../nodes/operations.ts";
import { NodesService } from "../nodes/service.ts";
import { PlacementService } from "../placement/service.ts";
import { Database } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import { startTestDatabase, type TestDatabase } from "../platform/test-database.ts";
import { Wakeups } from "../platform/wakeups.ts";
import { createRequestValues } from "../rpc/context.ts";
import { startNodeListener, type NodeListener, type NodeListenerConfig } from "./listener.ts";

/** A node's key and certificate, as its state folder would hold them. */
export type NodeIdentity = {
  readonly nodeId: NodeId;
  readonly privateKeyPem: string;
  readonly certificatePem: string;
};

/** A control plane without its public listener. */
export type Replica = {
  readonly listener: NodeListener;
  readonly registry: Registry;
  readonly instances: InstancesService;
  readonly nodes: NodesService;
};

/** How long nodes' certificates live. */
export const certificateLifetimeMs = 60 * 60 * 1000;

const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
const keyAlgorithm = { name: "ECDSA", namedCurve: "P-256" } as const;

/** The fleet of a test. */
export class TestFleet implements AsyncDisposable {
  readonly db: TestDatabase;
  readonly authority: Authority;
  readonly organizationId: OrganizationId = newId("org");
  readonly enrollment: Enrollment;
  readonly #resources = new AsyncDisposableStack();
  /** What is added to the clock of everything that is started here. */
  clockOffsetMs = 0;

  private constructor(db: TestDatabase, authority: Authority) {
    this.db = db;
    this.authority = authority;
    this.enrollment = this.#createEnrollment();
  }

  static async start(): Promise<TestFleet> {
    const db = await startTestDatabase();
    const now = new Date();
    const { certificatePem, privateKeyPem } = await Authority.generate(now);
    const fleet = new TestFleet(db, await Authority.fromPem(certificatePem, privateKeyPem, "clodei.test", now));
    fleet.#resources.use(db);
    return fleet;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#resources.disposeAsync();
  }

  clock = (): Date => new Date(Date.now() + this.clockOffsetMs);

  /** Starts a replica: a node listener, and the scheduler behind it. */
  async startReplica(config: Partial<NodeListenerConfig> = {}, log: Log = this.db.log): Promise<Replica> {
    const { server } = this.db;
    const registry = new Registry();
    // Every replica has connections and hints of its own, as another process has.
    const database = this.#resources.use(new Database({ app: server.app, system: server.system, log }));
    const wakeups = this.#resources.use(new Wakeups({ connection: server.system, log }));
    await wakeups.start();
    const { clock } = this;
    const leaseMs = config.leaseMs ?? 20_000;
    const nodes = new NodesService({ enrollment: this.enrollment, clock, wakeups, log, registry, leaseMs });
    const placement = new PlacementService(nodes);
    const instances = new InstancesService({
      nodes,
      placement,
      wakeups,
      clock,
      imageAllowlist: ["library/"],
      allowedCountries: ["ES"],
    });
    this.#resources.use(startScheduler({ database, nodes, placement, wakeups, clock, log, pollIntervalMs: 500 }));
    const listener = await startNodeListener({
      database,
      wakeups,
      clock,
      log,
      registry,
      nodes,
      instances,
      authority: this.authority,
      config: {
        host: "127.0.0.1",
        port: 0,
        maxConnectionsPerAddress: 256,
        publicNames: ["localhost", "127.0.0.1"],
        replicas: { host: "127.0.0.1", port: 0, endpoint: "" },
        heartbeatIntervalMs: 1_000,
        leaseMs,
        pollIntervalMs: 500,
        drainMs: 2_000,
        ...config,
        limits: { probeTimeoutMs: 2_000, cloneGraceMs: 100, ...config.limits },
      },
    });
    this.#resources.defer(() => listener.close());
    return { listener, registry, instances, nodes };
  }

  /** Enrolls a node with a real token and a real certificate request. */
  async enroll(): Promise<NodeIdentity> {
    const enrollment = this.enrollment;
    const { token } = await this.db.database.system((tx) =>
      enrollment.createToken(tx, { location, nodeName: "", maxUses: 1, lifetimeMs: 60_000, creatorId: newId("opr") }),
    );
    const { request, privateKeyPem } = await createCertificateRequest();
    const identity = await enrollment.enroll({
      enrollmentToken: token,
      certificateRequest: request,
      agentVersion: "0.0.0",
    });
    return {
      nodeId: identity.node.nodeId,
      privateKeyPem,
      certificatePem: new x509.X509Certificate(identity.certificate).toString("pem"),
    };
  }

  /** Revokes a node, as an operator does. */
  async revoke(nodeId: NodeId): Promise<void> {
    const { database, wakeups } = this.db;
    await database.system((tx) => revokeNode(tx, nodeId, "test", this.clock(), wakeups));
  }

  /** Creates an instance, of the test's organization where none is named; the scheduler places it. */
  async createInstance(
    replica: Replica,
    spec: MessageInitShape<typeof InstanceSpecSchema> = {},
    organizationId: OrganizationId = this.organizationId,
  ): Promise<InstanceId> {
    const instance = await this.db.database.tenant(organizationId, (tx) =>
      replica.instances.create(
        tx,
        create(InstanceSpecSchema, { image: "library/busybox:latest", cpuMillis: 100, memoryMib: 64, ...spec }),
        newId("key"),
      ),
    );
    return instance.id;
  }

  /** Reads rows as the superuser. */
  async rows<Row extends object>(text: string, values: readonly unknown[] = []): Promise<Row[]> {
    return this.db.database.system((tx) => tx.query<Row>(text, values));
  }

  /** Calls StreamLogs as a member of an organization. */
  streamLogs(
    replica: Replica,
    request: MessageInitShape<typeof StreamLogsRequestSchema>,
    options: {
      readonly signal?: AbortSignal;
      readonly organizationId?: OrganizationId;
      readonly callerId?: ApiKeyId;
    } = {},
  ): AsyncIterable<MessageInitShape<typeof StreamLogsResponseSchema>> {
    const context = this.#contextOf(
      options.organizationId ?? this.organizationId,
      options.callerId ?? testCallerId,
      options.signal,
    );
    return replica.listener.handlers.streamLogs(create(StreamLogsRequestSchema, request), context);
  }

  #createEnrollment(): Enrollment {
    return new Enrollment({
      database: this.db.database,
      authority: this.authority,
      clock: this.clock,
      hints: this.db.wakeups,
      allowedCountries: ["ES"],
      certificateLifetimeMs,
      nodeEndpoint: () => "localhost:8444",
    });
  }

  #contextOf(organizationId: OrganizationId, callerId: ApiKeyId, signal: AbortSignal | undefined): HandlerContext {
    const values = createRequestValues({
      requestId: "test",
      address: "127.0.0.1",
      hasTooManyOpen: false,
      method: undefined,
      isStream: true,
      code: undefined,
      caller: {
        kind: "customer",
        organizationId,
        organizationName: "test",
        callerId,
        credential: "api_key",
        roles: new Set([Role.MEMBER]),
        emailVerified: true,
      },
    });
    return createHandlerContext({
      service: InstanceService,
      method: InstanceService.method.streamLogs,
      protocolName: "connect",
      requestMethod: "POST",
      url: "https://localhost/",
      contextValues: values,
      ...(signal === undefined ? {} : { requestSignal: signal }),
    });
  }
}

const testCallerId = newId("key");

/** A key, and a certificate request for it. */
export async function createCertificateRequest(): Promise<{ request: Uint8Array; privateKeyPem: string }> {
  const keys = await globalThis.crypto.subtle.generateKey(keyAlgorithm, true, ["sign", "verify"]);
  const request = await x509.Pkcs10CertificateRequestGenerator.create({
    name: "CN=node",
    keys,
    signingAlgorithm: { name: "ECDSA", hash: "SHA-256" },
  });
  const pkcs8 = await globalThis.crypto.subtle.exportKey("pkcs8", keys.privateKey);
  return {
    request: new Uint8Array(request.rawData),
    privateKeyPem: x509.PemConverter.encode(pkcs8, "PRIVATE KEY"),
  };
}
