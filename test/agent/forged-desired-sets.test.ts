// A control plane in wrong hands: a real agent process, its mutual-TLS session and a real engine, and desired sets that
// no honest control plane would send, one for each field. Nothing of them may ever become a container.
import { after, before, describe, it } from "node:test";
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { availableParallelism, tmpdir, totalmem } from "node:os";
import { join } from "node:path";
import { create, toBinary } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import {
  AttemptPhase,
  type AttemptStatus,
  ContainerSpecSchema,
  type DesiredInstance,
  DesiredInstanceSchema,
  DesiredState,
  NodeLinkService,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceId, newId } from "@clodei/proto/ids";
import { containerName } from "@clodei/proto/node-link";
import { IdentityStore } from "../../agent/src/identity/identity-store.ts";
import { StateFolder } from "../../agent/src/identity/state-folder.ts";
import { TestAuthority } from "../../agent/src/testing/authority.ts";
import { listen, type TestListener } from "../../agent/src/testing/control-plane.ts";
import { giveIdentity, type Peer, Peers } from "../../agent/src/testing/peer.ts";
import { callEngine } from "../../tools/engine/api.ts";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { inspectContainer, listContainers } from "../harness/containers.ts";
import { engineUnavailable, startTestEngine } from "../harness/engine.ts";
import { Program } from "../harness/process.ts";
import { image, seconds, wanted, type WantedPart } from "./node.ts";

const agentProgram = new URL("../../agent/src/main.ts", import.meta.url).pathname;
const forever = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
const { RUNNING, ENDED, REMOVED } = AttemptPhase;
const { POLICY_VIOLATION, IMAGE_NOT_ALLOWED } = InstanceReason;

type SpecPart = NonNullable<WantedPart["container"]>;

/** A specification that one field makes unfit, and how the attempt must end. */
interface ForgedSpec {
  readonly field: string;
  readonly what: string;
  readonly container: (gpuUuids: readonly string[]) => SpecPart;
  readonly reason?: InstanceReason;
}

const variables = (count: number) => Object.fromEntries(Array.from({ length: count }, (_, index) => [`V${index}`, ""]));
const always = (container: SpecPart) => () => container;

const forgedSpecs: readonly ForgedSpec[] = [
  { field: "image", what: "absent", container: always({ image: "" }) },
  {
    field: "image",
    what: "outside the allowlist",
    container: always({ image: "docker.io/evil/miner:latest" }),
    reason: IMAGE_NOT_ALLOWED,
  },
  {
    field: "image",
    what: "of another registry whose name begins alike",
    container: always({ image: "docker.io.evil.example/library/busybox:latest" }),
    reason: IMAGE_NOT_ALLOWED,
  },
  { field: "image", what: "not normalized", container: always({ image: "busybox:clodei-test" }) },
  { field: "image", what: "a path", container: always({ image: "docker.io/library/../evil/miner:latest" }) },
  { field: "image", what: "an image's id", container: always({ image: `sha256:${"a".repeat(64)}` }) },
  { field: "image", what: "too long", container: always({ image: `docker.io/library/${"a".repeat(600)}:latest` }) },
  { field: "command", what: "too many", container: always({ command: Array.from({ length: 129 }, () => "a") }) },
  { field: "command", what: "too long", container: always({ command: ["a".repeat(9000)] }) },
  { field: "command", what: "with NUL", container: always({ command: ["sh\0"] }) },
  { field: "args", what: "too many", container: always({ args: Array.from({ length: 129 }, () => "a") }) },
  { field: "args", what: "too long", container: always({ args: ["a".repeat(9000)] }) },
  { field: "args", what: "with NUL", container: always({ args: ["a\0b"] }) },
  {
    field: "args",
    what: "too long in all",
    container: always({ args: Array.from({ length: 128 }, () => "€".repeat(2730)), env: { A: "a".repeat(4096) } }),
  },
  { field: "env", what: "a bad name", container: always({ env: { "A=B": "c" } }) },
  { field: "env", what: "a name with a line break", container: always({ env: { "A\nB": "c" } }) },
  { field: "env", what: "reserved", container: always({ env: { NVIDIA_VISIBLE_DEVICES: "all" } }) },
  { field: "env", what: "reserved as legacy", container: always({ env: { CUDA_VERSION: "12" } }) },
  { field: "env", what: "too long", container: always({ env: { A: "a".repeat(5000) } }) },
  { field: "env", what: "with NUL", container: always({ env: { A: "a\0b" } }) },
  { field: "env", what: "too many", container: always({ env: variables(129) }) },
  { field: "gpu_uuids", what: "of another node", container: always({ gpuUuids: ["GPU-SIM-of-another-node"] }) },
  { field: "gpu_uuids", what: "all", container: always({ gpuUuids: ["all"] }) },
  { field: "gpu_uuids", what: "an index", container: always({ gpuUuids: ["0"] }) },
  { field: "gpu_uuids", what: "twice", container: ([, free = ""]) => ({ gpuUuids: [free, free] }) },
  { field: "gpu_uuids", what: "in use by another instance", container: ([used = ""]) => ({ gpuUuids: [used] }) },
  {
    field: "gpu_uuids",
    what: "too many",
    container: ([, free = ""]) => ({ gpuUuids: Array.from({ length: 17 }, () => free) }),
  },
  { field: "cpu_millis", what: "none", container: always({ cpuMillis: 0 }) },
  { field: "cpu_millis", what: "beyond the node", container: always({ cpuMillis: availableParallelism() * 1000 + 1 }) },
  {
    field: "cpu_millis",
    what: "more than the other instances leave",
    container: always({ cpuMillis: availableParallelism() * 1000 }),
  },
  { field: "cpu_millis", what: "the greatest number", container: always({ cpuMillis: 0xffff_ffff }) },
  { field: "memory_mib", what: "none", container: always({ memoryMib: 0 }) },
  {
    field: "memory_mib",
    what: "beyond the node",
    container: always({ memoryMib: Math.floor(totalmem() / 2 ** 20) + 1 }),
  },
  {
    field: "memory_mib",
    what: "more than the other instances leave",
    container: always({ memoryMib: Math.floor(totalmem() / 2 ** 20) }),
  },
  { field: "memory_mib", what: "the greatest number", container: always({ memoryMib: 0xffff_ffff }) },
  { field: "stop_grace", what: "an hour", container: always({ stopGrace: seconds(3600) }) },
  { field: "stop_grace", what: "negative", container: always({ stopGrace: seconds(-1) }) },
  { field: "max_run_time", what: "none", container: always({ maxRunTime: seconds(0) }) },
  { field: "max_run_time", what: "ten years", container: always({ maxRunTime: seconds(315_360_000) }) },
  // The next value that the schema may get one day.
  { field: "pull_policy", what: "unknown", container: always({ pullPolicy: 99 as SpecPart["pullPolicy"] & number }) },
];

/** A set that the schema itself forbids, and that ends the session. */
interface ForgedSet {
  readonly field: string;
  readonly what: string;
  readonly instances: () => readonly DesiredInstance[];
}

const instance = (part: Partial<DesiredInstance>) => [Object.assign(wanted(newId("ins"), "true"), part)];

const forgedSets: readonly ForgedSet[] = [
  { field: "instance_id", what: "a path", instances: () => instance({ instanceId: "../../../etc" }) },
  { field: "instance_id", what: "no id", instances: () => instance({ instanceId: `ins_${"z".repeat(26)}` }) },
  { field: "attempt", what: "0", instances: () => instance({ attempt: 0 }) },
  { field: "state", what: "not given", instances: () => instance({ state: DesiredState.UNSPECIFIED }) },
  { field: "state", what: "unknown", instances: () => instance({ state: 99 as DesiredState }) },
  {
    field: "instances",
    what: "more than the contract's limit",
    instances: () =>
      Array.from({ length: 4097 }, () =>
        create(DesiredInstanceSchema, { instanceId: newId("ins"), attempt: 1, state: DesiredState.STOPPED }),
      ),
  },
];

/** Fields that other rules than the schema's judge, each with a test of its own below. */
const judgedElsewhere = ["container", "not_before_time"];

/** The forging control plane's end of the agent's session, and what the agent said in it. */
class Forger {
  readonly #peers: Peers;
  readonly #statuses: AttemptStatus[] = [];
  #peer: Peer | undefined;
  #generation = 0n;
  #acknowledged = 0n;
  gpuUuids: readonly string[] = [];
  observedGeneration = 0n;

  constructor(peers: Peers) {
    this.#peers = peers;
  }

  get generation(): bigint {
    return this.#generation;
  }

  /** Takes the agent's next session. */
  async accept(): Promise<void> {
    const peer = await this.#peers.next();
    const hello = await peer.hear("hello");
    this.gpuUuids = (hello.inventory?.gpus ?? []).map(({ uuid }) => uuid);
    this.observedGeneration = hello.observedGeneration;
    peer.welcome(this.#acknowledged);
    this.#peer = peer;
  }

  desire(...instances: readonly DesiredInstance[]): void {
    this.#generation += 1n;
    this.desireAt(this.#generation, instances);
  }

  desireAt(generation: bigint, instances: readonly DesiredInstance[]): void {
    this.#peer?.say({ case: "desiredSet", value: { generation, instances: [...instances] } });
  }

  /** Takes the last generation back: its set was refused. */
  retract(): void {
    this.#generation -= 1n;
  }

  /** Waits until the agent reported this phase. */
  async reported(instanceId: InstanceId, phase: AttemptPhase): Promise<AttemptStatus> {
    for (;;) {
      const found = this.#statuses.find((status) => status.instanceId === instanceId && status.phase === phase);
      if (found !== undefined) return found;
      assert.ok(this.#peer !== undefined);
      const report = await this.#peer.hear("statusReport");
      this.#acknowledged = report.sequence;
      this.#statuses.push(...report.statuses);
      this.#peer.say({ case: "ack", value: { sequence: report.sequence } });
    }
  }
}

describe("forged desired sets over a real session", { skip: engineUnavailable ?? false, timeout: 180_000 }, () => {
  const parts = new AsyncDisposableStack();
  const honest = newId("ins");
  const made = new Set<InstanceId>([honest]);
  let beganSeconds: number;
  let engine: PrivateEngine;
  let forger: Forger;
  let agent: Program;
  let honestlyWanted: DesiredInstance;

  before(async () => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-forged-"));
    parts.defer(() => rm(folder, { recursive: true, force: true }));
    engine = parts.use(await startTestEngine());
    await importBusybox(engine.socketPath, image);
    beganSeconds = Math.floor(Date.now() / 1000);
    const authority = await TestAuthority.create();
    const peers = new Peers();
    const listener = parts.use(await listenFor(authority, peers));
    {
      using state = await StateFolder.open(folder);
      const life = { fromMs: Date.now() - 1000, toMs: Date.now() + 3_600_000 };
      await giveIdentity(new IdentityStore(state.paths.identity), authority, listener, life);
    }
    const args = [agentProgram, "run", "--state", folder, "--docker-socket", engine.socketPath];
    args.push("--simulate-gpus", "2xH100-SXM", "--min-free-mib", "16");
    agent = parts.use(new Program({ name: "agent", args }));
    forger = new Forger(peers);
    await forger.accept();
    const [used = ""] = forger.gpuUuids;
    honestlyWanted = wanted(honest, forever, { container: { gpuUuids: [used] } });
    forger.desire(honestlyWanted);
    await forger.reported(honest, RUNNING);
  });
  after(() => parts.disposeAsync());

  it("has a forged one for every field of the contract", () => {
    const names = (fields: readonly { readonly name: string }[]) => fields.map(({ name }) => name).toSorted();
    const unique = (fields: readonly string[]) => [...new Set(fields)].toSorted();
    assert.deepEqual(unique(forgedSpecs.map(({ field }) => field)), names(ContainerSpecSchema.fields));
    assert.deepEqual(
      unique([...forgedSets.map(({ field }) => field).filter((field) => field !== "instances"), ...judgedElsewhere]),
      names(DesiredInstanceSchema.fields),
    );
  });

  for (const { field, what, container, reason = POLICY_VIOLATION } of forgedSpecs) {
    it(`${field}: ${what}`, async () => {
      const id = newId("ins");
      forger.desire(honestlyWanted, wanted(id, "true", { container: container(forger.gpuUuids) }));
      const ended = await forger.reported(id, ENDED);
      assert.equal(ended.reason, reason, ended.message);
      assert.ok(ended.message.startsWith(field) || ended.message.includes(`; ${field}`), ended.message);
      assert.equal(ended.message.includes("\n"), false, "the message is one line");
    });
  }

  it("container: absent", async () => {
    const id = newId("ins");
    forger.desire(
      honestlyWanted,
      create(DesiredInstanceSchema, { instanceId: id, attempt: 1, state: DesiredState.RUNNING }),
    );
    const ended = await forger.reported(id, ENDED);
    assert.equal(ended.reason, POLICY_VIOLATION);
    assert.match(ended.message, /^container/);
  });

  it("not_before_time: beyond every clock is waited for and starts nothing", async () => {
    const id = newId("ins");
    const late = Object.assign(wanted(id, "true"), {
      notBeforeTime: { $typeName: "google.protobuf.Timestamp" as const, seconds: 2n ** 62n, nanos: -1 },
    });
    forger.desire(honestlyWanted, late);
    forger.desire(honestlyWanted, Object.assign(wanted(id, "true"), { state: DesiredState.STOPPED }));
    assert.equal((await forger.reported(id, ENDED)).reason, InstanceReason.STOPPED_BY_REQUEST);
  });

  for (const { field, what, instances } of forgedSets) {
    it(`${field}: ${what} ends the session, and the last good set stands`, async () => {
      forger.desire(honestlyWanted, ...instances());
      await forger.accept();
      forger.retract();
      assert.equal(forger.observedGeneration, forger.generation);
    });
  }

  it("instances: one twice ends the session", async () => {
    forger.desire(honestlyWanted, honestlyWanted);
    await forger.accept();
    forger.retract();
    assert.equal(forger.observedGeneration, forger.generation);
  });

  it("generation: one that would outbid every later one ends the session, and the next set counts", async () => {
    const id = newId("ins");
    forger.desireAt(2n ** 64n - 1n, [honestlyWanted, wanted(id, "true")]);
    await forger.accept();
    assert.equal(forger.observedGeneration, forger.generation);
    forger.desire(honestlyWanted, wanted(id, "true", { container: { cpuMillis: 0 } }));
    await forger.reported(id, ENDED);
  });

  it("generation: a lower one than one of the session starts nothing", async () => {
    const [old, next] = [newId("ins"), newId("ins")];
    forger.desireAt(0n, [honestlyWanted, wanted(old, "true")]);
    forger.desire(honestlyWanted, wanted(next, "true", { container: { cpuMillis: 0 } }));
    await forger.reported(next, ENDED);
    assert.deepEqual(await listContainers(engine, old), []);
  });

  it("unknown fields that pretend to be privileges are nothing", async () => {
    const id = newId("ins");
    made.add(id);
    const forged = wanted(id, forever);
    assert.ok(forged.container !== undefined);
    forged.container.$unknown = pretended();
    forged.$unknown = pretended();
    assert.ok(toBinary(ContainerSpecSchema, forged.container).includes(0x2f), "they are on the wire");
    forger.desire(honestlyWanted, forged);
    const running = await forger.reported(id, RUNNING);
    assert.equal(running.isolation?.effectiveCapabilities, 0n);
    const [container] = await listContainers(engine, id);
    const { HostConfig: host, Mounts: mounts } = await inspectContainer(engine, container?.Id ?? "");
    assert.equal(host["Privileged"], false);
    assert.deepEqual(host["CapDrop"], ["ALL"]);
    assert.deepEqual(host["SecurityOpt"], ["no-new-privileges"]);
    assert.deepEqual(
      mounts.map(({ Destination }) => Destination),
      ["/workspace"],
    );
    forger.desire(honestlyWanted, Object.assign(wanted(id, "true"), { state: DesiredState.REMOVED }));
    await forger.reported(id, REMOVED);
  });

  it("runs an honest set afterwards, in the process that heard all of this", async () => {
    const id = newId("ins");
    made.add(id);
    forger.desire(honestlyWanted, wanted(id, forever));
    await forger.reported(id, RUNNING);
    assert.equal(agent.running, true);
    assert.equal((await listContainers(engine, honest)).length, 1);
    forger.desire();
    await forger.reported(id, REMOVED);
    await forger.reported(honest, REMOVED);
  });

  it("never made a container of any of them", async () => {
    const events = await callEngine(engine.socketPath, {
      path: "/events",
      query: {
        since: String(beganSeconds),
        until: String(Math.floor(Date.now() / 1000) + 1),
        filters: JSON.stringify({ type: ["container"], event: ["create"] }),
      },
    });
    const names = events
      .split("\n")
      .filter((line) => line.trim() !== "")
      .map((line) => (JSON.parse(line) as { Actor: { Attributes: { name: string } } }).Actor.Attributes.name);
    assert.deepEqual(names.toSorted(), [...made].map((id) => containerName(id, 1)).toSorted());
    assert.deepEqual(await listContainers(engine), []);
  });
});

/** Listens as the node listener of a control plane. */
async function listenFor(authority: TestAuthority, peers: Peers): Promise<TestListener> {
  return listen({
    issued: await authority.issueServer([{ type: "dns", value: "localhost" }]),
    clientCa: authority,
    routes: (router) =>
      router.service(NodeLinkService, { session: (requests, context) => peers.serve(requests, context) }),
  });
}

/** Fields as a schema with privileged, host_binds and cap_add might number them. */
function pretended() {
  const text = (value: string) => new BinaryWriter().string(value).finish();
  return [
    { no: 11, wireType: WireType.Varint, data: new Uint8Array([1]) },
    { no: 12, wireType: WireType.LengthDelimited, data: text("/:/host:rw") },
    { no: 13, wireType: WireType.LengthDelimited, data: text("SYS_ADMIN") },
    { no: 1000, wireType: WireType.LengthDelimited, data: text("seccomp=unconfined") },
  ];
}
