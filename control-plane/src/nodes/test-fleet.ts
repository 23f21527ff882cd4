// A fleet over a real database and a real CA, for tests. Its clock stands still until a test moves it.
import { create } from "@bufbuild/protobuf";
import { GpuHealth, MigMode, type NodeInventory, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import type { NodeId } from "@clodei/proto/ids";
import { euAndEeaCountries } from "@clodei/proto/locations";
import { Registry } from "prom-client";
import { startTestDatabase, type TestDatabase } from "../platform/test-database.ts";
import { Authority } from "./authority.ts";
import { Enrollment, type Identity, type TokenRequest } from "./enrollment.ts";
import { NodesService } from "./service.ts";
import { createNodeKey, type NodeKey } from "./test-node.ts";

/** Everything of the nodes slice, and what it stands on. */
export type TestFleet = AsyncDisposable & {
  readonly db: TestDatabase;
  readonly authority: Authority;
  readonly enrollment: Enrollment;
  readonly nodes: NodesService;
  readonly registry: Registry;
  /** Moves the clock on. */
  advance(ms: number): void;
  now(): Date;
  /** Makes a token, in Madrid where nothing else is said. */
  createToken(request?: Partial<TokenRequest>): Promise<string>;
  /** Enrolls a node with a token of its own. */
  enrollNode(): Promise<{ readonly key: NodeKey; readonly identity: Identity; readonly token: string }>;
  /** Lets a node's agent say Hello. */
  hello(nodeId: NodeId): Promise<void>;
};

export const madrid = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
export const leaseMs = 30_000;
export const certificateLifetimeMs = 24 * 60 * 60 * 1000;

/** Starts it. Takes about a second, for the database. */
export async function startTestFleet(): Promise<TestFleet> {
  const db = await startTestDatabase();
  let nowMs = Date.now();
  const clock = (): Date => new Date(nowMs);
  const { certificatePem, privateKeyPem } = await Authority.generate(clock());
  const authority = await Authority.fromPem(certificatePem, privateKeyPem, "clodei.com", clock());
  const { database, wakeups, log } = db;
  const registry = new Registry();
  const enrollment = new Enrollment({
    database,
    authority,
    clock,
    hints: wakeups,
    allowedCountries: euAndEeaCountries,
    certificateLifetimeMs,
    nodeEndpoint: () => "node.example:8444",
  });
  const nodes = new NodesService({ enrollment, clock, wakeups, log, registry, leaseMs });

  const createToken = async (request: Partial<TokenRequest> = {}): Promise<string> => {
    const whole = {
      location: madrid,
      nodeName: "",
      maxUses: 1,
      lifetimeMs: 3_600_000,
      creatorId: "opr_test",
      ...request,
    };
    return (await database.system((tx) => enrollment.createToken(tx, whole))).token;
  };
  return {
    db,
    authority,
    enrollment,
    nodes,
    registry,
    advance: (ms) => {
      nowMs += ms;
    },
    now: clock,
    createToken,
    async enrollNode() {
      const [key, token] = [await createNodeKey(), await createToken()];
      const identity = await enrollment.enroll({
        enrollmentToken: token,
        certificateRequest: key.certificateRequest,
        agentVersion: "1.0.0",
      });
      return { key, identity, token };
    },
    async hello(nodeId) {
      const facts = { agentVersion: "2.0.0", inventory: testInventory(), observedGeneration: 0n };
      await database.system((tx) => nodes.recordHello(tx, nodeId, facts));
    },
    [Symbol.asyncDispose]: () => db[Symbol.asyncDispose](),
  };
}

/** What a node with one GPU reports. */
function testInventory(): NodeInventory {
  return create(NodeInventorySchema, {
    gpus: [
      {
        uuid: "GPU-SIM-1",
        model: "H100-SXM",
        memoryMib: 81_559,
        health: GpuHealth.HEALTHY,
        migMode: MigMode.DISABLED,
        simulated: true,
      },
    ],
    host: { hostname: "machine", cpuCount: 8, memoryMib: 32_768 },
  });
}
