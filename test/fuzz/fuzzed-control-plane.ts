// A control plane in the test's own process, so that what it throws, logs and keeps in memory is seen: its real
// listeners, its embedded PostgreSQL, two organizations that must not learn of each other, an operator, and a node
// whose agent is scripted and takes all work.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { AttemptPhase, DesiredState } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";
import { createClient, type ClodeiClient } from "@clodei/sdk";
import { createClient as createRpcClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { randomUUID, X509Certificate } from "node:crypto";
import { loadConfig } from "../../control-plane/src/config.ts";
import { createNodeClient, ScriptedAgent } from "../../control-plane/src/dispatch/scripted-agent.ts";
import { createCertificateRequest, type NodeIdentity } from "../../control-plane/src/dispatch/test-fleet.ts";
import { openAuthority } from "../../control-plane/src/nodes/authority-store.ts";
import { createLog } from "../../control-plane/src/platform/log.ts";
import { type RunningControlPlane, startControlPlane } from "../../control-plane/src/start.ts";
import { madrid } from "../harness/system.ts";
import { eventually } from "../harness/eventually.ts";
import { RawClient } from "./raw-calls.ts";

/** Who calls. The marker stands in everything that is theirs. */
export type FuzzCaller = { readonly name: string; readonly key: string; readonly marker: string };

/** More than any test needs: these tests are about other limits. */
const noRate = "1000000";
const patienceMs = 60_000;

/** The control plane under attack. */
export class FuzzedControlPlane implements AsyncDisposable {
  readonly folder: string;
  readonly running: RunningControlPlane;
  /** Lines of the log that say that something failed. */
  readonly failures: string[];
  readonly #closing: AsyncDisposableStack;

  private constructor(folder: string, running: RunningControlPlane, failures: string[], closing: AsyncDisposableStack) {
    this.folder = folder;
    this.running = running;
    this.failures = failures;
    this.#closing = closing;
  }

  static async start(flags: Readonly<Record<string, string>> = {}): Promise<FuzzedControlPlane> {
    await using stack = new AsyncDisposableStack();
    const folder = await mkdtemp(join(tmpdir(), "clodei-fuzz-"));
    stack.defer(() => rm(folder, { recursive: true, force: true, maxRetries: 50, retryDelay: 100 }));
    const failures: string[] = [];
    const log = createLog("error", {
      write: (line) => {
        // On a machine that does much else a transaction may wait so long for this process that its server ends it.
        if (!line.includes('"type":"DatabaseAwayError"')) failures.push(line);
      },
    });
    const config = loadConfig({
      environment: {},
      flags: {
        "--data": folder,
        "--public-port": "0",
        "--node-port": "0",
        "--operations-port": "0",
        "--replica-host": "127.0.0.1",
        "--replica-port": "0",
        "--address-rate": noRate,
        "--caller-rate": noRate,
        ...flags,
      },
    });
    const running = await startControlPlane(config, { log });
    stack.defer(() => running.close());
    return new FuzzedControlPlane(folder, running, failures, stack.move());
  }

  async createOrganization(name: string): Promise<FuzzCaller> {
    const marker = `${name}-marker-${crypto.randomUUID()}`;
    const { adminApiKey } = await this.running.database.system((tx) =>
      this.running.organizations.create(tx, { name: marker }),
    );
    return { name, key: adminApiKey, marker };
  }

  async createOperator(): Promise<FuzzCaller> {
    const { apiKey } = await this.running.database.system((tx) =>
      this.running.identity.createOperator(tx, { name: "olga" }),
    );
    return { name: "operator", key: apiKey, marker: crypto.randomUUID() };
  }

  /** A client of a caller, for what a test does honestly. */
  connect(caller: Pick<FuzzCaller, "key">): ClodeiClient {
    const client = createClient({ endpoint: this.running.publicUrl, ca: this.running.caPem, apiKey: caller.key });
    this.#closing.defer(() => client.close());
    return client;
  }

  /** A client that keeps no rule. */
  attack(): RawClient {
    return this.#closing.use(new RawClient(this.running.publicUrl, { ca: this.running.caPem }));
  }

  /** The same with a node's certificate, for the node listener. */
  attackAs({ certificatePem, privateKeyPem }: NodeIdentity): RawClient {
    const tls = { ca: this.running.caPem, cert: certificatePem, key: privateKeyPem };
    return this.#closing.use(new RawClient(`https://localhost:${this.#nodePort}`, tls));
  }

  /** The same with another replica's certificate, or a node's, for the replica listener. */
  async attackReplicaListener(node?: NodeIdentity): Promise<RawClient> {
    const { caPem: ca, replicaEndpoint } = this.running;
    const source = { folder: join(this.folder, "ca"), trustDomain: "clodei.com" };
    const now = new Date();
    const other = await (await openAuthority(source, now)).issueReplicaCertificate(randomUUID(), now);
    const cert = node?.certificatePem ?? other.certificateChainPem;
    const key = node?.privateKeyPem ?? other.privateKeyPem;
    // It has no host's name.
    const tls = { ca, cert, key, checkServerIdentity: () => undefined };
    return this.#closing.use(new RawClient(`https://${replicaEndpoint}`, tls));
  }

  get #nodePort(): number {
    return Number(this.running.nodeEndpoint.split(":").at(-1));
  }

  /** Enrolls a node. */
  async enroll(operator: ClodeiClient, nodeName: string, region: string = madrid.region): Promise<NodeIdentity> {
    const { token } = await operator.nodes.createEnrollmentToken({ location: { ...madrid, region }, nodeName });
    const { request, privateKeyPem } = await createCertificateRequest();
    const transport = createGrpcTransport({ baseUrl: this.running.publicUrl, nodeOptions: { ca: this.running.caPem } });
    const enrolled = await createRpcClient(EnrollmentService, transport).enroll({
      enrollmentToken: token,
      certificateRequest: request,
      agentVersion: "0.0.0",
    });
    const certificatePem = new X509Certificate(enrolled.certificate).toString();
    return { nodeId: enrolled.nodeId as NodeIdentity["nodeId"], privateKeyPem, certificatePem };
  }

  /** Lets a node's scripted agent take what it is given, until the control plane ends. */
  async attend(identity: NodeIdentity): Promise<ScriptedAgent> {
    const { agent } = await ScriptedAgent.open(createNodeClient(this.#nodePort, identity, this.running.caPem));
    const stop = obey(agent);
    this.#closing.defer(() => {
      stop();
      agent.break();
    });
    return agent;
  }

  /** The value of a metric, of all its labels together. */
  async metric(name: string): Promise<number> {
    const text = await (await fetch(`${this.running.operationsUrl}/metrics`)).text();
    const values = text.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, "gm"));
    return values.reduce((sum, [, value]) => sum + Number(value), 0);
  }

  /** Waits until no stream is open, and no connection but so many. */
  async settled(connections: number): Promise<void> {
    await eventually(patienceMs, async () => {
      const streams = await this.metric("clodei_rpc_open_streams");
      const open = await this.metric("clodei_public_connections");
      if (streams > 0 || open > connections) throw new Error(`${streams} streams and ${open} connections are open`);
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#closing.disposeAsync();
  }
}

/** Answers every desired set as an agent does whose containers start at once, and every request for output. */
function obey(agent: ScriptedAgent): () => void {
  let sequence = 0n;
  let beat = 0n;
  const told = new Set<string>();
  const stop = new AbortController();
  const beats = setInterval(() => agent.heartbeat((beat += 1n)), 1_000);
  agent.heartbeat((beat += 1n));
  const forEach = async <T>(next: () => Promise<T>, work: (message: T) => void): Promise<void> => {
    while (!stop.signal.aborted && agent.end === undefined) await next().then(work, () => undefined);
  };
  void forEach(
    () => agent.next("desiredSet"),
    ({ instances }) => {
      const statuses = instances.flatMap(({ instanceId, attempt, state }) => {
        const key = `${instanceId} ${attempt} ${state}`;
        if (told.has(key)) return [];
        told.add(key);
        const phases = phasesOf(state);
        return phases.map((phase) => ({
          sequence: (sequence += 1n),
          instanceId,
          attempt,
          phase,
          reason: InstanceReason.UNSPECIFIED,
        }));
      });
      for (let at = 0; at < statuses.length; at += 256) {
        const part = statuses.slice(at, at + 256);
        agent.send({ case: "statusReport", value: { sequence: part.at(-1)?.sequence ?? 0n, statuses: part } });
      }
    },
  );
  void forEach(
    () => agent.next("openLogs"),
    (open) => {
      const upload = agent.upload(open);
      upload.send({
        case: "chunk",
        value: { attempt: 1, stream: LogStream.STDOUT, data: new Uint8Array(64).fill(0x61) },
      });
      upload.end(true);
    },
  );
  return () => {
    stop.abort();
    clearInterval(beats);
  };
}

function phasesOf(state: DesiredState): AttemptPhase[] {
  if (state === DesiredState.RUNNING) return [AttemptPhase.CREATING, AttemptPhase.RUNNING];
  if (state === DesiredState.STOPPED) return [AttemptPhase.ENDED];
  return [AttemptPhase.REMOVED];
}
