// An agent whose control plane is in wrong hands: sessions fuzzed from the descriptor, and bytes that are no message.
// The agent outlives all of it, and whatever container it makes of it is one that its own policy allows.
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { createValidator } from "@bufbuild/protovalidate";
import { create, type DescField, type DescMessage, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromMs } from "@bufbuild/protobuf/wkt";
import {
  ContainerSpecSchema,
  DesiredInstanceSchema,
  DesiredSetSchema,
  DesiredState,
  SessionResponseSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { newId, type NodeId } from "@clodei/proto/ids";
import { containerLabels } from "@clodei/proto/node-link";
import fc from "fast-check";
import { pino } from "pino";
import { ContainerEngine } from "../../agent/src/containers/engine.ts";
import type { Identity } from "../../agent/src/identity/identity-store.ts";
import { IdentityStore } from "../../agent/src/identity/identity-store.ts";
import { StateFolder } from "../../agent/src/identity/state-folder.ts";
import { simulateGpus } from "../../agent/src/inventory/gpu.ts";
import { readHost } from "../../agent/src/inventory/host.ts";
import { Inventory } from "../../agent/src/inventory/inventory.ts";
import { Journal } from "../../agent/src/journal/journal.ts";
import { connectLink } from "../../agent/src/link/connection.ts";
import { Session, type SessionOptions } from "../../agent/src/link/session.ts";
import { LogStore } from "../../agent/src/logs/log-store.ts";
import { TestAuthority } from "../../agent/src/testing/authority.ts";
import { giveIdentity } from "../../agent/src/testing/peer.ts";
import { readBootClock } from "../../agent/src/worker/boot-clock.ts";
import { Judge } from "../../agent/src/worker/judge.ts";
import { Worker } from "../../agent/src/worker/worker.ts";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { inspectContainer, listContainers } from "../harness/containers.ts";
import { engineUnavailable, startTestEngine } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { memoryComesBack, memoryInUse } from "./memory.ts";
import { fuzz, fuzzSeconds } from "./fuzzing.ts";
import { HostileControlPlane } from "./hostile-control-plane.ts";
import { type MessageTree, toBytes, toJsonText, type Value } from "./message-tree.ts";
import { type Hints, messages } from "./messages.ts";
import { framed } from "./raw-calls.ts";

const seconds = 8;
const image = "docker.io/library/busybox:clodei-test";
const patienceMs = 90_000;

/** A frame of a session: a message, or bytes. */
type Said = { readonly tree: MessageTree } | { readonly bytes: Uint8Array };

describe(
  "an agent in the hands of a hostile control plane",
  { skip: engineUnavailable ?? false, timeout: (fuzzSeconds(seconds) + 240) * 1_000 },
  () => {
    it("outlives what it hears, and runs no container that its policy does not allow", async (t) => {
      await using engine = await startTestEngine();
      await importBusybox(engine.socketPath, image);
      const authority = await TestAuthority.create();
      await using controlPlane = await HostileControlPlane.start(authority);
      await using agent = await startAgent(engine, authority, controlPlane.port);
      let generation = 0n;
      const welcome = framed(
        toBinary(
          SessionResponseSchema,
          create(SessionResponseSchema, {
            message: {
              case: "welcome",
              value: {
                sessionId: "s",
                sessionSecret: new Uint8Array(32),
                heartbeatInterval: durationFromMs(60_000),
                lease: durationFromMs(30_000),
                serverTime: timestampFromMs(Date.now()),
              },
            },
          }),
        ),
      );
      const hints = hintsOf(agent.gpuUuids, () => (generation += 1n));
      const sets = desiredSets(hints, () => (generation += 1n));
      const frames = fc.oneof(
        { weight: 4, arbitrary: sets.map((tree): Said => ({ tree })) },
        { weight: 5, arbitrary: messages(SessionResponseSchema, hints).map((tree): Said => ({ tree })) },
        { weight: 1, arbitrary: junk.map((bytes): Said => ({ bytes })) },
      );
      const sessions = fc.record({
        isWelcomed: fc.oneof({ weight: 9, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.constant(false) }),
        said: fc.array(frames, { maxLength: 6 }),
        // Long enough for a container, now and then.
        lingerMs: fc.constantFrom(30, 100, 1_500),
      });
      const seen = new Set<string>();
      const watching = new AbortController();
      const watched = watchPolicy(engine, agent.nodeId, seen, watching.signal);
      let memory = 0;
      await fuzz(t, {
        values: sessions,
        run: async ({ isWelcomed, said, lingerMs }) => {
          controlPlane.lingerMs = lingerMs;
          const bytes = said.map((frame) => ("tree" in frame ? framed(toBytes(frame.tree)) : frame.bytes));
          controlPlane.script = isWelcomed ? [welcome, ...bytes] : bytes;
          // Its end says why, and is never an exception.
          await agent.session();
          agent.assertAlive();
        },
        describe: ({ isWelcomed, said }) =>
          `${isWelcomed ? "after" : "without"} a welcome\n${said.map((frame) => ("tree" in frame ? toJsonText(frame.tree).slice(0, 2_000) : Buffer.from(frame.bytes).toString("hex"))).join("\n")}`,
        seconds,
        warmUp: { runs: 5, warmed: () => (memory = memoryInUse()) },
      });

      const desire = async (instances: MessageInitShape<typeof DesiredInstanceSchema>[]): Promise<void> => {
        generation += 1n;
        const message = { case: "desiredSet" as const, value: { generation, instances } };
        controlPlane.script = [
          welcome,
          framed(toBinary(SessionResponseSchema, create(SessionResponseSchema, { message }))),
        ];
        await agent.session();
      };
      const container = { image, args: ["sleep", "60"], cpuMillis: 50, memoryMib: 16 };
      const good = { instanceId: newId("ins"), attempt: 1, state: DesiredState.RUNNING, container };
      await desire([good]);
      await eventually(patienceMs, async () => assert.equal((await listContainers(engine, good.instanceId)).length, 1));
      await eventually(patienceMs, () => assert.ok(seen.size > 0));
      await desire([]);
      await eventually(patienceMs, async () => assert.deepEqual(await listContainers(engine), []));
      watching.abort();
      await watched;
      t.diagnostic(`${seen.size} containers were made`);
      await memoryComesBack(memory);
    });
  },
);

/** Sets that only their specifications make unfit, or nothing: a random set seldom gets so far as to be judged. */
function desiredSets(hints: Hints, nextGeneration: () => bigint): fc.Arbitrary<MessageTree> {
  const field = DesiredSetSchema.field;
  const instance = DesiredInstanceSchema.field;
  const instances = fc.array(messages(ContainerSpecSchema, hints), { minLength: 1, maxLength: 4 }).map((containers) =>
    containers.map((container): MessageTree =>
      treeOf(DesiredInstanceSchema, [
        [instance.instanceId, newId("ins")],
        [instance.attempt, 1n],
        [instance.state, BigInt(DesiredState.RUNNING)],
        [instance.container, container],
      ]),
    ),
  );
  return instances.map((found) => {
    const parts: [DescField, Value][] = found.map((tree) => [field.instances, tree]);
    const set = treeOf(DesiredSetSchema, [[field.generation, nextGeneration()], ...parts]);
    return treeOf(SessionResponseSchema, [[SessionResponseSchema.field.desiredSet, set]]);
  });
}

function treeOf(schema: DescMessage, parts: readonly (readonly [DescField, Value])[]): MessageTree {
  return { schema, parts: parts.map(([field, value]) => ({ kind: "values", field, values: [value] })) };
}

/** Frames that hold no message, or are none. */
const junk = fc
  .tuple(
    fc.constantFrom(0, 1, 2, 0x80, 0xff),
    fc.uint8Array({ maxLength: 40 }),
    fc.constantFrom(0, 0, 1, 2 ** 26, 2 ** 31),
  )
  .map(([flags, payload, more]) => framed(payload, flags, payload.length + more));

function hintsOf(gpuUuids: readonly string[], nextGeneration: () => bigint): Hints {
  const ids = Array.from({ length: 12 }, () => newId("ins"));
  const byName: Readonly<Record<string, fc.Arbitrary<string | bigint> | "never">> = {
    instance_id: fc.constantFrom(...ids),
    attempt: fc.bigInt(1n, 3n),
    state: fc.constantFrom(1n, 1n, 1n, 2n, 3n),
    generation: fc.nat().map(nextGeneration),
    image: fc.constantFrom(image, image, image, image, image, image, "docker.io/evil/miner:latest", "busybox"),
    command: fc.constantFrom("true", "sleep"),
    args: fc.constantFrom("1", "60"),
    gpu_uuids: fc.constantFrom(...gpuUuids),
    // Of its names the policy says more than the schema.
    env: "never",
    cpu_millis: fc.bigInt(50n, 100n),
    memory_mib: fc.bigInt(16n, 32n),
    pull_policy: fc.constantFrom(1n, 3n),
    not_before_time: "never",
    max_run_time: "never",
    stop_grace: "never",
    // Those that end the agent for good are no fault of it.
    reason: fc.constantFrom(BigInt(ErrorReason.UNAVAILABLE), BigInt(ErrorReason.PROTOCOL_VIOLATION), 99n),
  };
  return {
    plausible: (field: DescField) => byName[field.name],
    confusing: fc.oneof(fc.constantFrom(...ids), fc.constant(newId("nod"))),
  };
}

type FuzzedAgent = AsyncDisposable & {
  readonly nodeId: NodeId;
  readonly gpuUuids: readonly string[];
  /** One session, to its end. */
  session(): Promise<void>;
  assertAlive(): void;
};

/** The agent's parts in this process, so that what they throw is seen, with sessions that follow each other at once. */
async function startAgent(engine: PrivateEngine, authority: TestAuthority, port: number): Promise<FuzzedAgent> {
  await using stack = new AsyncDisposableStack();
  const folder = await mkdtemp(join(tmpdir(), "clodei-fuzz-agent-"));
  stack.defer(() => rm(folder, { recursive: true, force: true }));
  const state = stack.use(await StateFolder.open(folder));
  const identity: Identity = await giveIdentity(
    new IdentityStore(state.paths.identity),
    authority,
    { port, url: `https://localhost:${port}` },
    {
      fromMs: Date.now() - 1_000,
      toMs: Date.now() + 24 * 3_600_000,
    },
  );
  const nodeId = identity.nodeId;
  const journal = stack.use(Journal.open(state.paths.journal));
  const model = { model: "H100-SXM", productName: "NVIDIA H100 80GB HBM3", memoryMib: 81_559 };
  const readings = simulateGpus([model, model], nodeId);
  const gpuUuids = readings.gpus.map(({ uuid }) => uuid);
  const containers = new ContainerEngine({
    socketPath: engine.socketPath,
    nodeId,
    workspaceFolder: state.paths.workspaces,
    simulatedGpus: new Set(gpuUuids),
  });
  const inventory = await Inventory.open({
    readGpus: () => Promise.resolve([readings]),
    host: await readHost(),
    workspaceFolder: folder,
    dockerVersion: () => "",
  });
  const log = pino({ level: "silent" });
  const logs = new LogStore({ folder: state.paths.logs, engine: containers });
  const clock = readBootClock();
  const validator = createValidator();
  const worker = new Worker({
    engine: containers,
    logs,
    journal,
    judge: new Judge({ validator, imageAllowlist: ["docker.io/library/"], inventory: () => inventory.current() }),
    clock,
    paths: state.paths,
    minFreeMib: 1,
    usageIntervalMs: 1_000,
    log,
  });
  const stop = new AbortController();
  let ended: unknown;
  const running = worker.run(stop.signal).then(
    () => (ended = "the worker ended"),
    (error: unknown) => (ended = error),
  );
  stack.defer(async () => {
    stop.abort();
    await running;
  });
  const options: Omit<SessionOptions, "client"> = {
    validator,
    worker,
    journal,
    inventory,
    logs,
    agentVersion: "1",
    bootId: clock.bootId,
    onWelcome: () => undefined,
    log,
  };
  const resources = stack.move();
  return {
    nodeId,
    gpuUuids,
    async session() {
      using connection = connectLink(identity);
      await new Session({ ...options, client: connection.client }).run(stop.signal);
    },
    assertAlive: () => assert.equal(ended, undefined),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  };
}

/** Looks at every container that there is, again and again. */
async function watchPolicy(
  engine: PrivateEngine,
  nodeId: NodeId,
  seen: Set<string>,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    for (const { Id: id, Labels: labels } of await listContainers(engine)) {
      assert.equal(labels[containerLabels.nodeId], nodeId);
      // It may have gone meanwhile.
      const found = await inspectContainer(engine, id).catch(() => undefined);
      if (found === undefined) continue;
      seen.add(id);
      const host = found.HostConfig;
      assert.equal(host["Privileged"], false);
      assert.deepEqual(host["CapDrop"], ["ALL"]);
      assert.deepEqual(host["CapAdd"] ?? [], []);
      assert.deepEqual(host["SecurityOpt"], ["no-new-privileges"]);
      assert.deepEqual(
        [host["PidMode"], host["UTSMode"], host["IpcMode"], host["CgroupnsMode"]],
        ["", "", "private", "private"],
      );
      assert.deepEqual([host["Binds"] ?? [], host["Devices"] ?? [], host["DeviceRequests"] ?? []], [[], [], []]);
      assert.deepEqual(
        found.Mounts.map(({ Destination }) => Destination),
        ["/workspace"],
      );
      assert.doesNotMatch(String(host["NetworkMode"]), /^(host|none|bridge|default|container:)/);
      assert.equal(host["PublishAllPorts"], false);
      const memory = Number(host["Memory"]) / 2 ** 20;
      assert.ok(memory >= 16, `${memory} MiB`);
    }
    await sleep(50, undefined, { signal }).catch(() => undefined);
  }
}
