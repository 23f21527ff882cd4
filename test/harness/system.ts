// A whole Clodei for a test: a Docker engine of its own, one control plane with its embedded database or several on one
// of the test's, enrolled agents, all as real processes with all data in one temporary folder, and the clients of a customer and an operator.
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { type ClientOptions, type ClodeiClient, createClient, type EnrollmentTokenSpec } from "@clodei/sdk";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine, PrivateEngineOptions } from "../../tools/engine/private-engine.ts";
import { TestDatabaseServer } from "./database.ts";
import { startTestEngine } from "./engine.ts";
import { Program, runProgram } from "./process.ts";

/** What Node is given to run our programs: as they stand, where a bench does not hand in built ones. */
export interface Programs {
  readonly controlPlane: readonly string[];
  readonly agent: readonly string[];
}

/** The control plane's command. */
export const controlPlaneProgram = new URL("../../control-plane/src/main.ts", import.meta.url).pathname;

const sources: Programs = {
  controlPlane: [controlPlaneProgram],
  agent: [new URL("../../agent/src/main.ts", import.meta.url).pathname],
};

/** The image of the tests: every engine of a system has it. */
export const testImage = "docker.io/library/busybox:clodei-test";

/** Madrid, as most tests have it. */
export const madrid = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 } as const;

/** A second or two is usual; a machine that does much else takes many times as long. */
const startTimeoutMs = 120_000;

/** How a client asks again that shall outlast a control plane's absence. */
export const patience = { maxAttempts: 100, maxDelayMs: 1000 };

/** Leases in tests are short, so that a test of an absence takes seconds. */
const testTimes = { CLODEI_HEARTBEAT_INTERVAL_MS: "500", CLODEI_LEASE_MS: "3000" };

export interface AgentOptions {
  /** The node's name. */
  readonly name: string;
  readonly location?: EnrollmentTokenSpec["location"];
  /** "8xH100-SXM"; a node without GPUs where absent. */
  readonly simulateGpus?: string;
  /** Which control plane it enrolls at and connects to, of several. Default: the first. */
  readonly replica?: number;
  /** Where it finds the node listener, if not where its enrollment says: a proxy of the test. */
  readonly nodeEndpoint?: string;
  readonly env?: Readonly<Record<string, string>>;
}

export interface SystemOptions {
  readonly engine?: Pick<PrivateEngineOptions, "daemonArguments" | "prelude">;
  readonly agents?: readonly AgentOptions[];
  readonly controlPlaneEnv?: Readonly<Record<string, string>>;
  /** How many control planes serve one database of the test's. Default: one, with its embedded database. */
  readonly replicas?: number;
  readonly programs?: Programs;
}

/** Where a control plane listens. */
interface Listening {
  readonly publicUrl: string;
  readonly nodeEndpoint: string;
  readonly operationsUrl: string;
  readonly caPem: string;
}

/** The control plane's process. Started again after a kill, it listens where it did before. */
export class TestControlPlane implements AsyncDisposable {
  readonly folder: string;
  readonly #env: Readonly<Record<string, string>>;
  readonly #programArgs: readonly string[];
  #program: Program | undefined;
  #listening: Listening | undefined;

  constructor(folder: string, env: Readonly<Record<string, string>>, programs = sources) {
    this.folder = folder;
    this.#env = env;
    this.#programArgs = programs.controlPlane;
  }

  async start(): Promise<void> {
    const port = (url: string | undefined): string => url?.match(/:(\d+)$/)?.[1] ?? "0";
    const args = [
      ...this.#programArgs,
      "serve",
      ...["--data", this.folder],
      ...["--public-port", port(this.#listening?.publicUrl)],
      ...["--node-port", port(this.#listening?.nodeEndpoint)],
      ...["--operations-port", port(this.#listening?.operationsUrl)],
    ];
    const program = new Program({ name: "control plane", args, env: { ...testTimes, ...this.#env } });
    this.#program = program;
    const listening = (): Listening | undefined => {
      const line = program.stdout.split("\n").find((text) => text.startsWith('{"listening"'));
      return line === undefined ? undefined : (JSON.parse(line) as { listening: Listening }).listening;
    };
    this.#listening = await program.until("its addresses", listening, startTimeoutMs);
  }

  get listening(): Listening {
    if (this.#listening === undefined) throw new Error("the control plane was never started");
    return this.#listening;
  }

  get program(): Program {
    if (this.#program === undefined) throw new Error("the control plane was never started");
    return this.#program;
  }

  /** Runs one of its commands, such as create-operator, and returns what that printed. */
  command(...args: readonly string[]): Promise<string> {
    const [name = ""] = args;
    return runProgram({ name, args: [...this.#programArgs, ...args, "--data", this.folder], env: this.#env });
  }

  async kill(): Promise<void> {
    await this.program.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program?.stop();
  }
}

/** An agent's process, with its state in a folder of its own. */
export class TestAgent implements AsyncDisposable {
  readonly name: string;
  readonly folder: string;
  readonly #options: AgentOptions;
  readonly #socketPath: string;
  readonly #programArgs: readonly string[];
  #program: Program | undefined;
  #nodeId: string | undefined;

  constructor(folder: string, options: AgentOptions, socketPath: string, programs = sources) {
    this.name = options.name;
    this.folder = folder;
    this.#options = options;
    this.#socketPath = socketPath;
    this.#programArgs = programs.agent;
  }

  /** Gives it an identity. The token goes in by standard input, as an operator would do it. */
  async enroll(publicUrl: string, token: string): Promise<void> {
    const args = [
      ...this.#programArgs,
      "enroll",
      "--state",
      this.folder,
      "--control-plane",
      publicUrl,
      "--token-file",
      "-",
    ];
    await runProgram({ name: `enroll ${this.name}`, args, input: token });
    const path = join(this.folder, "identity", "node.json");
    const node = JSON.parse(await readFile(path, "utf8")) as { nodeId: string };
    this.#nodeId = node.nodeId;
    const { nodeEndpoint } = this.#options;
    if (nodeEndpoint !== undefined) await writeFile(path, JSON.stringify({ ...node, nodeEndpoint }));
  }

  /** Where an instance's workspace is on this machine. */
  workspaceOf({ id }: { readonly id: string }): string {
    return join(this.folder, "workspaces", id);
  }

  get nodeId(): string {
    if (this.#nodeId === undefined) throw new Error(`${this.name} is not enrolled`);
    return this.#nodeId;
  }

  /** Starts it and waits until the control plane has welcomed it. */
  async start(): Promise<void> {
    const program = this.launch();
    const ready = join(this.folder, "run", "ready.json");
    await program.until("its welcome", async () => {
      const text = await readFile(ready, "utf8").catch(() => "{}");
      return (JSON.parse(text) as { pid?: number }).pid === program.pid ? true : undefined;
    });
  }

  /** Starts it and does not wait. */
  launch(): Program {
    const { simulateGpus, env } = this.#options;
    const args = [...this.#programArgs, "run", "--state", this.folder, "--docker-socket", this.#socketPath];
    if (simulateGpus !== undefined) args.push("--simulate-gpus", simulateGpus);
    this.#program = new Program({ name: this.name, args, env: { CLODEI_MIN_FREE_MIB: "16", ...env } });
    return this.#program;
  }

  get program(): Program {
    if (this.#program === undefined) throw new Error(`${this.name} was never started`);
    return this.#program;
  }

  async kill(): Promise<void> {
    await this.program.kill();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program?.stop();
  }
}

/** Everything together. */
export class TestSystem implements AsyncDisposable {
  readonly folder: string;
  readonly engine: PrivateEngine;
  /** One, or the replicas. */
  readonly controlPlanes: readonly TestControlPlane[];
  readonly #database: TestDatabaseServer | undefined;
  readonly agents = new Map<string, TestAgent>();
  readonly #programs: Programs;
  readonly #closing = new AsyncDisposableStack();
  #ca = "";
  #client: ClodeiClient | undefined;
  #operator: ClodeiClient | undefined;

  private constructor(parts: {
    readonly folder: string;
    readonly engine: PrivateEngine;
    readonly controlPlanes: readonly TestControlPlane[];
    readonly database: TestDatabaseServer | undefined;
    readonly programs: Programs;
  }) {
    this.folder = parts.folder;
    this.engine = parts.engine;
    this.controlPlanes = parts.controlPlanes;
    this.#database = parts.database;
    this.#programs = parts.programs;
  }

  /** Starts an engine with the test image, a control plane, and agents that are connected. */
  static async start(options: SystemOptions = {}): Promise<TestSystem> {
    const { programs = sources } = options;
    const closing = new AsyncDisposableStack();
    try {
      const engine = closing.use(await startTestEngine(options.engine));
      // In the engine's folder, which goes with it, also when this process is killed.
      const folder = join(engine.folder, "system");
      await mkdir(folder, { mode: 0o755 });
      await importBusybox(engine.socketPath, testImage);
      const { replicas, controlPlaneEnv = {} } = options;
      const database = replicas === undefined ? undefined : closing.use(await TestDatabaseServer.start(folder));
      const linkEnv = replicas === undefined ? {} : { CLODEI_REPLICA_HOST: "127.0.0.1", CLODEI_REPLICA_PORT: "0" };
      const controlPlanes: TestControlPlane[] = [];
      const ca = join(folder, "control-plane-1", "ca");
      for (let number = 1; number <= (replicas ?? 1); number++) {
        const env = { ...linkEnv, ...controlPlaneEnv, ...database?.env, ...(number === 1 ? {} : authorityEnv(ca)) };
        const data = join(folder, `control-plane-${number}`);
        const controlPlane = closing.use(new TestControlPlane(data, env, programs));
        controlPlanes.push(controlPlane);
        await controlPlane.start();
      }
      const system = new TestSystem({ folder, engine, controlPlanes, database, programs });
      system.#ca = system.controlPlane.listening.caPem;
      system.#client = system.connect(await system.createOrganization("acme"));
      system.#operator = system.connect(await system.createOperator("olga"));
      system.#closing.use(closing.move());
      for (const agent of options.agents ?? []) await system.addAgent(agent);
      return system;
    } catch (error) {
      await closing.disposeAsync();
      throw error;
    }
  }

  /** The control plane, or the first of several. */
  get controlPlane(): TestControlPlane {
    return this.replica(0);
  }

  replica(index: number): TestControlPlane {
    const controlPlane = this.controlPlanes[index];
    if (controlPlane === undefined) throw new Error(`there is no replica ${index}`);
    return controlPlane;
  }

  /** The database that the replicas share. */
  get database(): TestDatabaseServer {
    if (this.#database === undefined) throw new Error("the control plane has a database of its own");
    return this.#database;
  }

  /** The client of the first organization. */
  get client(): ClodeiClient {
    if (this.#client === undefined) throw new Error("the system is not started");
    return this.#client;
  }

  /** The client of a platform operator. */
  get operator(): ClodeiClient {
    if (this.#operator === undefined) throw new Error("the system is not started");
    return this.#operator;
  }

  /** The certificate authority that the public listener's certificate comes from, as PEM. */
  get ca(): string {
    return this.#ca;
  }

  /** The same as a file. */
  get caFile(): string {
    return join(this.controlPlane.folder, "ca", "certificate.pem");
  }

  /**
   * Makes an organization and returns an API key of its administrator.
   * @param member Who is its administrator, too, as the claims of their tokens say it.
   */
  async createOrganization(
    name: string,
    member?: { readonly issuer: string; readonly subject: string },
  ): Promise<string> {
    const flags = member === undefined ? [] : ["--member-issuer", member.issuer, "--member-subject", member.subject];
    return keyIn(await this.controlPlane.command("create-organization", "--name", name, ...flags));
  }

  /** Makes a platform operator and returns an API key of theirs. */
  async createOperator(name: string): Promise<string> {
    return keyIn(await this.controlPlane.command("create-operator", "--name", name));
  }

  /** A client with a key of the caller's choice, of the first control plane where no other is named. */
  connect(
    apiKey: string,
    options: Partial<Pick<ClientOptions, "retry" | "endpoint" | "timeoutMs">> = {},
  ): ClodeiClient {
    return createClient({ endpoint: this.controlPlane.listening.publicUrl, apiKey, ca: this.#ca, ...options });
  }

  /** A client of an organization of its own that goes on asking while the control plane is away for long. */
  async patientClient(): Promise<ClodeiClient> {
    const client = this.connect(await this.createOrganization("patient"), { retry: patience });
    this.#closing.defer(() => client.close());
    return client;
  }

  /** Enrolls and starts one more agent. */
  async addAgent(options: AgentOptions): Promise<TestAgent> {
    const agent = new TestAgent(join(this.folder, options.name), options, this.engine.socketPath, this.#programs);
    const spec = { location: options.location ?? madrid, nodeName: options.name };
    const { token } = await this.operator.nodes.createEnrollmentToken(spec);
    await agent.enroll(this.replica(options.replica ?? 0).listening.publicUrl, token);
    this.#closing.use(agent);
    this.agents.set(options.name, agent);
    await agent.start();
    return agent;
  }

  agent(name: string): TestAgent {
    const agent = this.agents.get(name);
    if (agent === undefined) throw new Error(`no agent ${name}`);
    return agent;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#client?.close();
    this.#operator?.close();
    await this.#closing.disposeAsync();
  }
}

/** Replicas of one database speak for one certificate authority; its file holds certificate and key. */
function authorityEnv(folder: string): Record<string, string> {
  const file = join(folder, "authority.pem");
  return { CLODEI_CA_CERTIFICATE_FILE: file, CLODEI_CA_KEY_FILE: file };
}

/** The API key in what a command printed. */
export function keyIn(output: string): string {
  const key = output.match(/clodei_sk_\S+?(?=["\s]|$)/)?.[0];
  if (key === undefined) throw new Error(`no API key in:\n${output}`);
  return key;
}
