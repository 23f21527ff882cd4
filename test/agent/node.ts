// The agent's worker on a real engine, without a link: a test gives the desired sets and reads the journal.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { type Duration, DurationSchema } from "@bufbuild/protobuf/wkt";
import {
  type AttemptPhase,
  type AttemptStatus,
  type ContainerSpec,
  type DesiredInstance,
  DesiredInstanceSchema,
  DesiredSetSchema,
  DesiredState,
  type UsageInterval,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { createValidator } from "@bufbuild/protovalidate";
import { HostSchema, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import { type InstanceId, newId, type NodeId } from "@clodei/proto/ids";
import { pino } from "pino";
import { ContainerEngine } from "../../agent/src/containers/engine.ts";
import { StateFolder, statePaths } from "../../agent/src/identity/state-folder.ts";
import { simulateGpus } from "../../agent/src/inventory/gpu.ts";
import type { AttemptRecord } from "../../agent/src/journal/attempt-table.ts";
import { Journal } from "../../agent/src/journal/journal.ts";
import { LogStore } from "../../agent/src/logs/log-store.ts";
import { readBootClock } from "../../agent/src/worker/boot-clock.ts";
import { Judge } from "../../agent/src/worker/judge.ts";
import { type AttemptKey, keyText } from "../../agent/src/worker/model.ts";
import { Worker } from "../../agent/src/worker/worker.ts";
import { eventually } from "../harness/eventually.ts";

export const image = "docker.io/library/busybox:clodei-test";
const model = { model: "H100-SXM", productName: "NVIDIA H100 80GB HBM3", memoryMib: 81559 };

/** A node whose worker can be ended and begun again over the same state. */
export class TestNode implements AsyncDisposable {
  readonly nodeId: NodeId = newId("nod");
  readonly gpuUuids: readonly string[];
  readonly #folder: string;
  readonly #socketPath: string;
  #generation = 0n;
  #running:
    | { worker: Worker; journal: Journal; state: StateFolder; controller: AbortController; done: Promise<void> }
    | undefined;

  private constructor(folder: string, socketPath: string) {
    this.#folder = folder;
    this.#socketPath = socketPath;
    this.gpuUuids = simulateGpus([model, model], this.nodeId).gpus.map(({ uuid }) => uuid);
  }

  static async start(socketPath: string): Promise<TestNode> {
    const node = new TestNode(await mkdtemp(join(tmpdir(), "clodei-node-")), socketPath);
    await node.begin();
    return node;
  }

  get worker(): Worker {
    return this.#now.worker;
  }

  get journal(): Journal {
    return this.#now.journal;
  }

  /** Where the instance's workspace is on this machine. */
  workspaceOf(instanceId: InstanceId): string {
    return join(this.#now.state.paths.workspaces, instanceId);
  }

  get #now() {
    if (this.#running === undefined) throw new Error("the node's worker does not run");
    return this.#running;
  }

  /** Begins the worker, as a new process would. */
  async begin(options: { readonly minFreeMib?: number } = {}): Promise<void> {
    const state = await StateFolder.open(this.#folder);
    const journal = Journal.open(state.paths.journal);
    const engine = new ContainerEngine({
      socketPath: this.#socketPath,
      nodeId: this.nodeId,
      workspaceFolder: state.paths.workspaces,
      simulatedGpus: new Set(this.gpuUuids),
    });
    const inventory = create(NodeInventorySchema, {
      gpus: [...simulateGpus([model, model], this.nodeId).gpus],
      host: create(HostSchema, { cpuCount: 2, memoryMib: 4096 }),
    });
    const worker = new Worker({
      engine,
      logs: new LogStore({ folder: state.paths.logs, engine }),
      journal,
      judge: new Judge({
        validator: createValidator(),
        imageAllowlist: ["docker.io/library/"],
        inventory: () => inventory,
      }),
      clock: readBootClock(),
      paths: state.paths,
      minFreeMib: options.minFreeMib ?? 1,
      usageIntervalMs: 200,
      log: pino({ level: process.env["CLODEI_TEST_LOG"] ?? "silent" }),
    });
    const controller = new AbortController();
    this.#running = { worker, journal, state, controller, done: worker.run(controller.signal) };
  }

  /** Ends the worker as SIGTERM does: containers go on. */
  async end(): Promise<void> {
    const running = this.#running;
    if (running === undefined) return;
    this.#running = undefined;
    running.controller.abort();
    await running.done;
    running.journal[Symbol.dispose]();
    running.state[Symbol.dispose]();
  }

  /** Changes what the journal remembers of an attempt, while no worker runs: as a crash at another moment leaves it. */
  remember(key: AttemptKey, part: (record: AttemptRecord) => Partial<AttemptRecord>): void {
    using journal = Journal.open(statePaths(this.#folder).journal);
    const record = journal.attempts().find((other) => keyText(other) === keyText(key));
    if (record === undefined) throw new Error("the journal does not know that attempt");
    journal.write({ attempts: [{ ...record, ...part(record) }] });
  }

  /** Gives a desired set with the next generation. */
  desire(...instances: readonly DesiredInstance[]): void {
    this.#generation += 1n;
    this.desireAt(this.#generation, ...instances);
  }

  desireAt(generation: bigint, ...instances: readonly DesiredInstance[]): boolean {
    return this.worker.applyDesiredSet(create(DesiredSetSchema, { generation, instances: [...instances] }));
  }

  statuses(instanceId: InstanceId, attempt = 1): AttemptStatus[] {
    const all = this.journal
      .pendingAfter(0n, 100_000)
      .flatMap((entry) => (entry.kind === "status" ? [entry.status] : []));
    return all.filter((status) => status.instanceId === instanceId && status.attempt === attempt);
  }

  usage(instanceId: InstanceId): UsageInterval[] {
    const all = this.journal
      .pendingAfter(0n, 100_000)
      .flatMap((entry) => (entry.kind === "usage" ? [entry.interval] : []));
    return all.filter((interval) => interval.instanceId === instanceId);
  }

  /** Waits until an attempt's phase was reported. */
  async reported(instanceId: InstanceId, phase: AttemptPhase, attempt = 1): Promise<AttemptStatus> {
    return await eventually(20_000, () => {
      const found = this.statuses(instanceId, attempt).find((status) => status.phase === phase);
      if (found === undefined) throw new Error(`phase ${phase} was not reported`);
      return found;
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end();
    await rm(this.#folder, { recursive: true, force: true });
  }
}

/** What differs from the usual. */
export interface WantedPart {
  readonly attempt?: number;
  readonly state?: DesiredState;
  readonly container?: Partial<Omit<ContainerSpec, "$typeName" | "$unknown">>;
}

/** An instance that shall run `script`. */
export function wanted(instanceId: InstanceId, script: string, part: WantedPart = {}): DesiredInstance {
  const container = {
    image,
    command: ["sh", "-c", script],
    cpuMillis: 500,
    memoryMib: 64,
    stopGrace: seconds(1),
    ...part.container,
  };
  return create(DesiredInstanceSchema, {
    instanceId,
    attempt: part.attempt ?? 1,
    state: part.state ?? DesiredState.RUNNING,
    container,
  });
}

export function seconds(count: number): Duration {
  return create(DurationSchema, { seconds: BigInt(count) });
}
