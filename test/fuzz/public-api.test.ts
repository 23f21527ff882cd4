// Every method of the public listener, fuzzed from its descriptor: over each protocol, as each kind of caller, several
// requests at a time. No request may fail inside, harm the next one, or show what belongs to somebody else.
import assert from "node:assert/strict";
import { test } from "node:test";
import { type DescField, type DescMethod } from "@bufbuild/protobuf";
import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { Health } from "@clodei/proto/gen/grpc/health/v1/health";
import { ServerReflection } from "@clodei/proto/gen/grpc/reflection/v1/reflection";
import { ServerReflection as AlphaReflection } from "@clodei/proto/gen/grpc/reflection/v1alpha/reflection";
import { newId } from "@clodei/proto/ids";
import fc from "fast-check";
import { createCertificateRequest } from "../../control-plane/src/dispatch/test-fleet.ts";
import { publicServices } from "../../control-plane/src/start.ts";
import { madrid } from "../harness/system.ts";
import { type FuzzCaller, FuzzedControlPlane } from "./fuzzed-control-plane.ts";
import { memoryComesBack, memoryInUse } from "./memory.ts";
import { fuzz, fuzzSeconds } from "./fuzzing.ts";
import { type MessageTree, toBytes, toJsonText } from "./message-tree.ts";
import { type Hints, messages } from "./messages.ts";
import { type Codec, type Protocol, protocols, type RawAnswer, type RawClient, requestOf } from "./raw-calls.ts";

/** How long to fuzz. */
const seconds = 12;
/** A stream is left after this; a unary answer that takes so long is one of a method that waits. */
const leaveStreamMs = 120;
const leaveUnaryMs = 30_000;
/** Longer URLs are refused by their length, which is not what is tested here. */
const maxGetBytes = 8_000;

const services = [...publicServices, Health, ServerReflection, AlphaReflection];
const methods: readonly DescMethod[] = services.flatMap((service) => service.methods);

type Call = {
  readonly method: DescMethod;
  readonly tree: MessageTree;
  readonly caller: string;
  readonly protocol: Protocol;
  readonly codec: Codec;
};

/** Values that exist, each in reach of every caller, whoever owns it. */
type Pools = {
  readonly instanceIds: string[];
  readonly nodeIds: string[];
  readonly enrollmentTokenIds: string[];
  readonly enrollmentTokens: string[];
  readonly positions: string[];
  readonly certificateRequest: Uint8Array;
};

const instanceIdPattern = /ins_[0-9a-hjkmnp-tv-z]{26}/g;

function hintsOf(pools: Pools): Hints {
  const from = (pool: readonly string[]): fc.Arbitrary<string> =>
    fc.nat().map((index) => pool[index % pool.length] ?? "");
  const byName: Readonly<Record<string, fc.Arbitrary<string | bigint | Uint8Array> | "never">> = {
    instance_id: from(pools.instanceIds),
    node_id: from(pools.nodeIds),
    enrollment_token_id: from(pools.enrollmentTokenIds),
    enrollment_token: from(pools.enrollmentTokens),
    page_token: fc.oneof(fc.constant(""), from(pools.positions)),
    cursor: fc.oneof(fc.constant(""), from(pools.positions)),
    idempotency_key: fc.constantFrom("", "", "a", "b", "c", "d"),
    image: fc.constantFrom("busybox", "library/busybox:latest", "evil/miner"),
    model: fc.constantFrom("H100-SXM", ""),
    gpu_model: fc.constantFrom("H100-SXM", ""),
    count: fc.bigInt(0n, 2n),
    min_memory_mib: fc.constantFrom(0n, 81_559n),
    cpu_millis: fc.bigInt(50n, 200n),
    memory_mib: fc.bigInt(16n, 64n),
    country: fc.constantFrom("ES", "FR", "US"),
    certificate_request: fc.constant(pools.certificateRequest),
    service: fc.constantFrom("", ...services.map(({ typeName }) => typeName)),
    file_containing_symbol: fc.constantFrom(...services.map(({ typeName }) => typeName)),
    // Accepting them is refused as a whole, by NOT_SUPPORTED_YET.
    disk_mib: "never",
    workspace_mib: "never",
    ports: "never",
  };
  return {
    plausible: (field: DescField) => byName[field.name],
    confusing: fc.oneof(
      from(pools.instanceIds),
      from(pools.nodeIds),
      from(pools.enrollmentTokenIds),
      from(pools.positions),
      fc.constantFrom("ins", "nod", "org", "key").map((kind) => newId(kind as "ins")),
    ),
  };
}

function describeCall({ method, tree, caller, protocol, codec }: Call): string {
  const content = toJsonText(tree);
  return `${caller} ${protocol}+${codec} ${method.parent.typeName}/${method.name} ${content.slice(0, 1_500)}`;
}

test(
  "no request of any caller to any method fails inside, leaks, or shows what is another's",
  { timeout: (fuzzSeconds(seconds) + 180) * 1_000 },
  async (t) => {
    await using controlPlane = await FuzzedControlPlane.start();
    const operator = await controlPlane.createOperator();
    const customer = await controlPlane.createOrganization("customer");
    const other = await controlPlane.createOrganization("other");
    const anonymous: FuzzCaller = { name: "anonymous", key: "", marker: crypto.randomUUID() };
    const callers = new Map([anonymous, customer, other, operator].map((caller) => [caller.name, caller]));
    const nodeMarker = `node-${crypto.randomUUID().slice(0, 8)}`;
    const owners = new Map<string, string>();
    const pools = await plant(controlPlane, { operator, customers: [customer, other], nodeMarker, owners });

    const connections = await controlPlane.metric("clodei_public_connections");
    const clients = new Map([...callers.keys()].map((name) => [name, controlPlane.attack()]));
    const counts = new Map<string, number>();
    /** Ids that a caller wrote into instances of its own, as an image's name say: each answer about those shows them. */
    const quoted = new Map([...callers.keys()].map((name) => [name, new Set<string>()]));
    const perform = async (call: Call): Promise<void> => {
      const caller = callers.get(call.caller) ?? anonymous;
      if (call.method.name === "CreateInstance") {
        for (const [id] of toJsonText(call.tree).matchAll(instanceIdPattern)) quoted.get(caller.name)?.add(id);
      }
      const { sent, answer } = await send(call, caller, clients.get(call.caller));
      const what = `${describeCall(call)} → ${answer.code} ${answer.reason ?? ""}`;
      const key = `${call.method.parent.typeName}/${call.method.name}`;
      counts.set(key, (counts.get(key) ?? 0) + 1);
      outcomes.set(answer.code, (outcomes.get(answer.code) ?? 0) + 1);
      assert.ok(
        !["internal", "unknown", "data_loss", "reset"].includes(answer.code),
        `${what}\n${answer.text.slice(0, 2_000)}`,
      );
      assert.ok(["ok", "left"].includes(answer.code) || answer.reason !== undefined, `${what} gives no reason`);
      for (const { name, marker } of callers.values()) {
        assert.ok(name === caller.name || !answer.text.includes(marker), `${what} shows what is of ${name}`);
      }
      assert.ok(caller === operator || !answer.text.includes(nodeMarker), `${what} shows the name of a node`);
      for (const [id] of answer.text.matchAll(instanceIdPattern)) {
        const owner = owners.get(id);
        assert.ok(
          owner === undefined || owner === caller.name || sent.includes(id) || quoted.get(caller.name)?.has(id),
          `${what} shows the instance ${id}`,
        );
        if (owner !== undefined || answer.code !== "ok" || call.method.name !== "CreateInstance") continue;
        owners.set(id, caller.name);
        if (pools.instanceIds.length < 500) pools.instanceIds.push(id);
      }
    };
    const outcomes = new Map<string, number>();
    const hints = hintsOf(pools);
    const calls = fc.oneof(
      ...methods.map((method) =>
        fc.record({
          method: fc.constant(method),
          tree: messages(method.input, hints),
          caller: callersOf(method),
          protocol: fc.constantFrom(...protocols),
          codec: fc.constantFrom<Codec>("proto", "json"),
        }),
      ),
    );
    let before = 0;
    await fuzz(t, {
      values: fc.array(calls, { minLength: 1, maxLength: 12 }),
      run: async (batch) => {
        await Promise.all(batch.map(perform));
      },
      describe: (batch) => batch.map(describeCall).join("\n"),
      seconds,
      warmUp: { runs: 40, warmed: () => (before = memoryInUse()) },
    });
    for (const client of clients.values()) client[Symbol.dispose]();
    t.diagnostic([...outcomes].map(([code, count]) => `${code} ${count}`).join(", "));
    assert.deepEqual(controlPlane.failures, []);
    for (const { parent, name } of methods)
      assert.ok((counts.get(`${parent.typeName}/${name}`) ?? 0) > 0, `${name} was never called`);

    await controlPlane.settled(connections);
    await memoryComesBack(before);
    await unharmed(controlPlane, customer);
  },
);

async function send(
  call: Call,
  caller: FuzzCaller,
  client: RawClient | undefined,
): Promise<{ sent: string; answer: RawAnswer }> {
  assert.ok(client !== undefined);
  const json = toJsonText(call.tree);
  const message = call.codec === "json" ? Buffer.from(json) : toBytes(call.tree);
  const isGet = call.protocol === "connect-get";
  const protocol = isGet && (message.length > maxGetBytes || !isReadOnly(call.method)) ? "connect" : call.protocol;
  const request = requestOf(call.method, { protocol, codec: call.codec }, message);
  const answer = await client.send({
    ...request,
    headers: { ...request.headers, ...(caller.key === "" ? {} : { authorization: `Bearer ${caller.key}` }) },
    leaveAfterMs: call.method.methodKind === "unary" ? leaveUnaryMs : leaveStreamMs,
  });
  return { sent: json, answer };
}

/** Mostly those whom the method admits: what is behind the refusal of the others is tested by them. */
function callersOf({ parent }: DescMethod): fc.Arbitrary<string> {
  const isFleet = parent.typeName === NodeService.typeName;
  return fc.oneof(
    { weight: isFleet ? 1 : 4, arbitrary: fc.constant("customer") },
    { weight: isFleet ? 1 : 3, arbitrary: fc.constant("other") },
    { weight: isFleet ? 6 : 1, arbitrary: fc.constant("operator") },
    { weight: 1, arbitrary: fc.constant("anonymous") },
  );
}

function isReadOnly({ methodKind, idempotency }: DescMethod): boolean {
  return methodKind === "unary" && idempotency === MethodOptions_IdempotencyLevel.NO_SIDE_EFFECTS;
}

/** Gives each organization instances that carry its marker, and the fleet a node that takes them and some to revoke. */
async function plant(
  controlPlane: FuzzedControlPlane,
  options: {
    readonly operator: FuzzCaller;
    readonly customers: readonly FuzzCaller[];
    readonly nodeMarker: string;
    readonly owners: Map<string, string>;
  },
): Promise<Pools> {
  const fleet = controlPlane.connect(options.operator);
  await controlPlane.attend(await controlPlane.enroll(fleet, options.nodeMarker));
  const pools: Pools = {
    instanceIds: [],
    nodeIds: [],
    enrollmentTokenIds: [],
    enrollmentTokens: [],
    positions: [],
    certificateRequest: (await createCertificateRequest()).request,
  };
  for (const index of [1, 2, 3]) pools.nodeIds.push((await controlPlane.enroll(fleet, `spare-${index}`)).nodeId);
  for (let index = 0; index < 3; index += 1) {
    const { token, enrollmentToken } = await fleet.nodes.createEnrollmentToken({ location: madrid, maxUses: 1_000 });
    pools.enrollmentTokens.push(token);
    pools.enrollmentTokenIds.push(enrollmentToken.id);
  }
  for (const { name, key, marker } of options.customers) {
    const client = controlPlane.connect({ key });
    for (let index = 0; index < 3; index += 1) {
      const instance = await client.instances.run({
        image: "busybox",
        args: [marker],
        env: { MARKER: marker },
        labels: { marker },
        cpuMillis: 50,
        memoryMib: 16,
      });
      pools.instanceIds.push(instance.id);
      options.owners.set(instance.id, name);
    }
    for await (const { nextPageToken } of client.instances.list({ pageSize: 1 }).pages())
      pools.positions.push(nextPageToken);
    for await (const event of client.instances.watch()) {
      if (event.type !== "bookmark") continue;
      pools.positions.push(event.cursor);
      break;
    }
  }
  for await (const { nextPageToken } of fleet.nodes.list({ pageSize: 1 }).pages()) pools.positions.push(nextPageToken);
  return pools;
}

/** An honest customer is served as before, by a node that takes work as before. */
async function unharmed(controlPlane: FuzzedControlPlane, customer: FuzzCaller): Promise<void> {
  const client = controlPlane.connect(customer);
  const instance = await client.instances.run({ image: "busybox", cpuMillis: 50, memoryMib: 16 });
  await instance.waitUntilRunning({ timeoutMs: 60_000 });
  assert.match(await instance.logs({ follow: false }).text(), /^a+$/);
}
