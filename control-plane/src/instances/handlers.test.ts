import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { Code, ConnectError } from "@connectrpc/connect";
import { AttemptPhase, DesiredState } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import {
  InstanceReason,
  InstanceState,
  PortProtocol,
  PullPolicy,
  RestartPolicy,
} from "@clodei/proto/gen/clodei/v1/instance";
import { BadRequestSchema, ErrorInfoSchema, QuotaFailureSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { newId } from "@clodei/proto/ids";
import pg from "pg";
import { addNode, createCustomer, type Fixture, readDesiredSet, reportPhase, startFixture } from "./test-fixture.ts";

let fixture: Fixture;
before(async () => {
  fixture = await startFixture();
});
after(() => fixture[Symbol.asyncDispose]());

const signal = new AbortController().signal;
const image = "library/busybox";

async function failureOf(
  call: Promise<unknown>,
): Promise<{ code: Code; reason: string; text: string; fields: string[] }> {
  const error = await call.then(
    () => assert.fail("the call succeeded"),
    (reason: unknown) => ConnectError.from(reason),
  );
  const [info] = error.findDetails(ErrorInfoSchema);
  const fields = error
    .findDetails(BadRequestSchema)
    .flatMap((detail) => detail.fieldViolations.map(({ field }) => field));
  return { code: error.code, reason: info?.reason ?? "", text: error.rawMessage, fields };
}

/** Nearly as large as the policy admits, 1 MiB. No node is where it asks to be, so that it is in nobody's way. */
const largeSpec = {
  image,
  args: Array.from({ length: 120 }, () => "a".repeat(8192)),
  location: { country: "SM" },
};

/** Sets how large an instance's specification is. As many as fill a share would take half a minute: one stands for them. */
async function specificationOf(instanceId: string) {
  const administrator = new pg.Client(fixture.db.administrator);
  await administrator.connect();
  const setBytes = async (bytes: number): Promise<void> => {
    const text = "update instances set spec = decode(repeat('00', $1), 'hex') where id = $2";
    await administrator.query(text, [bytes, instanceId]);
  };
  return {
    setBytes,
    async [Symbol.asyncDispose]() {
      await setBytes(0);
      await administrator.end();
    },
  };
}

describe("large specifications", () => {
  it("make short pages of lists and watches, from which none is missing", async () => {
    const client = fixture.client(createCustomer());
    const created: string[] = [];
    for (let n = 0; n < 7; n += 1) {
      created.push((await client.createInstance({ spec: largeSpec })).instance?.id ?? "");
    }
    const newestFirst = created.toSorted().toReversed();
    const sizes: number[] = [];
    const listed: string[] = [];
    for (let pageToken = "", first = true; first || pageToken !== ""; first = false) {
      const page = await client.listInstances({ pageToken, pageSize: 500 });
      sizes.push(page.instances.length);
      listed.push(...page.instances.map(({ id }) => id));
      pageToken = page.nextPageToken;
    }
    assert.deepEqual([sizes, listed], [[5, 2], newestFirst]);
    const stop = new AbortController();
    const watched: string[] = [];
    for await (const { event } of client.watchInstances({}, { signal: stop.signal })) {
      if (event.case === "snapshot") watched.push(event.value.id);
      if (event.case === "bookmark") break;
    }
    stop.abort();
    assert.deepEqual(watched, newestFirst);
  });

  it("are kept up to a share of memory for each organization", async () => {
    const client = fixture.client(createCustomer());
    const { instance } = await client.createInstance({ spec: largeSpec });
    const instanceId = instance?.id ?? "";
    await client.stopInstance({ instanceId });
    await using row = await specificationOf(instanceId);
    await row.setBytes(64 * 1024 * 1024 - 1);
    await client.createInstance({ spec: largeSpec });
    const refused = await client.createInstance({ spec: { image } }).then(
      () => assert.fail("there is no limit"),
      (error: unknown) => ConnectError.from(error),
    );
    assert.equal(refused.code, Code.ResourceExhausted);
    assert.equal(refused.findDetails(ErrorInfoSchema)[0]?.metadata["quota"], "specification_bytes");
    assert.equal(refused.findDetails(QuotaFailureSchema)[0]?.violations.length, 1);
    await fixture.client(createCustomer()).createInstance({ spec: largeSpec });
  });

  it("are taken up to a share of the disk an hour, deleted or not", async () => {
    const client = fixture.client(createCustomer());
    const { instance } = await client.createInstance({ spec: largeSpec });
    const instanceId = instance?.id ?? "";
    await client.deleteInstance({ instanceId });
    await using row = await specificationOf(instanceId);
    await row.setBytes(64 * 1024 * 1024);
    const refused = await client.createInstance({ spec: { image } }).then(
      () => assert.fail("there is no limit"),
      (error: unknown) => ConnectError.from(error),
    );
    assert.equal(refused.findDetails(ErrorInfoSchema)[0]?.metadata["quota"], "specification_bytes_per_hour");
    const { now } = fixture;
    fixture.now = new Date(now.getTime() + 3_601_000);
    assert.ok((await client.createInstance({ spec: { image } })).instance);
    fixture.now = now;
  });

  it("stand in the database once, however often their instances change, and in every answer and change", async () => {
    const customer = createCustomer();
    const client = fixture.client(customer);
    const stop = new AbortController();
    let cursor = "";
    for await (const message of client.watchInstances({}, { signal: stop.signal })) {
      ({ cursor } = message);
      if (message.event.case === "bookmark") break;
    }
    const created: string[] = [];
    for (let n = 0; n < 6; n += 1) {
      const request = { spec: largeSpec, idempotencyKey: `create-${n}` };
      const first = (await client.createInstance(request)).instance;
      assert.deepEqual((await client.createInstance(request)).instance, first, "a replay is the first answer");
      created.push(first?.id ?? "");
      for (const command of ["stopInstance", "startInstance"] as const) {
        const key = { instanceId: first?.id ?? "", idempotencyKey: `${command}-${n}` };
        const answer = await client[command](key);
        assert.deepEqual((await client[command](key)).instance?.spec, answer.instance?.spec);
        assert.deepEqual(answer.instance?.spec, first?.spec);
      }
    }
    const [kept] = await fixture.db.database.system((tx) =>
      tx.query<{ bytes: bigint; changes: bigint }>(
        `select (select sum(octet_length(response)) from idempotency_records where organization_id = $1)
           + sum(octet_length(payload)) as bytes, count(*) as changes
         from changes where organization_id = $1`,
        [customer.organizationId],
      ),
    );
    assert.equal(kept?.changes, 18n);
    assert.ok(Number(kept.bytes) < 40 * 1024, `${kept.bytes} bytes are kept`);
    // More than one read of the database carries, and no change is left out.
    const seen: unknown[] = [];
    for await (const { event } of client.watchInstances({ cursor }, { signal: stop.signal })) {
      if (event.case !== "change") continue;
      assert.deepEqual(event.value.spec?.args, largeSpec.args);
      if (seen.push([event.value.id, event.value.version]) === 18) break;
    }
    stop.abort();
    assert.deepEqual(
      seen,
      created.flatMap((id) => [1n, 2n, 3n].map((version) => [id, version])),
    );
  });
});

describe("CreateInstance", () => {
  it("answers PENDING with every default filled in and the image in full", async () => {
    const customer = createCustomer();
    const { instance } = await fixture.client(customer).createInstance({ spec: { image } });
    assert.ok(instance);
    assert.equal(instance.state, InstanceState.PENDING);
    assert.equal(instance.organizationId, customer.organizationId);
    assert.equal(instance.createdBy, customer.callerId);
    assert.equal(instance.attempt, 1);
    assert.equal(instance.version, 1n);
    assert.equal(instance.nodeReachable, undefined);
    const { spec } = instance;
    assert.equal(spec?.image, "docker.io/library/busybox:latest");
    assert.equal(spec.cpuMillis, 1000);
    assert.equal(spec.memoryMib, 1024);
    assert.equal(spec.restartPolicy, RestartPolicy.NEVER);
    assert.equal(spec.pullPolicy, PullPolicy.IF_NOT_PRESENT);
    assert.equal(spec.placementTimeout?.seconds, 600n);
    assert.equal(spec.stopGrace?.seconds, 10n);
  });

  it("refuses what cannot be enforced yet, naming each field", async () => {
    const ports = [{ containerPort: 80, protocol: PortProtocol.TCP }];
    const spec = { image, diskMib: 100, workspaceMib: 100, ports };
    const failure = await failureOf(fixture.client(createCustomer()).createInstance({ spec }));
    assert.equal(failure.code, Code.Unimplemented);
    assert.equal(failure.reason, "NOT_SUPPORTED_YET");
    assert.deepEqual(failure.fields, ["spec.disk_mib", "spec.workspace_mib", "spec.ports"]);
  });

  it("refuses an image outside the allowlist, naming the field and what is allowed", async () => {
    for (const outside of ["evil/miner", "ghcr.io/clodeievil/x", "pytorchevil/pytorch"]) {
      const failure = await failureOf(fixture.client(createCustomer()).createInstance({ spec: { image: outside } }));
      assert.equal(failure.reason, "IMAGE_NOT_ALLOWED", outside);
      assert.deepEqual(failure.fields, ["spec.image"]);
      assert.match(failure.text, /allowed are .*pytorch\//);
    }
  });

  it("refuses a place where no node may ever stand, naming the field and what is allowed", async () => {
    const spec = { image, location: { country: "US" } };
    const failure = await failureOf(fixture.client(createCustomer()).createInstance({ spec }));
    assert.equal(failure.reason, "LOCATION_NOT_ALLOWED");
    assert.deepEqual(failure.fields, ["spec.location.country"]);
    assert.match(failure.text, /no node may stand in US; allowed are ES, FR/);
  });

  it("refuses variables that grant GPUs, and what the schema does not allow", async () => {
    const client = fixture.client(createCustomer());
    const env = { NVIDIA_VISIBLE_DEVICES: "all" };
    const reserved = await failureOf(client.createInstance({ spec: { image, env } }));
    assert.equal(reserved.reason, "INVALID_ARGUMENT");
    assert.deepEqual(reserved.fields, ['spec.env["NVIDIA_VISIBLE_DEVICES"]']);
    const tooMany = await failureOf(client.createInstance({ spec: { image, gpu: { count: 17 } } }));
    assert.deepEqual(tooMany.fields, ["spec.gpu.count"]);
    assert.match(tooMany.text, /16/);
  });

  it("has one effect for one idempotency key, and refuses the key with other content", async () => {
    const customer = createCustomer();
    const client = fixture.client(customer);
    const request = { spec: { image, labels: { a: "1", b: "2" } }, idempotencyKey: "k-1" };
    const answers = await Promise.all([client.createInstance(request), client.createInstance(request)]);
    const third = await client.createInstance({ ...request, spec: { image, labels: { b: "2", a: "1" } } });
    const ids = new Set([...answers, third].map(({ instance }) => instance?.id));
    assert.equal(ids.size, 1);
    assert.equal((await client.listInstances({})).instances.length, 1);
    const other = await failureOf(client.createInstance({ ...request, spec: { image: "library/alpine" } }));
    assert.equal(other.reason, "IDEMPOTENCY_KEY_REUSED");
    // The key is this caller's alone.
    const { instance } = await fixture.client(createCustomer()).createInstance(request);
    assert.ok(!ids.has(instance?.id));
  });

  it("does not burn a key by a refusal", async () => {
    const client = fixture.client(createCustomer());
    await failureOf(client.createInstance({ spec: { image: "evil/miner" }, idempotencyKey: "k" }));
    assert.ok((await client.createInstance({ spec: { image }, idempotencyKey: "k" })).instance);
  });

  it("is refused to a viewer, and where the e-mail address is not verified", async () => {
    const viewer = { ...createCustomer(), roles: new Set([Role.VIEWER]) };
    assert.equal(
      (await failureOf(fixture.client(viewer).createInstance({ spec: { image } }))).code,
      Code.PermissionDenied,
    );
    const unverified = { ...createCustomer(), emailVerified: false };
    const failure = await failureOf(fixture.client(unverified).createInstance({ spec: { image } }));
    assert.equal(failure.reason, "EMAIL_NOT_VERIFIED");
  });
});

describe("another organization's instance", () => {
  it("is to every method what an absent one is, text included", async () => {
    const { instance } = await fixture.client(createCustomer()).createInstance({ spec: { image } });
    assert.ok(instance);
    const stranger = fixture.client(createCustomer());
    const absent = newId("ins");
    const drain = async (instanceId: string) => {
      for await (const _ of stranger.watchInstances({ instanceId })) assert.fail("something was shown");
    };
    const calls: ((instanceId: string) => Promise<unknown>)[] = [
      (instanceId) => stranger.getInstance({ instanceId }),
      (instanceId) => stranger.stopInstance({ instanceId }),
      (instanceId) => stranger.startInstance({ instanceId }),
      (instanceId) => stranger.restartInstance({ instanceId }),
      (instanceId) => stranger.deleteInstance({ instanceId }),
      (instanceId) => stranger.listInstanceEvents({ instanceId }),
      drain,
    ];
    for (const call of calls) {
      const foreign = await failureOf(call(instance.id));
      assert.equal(foreign.reason, "NOT_FOUND");
      assert.deepEqual(foreign, await failureOf(call(absent)));
    }
    assert.deepEqual((await stranger.listInstances({ showDeleted: true })).instances, []);
  });

  it("is not in a page that is asked for with its owner's token", async () => {
    const owner = fixture.client(createCustomer());
    for (let count = 0; count < 3; count += 1) await owner.createInstance({ spec: { image } });
    const { nextPageToken } = await owner.listInstances({ pageSize: 1 });
    const page = await fixture.client(createCustomer()).listInstances({ pageSize: 1, pageToken: nextPageToken });
    assert.deepEqual(page.instances, []);
  });
});

describe("lists", () => {
  it("page through all instances, the newest first, by tokens that belong to their filter", async () => {
    const client = fixture.client(createCustomer());
    const ids: string[] = [];
    for (let count = 0; count < 5; count += 1) {
      fixture.now = new Date(fixture.now.getTime() + 1);
      const labels = { parity: count % 2 === 0 ? "even" : "odd" };
      const { instance } = await client.createInstance({ spec: { image, labels } });
      ids.unshift(instance?.id ?? "");
    }
    const seen: string[] = [];
    let pageToken = "";
    do {
      const page = await client.listInstances({ pageSize: 2, pageToken });
      seen.push(...page.instances.map(({ id }) => id));
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
    assert.deepEqual(seen, ids);
    const filtered = await client.listInstances({ filter: { labels: { parity: "even" } }, pageSize: 2 });
    assert.equal(filtered.instances.length, 2);
    const mixed = await failureOf(client.listInstances({ pageSize: 2, pageToken: filtered.nextPageToken }));
    assert.equal(mixed.reason, "PAGE_TOKEN_INVALID");
    const none = await client.listInstances({ filter: { gpuModel: "H100-SXM" } });
    assert.deepEqual(none.instances, []);
    assert.deepEqual((await client.listInstances({ filter: { states: [InstanceState.RUNNING] } })).instances, []);
    assert.equal((await client.listInstances({ filter: { states: [InstanceState.PENDING] } })).instances.length, 5);
  });

  it("show deleted instances only where they are asked for, and events in pages", async () => {
    const client = fixture.client(createCustomer());
    const { instance } = await client.createInstance({ spec: { image } });
    assert.ok(instance);
    const instanceId = instance.id;
    await client.stopInstance({ instanceId });
    await client.startInstance({ instanceId });
    await client.deleteInstance({ instanceId });
    assert.deepEqual((await client.listInstances({})).instances, []);
    assert.equal((await client.listInstances({ showDeleted: true })).instances.length, 1);
    assert.equal((await client.listInstances({ filter: { states: [InstanceState.DELETED] } })).instances.length, 1);
    assert.equal((await client.getInstance({ instanceId })).instance?.state, InstanceState.DELETED);
    const states: string[] = [];
    let pageToken = "";
    do {
      const page = await client.listInstanceEvents({ instanceId, pageSize: 3, pageToken });
      states.push(
        ...page.events.map(
          ({ sequence, attempt, state }) =>
            `${sequence} ${attempt} ${InstanceState.STOPPED === state ? "STOPPED" : state}`,
        ),
      );
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
    assert.deepEqual(states, [
      `1 1 ${InstanceState.PENDING}`,
      "2 1 STOPPED",
      `3 2 ${InstanceState.PENDING}`,
      `4 2 ${InstanceState.DELETED}`,
    ]);
  });
});

describe("commands", () => {
  it("that come at once leave one row without gaps in its versions", async () => {
    await addNode(fixture, { cpuCount: 8 });
    const customer = createCustomer();
    const client = fixture.client(customer);
    const { instance } = await client.createInstance({ spec: { image } });
    assert.ok(instance);
    const instanceId = instance.id;
    const commands = ["stopInstance", "startInstance", "restartInstance", "stopInstance", "startInstance"] as const;
    await Promise.all([
      ...commands.map((name) => client[name]({ instanceId })),
      fixture.scheduler.placePending(signal),
      ...commands.map((name) => client[name]({ instanceId })),
    ]);
    const versions = await fixture.db.database.tenant(customer.organizationId, (tx) =>
      tx.query<{ revision: bigint; payload: Buffer }>(
        "select revision, payload from changes where subject_id = $1 order by revision",
        [instanceId],
      ),
    );
    const { instance: now } = await client.getInstance({ instanceId });
    assert.equal(now?.version, BigInt(versions.length));
    const { events } = await client.listInstanceEvents({ instanceId, pageSize: 500 });
    assert.deepEqual(
      events.map(({ sequence }) => sequence),
      events.map((_, index) => BigInt(index + 1)),
    );
    await client.deleteInstance({ instanceId });
  });

  it("are refused to start what is deleted, and change nothing where nothing is to change", async () => {
    const client = fixture.client(createCustomer());
    const { instance } = await client.createInstance({ spec: { image } });
    const instanceId = instance?.id ?? "";
    assert.equal((await client.stopInstance({ instanceId })).instance?.version, 2n);
    assert.equal((await client.stopInstance({ instanceId })).instance?.version, 2n);
    await client.deleteInstance({ instanceId });
    // One after the other: of two at once the second may fail before anybody waits for it.
    assert.equal((await failureOf(client.startInstance({ instanceId }))).reason, "FAILED_PRECONDITION");
    assert.equal((await failureOf(client.restartInstance({ instanceId }))).reason, "FAILED_PRECONDITION");
    assert.equal((await client.deleteInstance({ instanceId })).instance?.state, InstanceState.DELETED);
  });

  it("take an instance on a node through its whole life", async () => {
    const nodeId = await addNode(fixture, { gpus: 8, cpuCount: 16 });
    const client = fixture.client(createCustomer());
    const gpu = { model: "H100-SXM", count: 2 };
    const { instance } = await client.createInstance({ spec: { image, gpu, location: { country: "ES" } } });
    assert.ok(instance);
    const instanceId = instance.id;
    await fixture.scheduler.placePending(signal);
    const get = async () => (await client.getInstance({ instanceId })).instance;
    const scheduled = await get();
    assert.equal(scheduled?.state, InstanceState.SCHEDULED);
    assert.equal(scheduled.gpus.length, 2);
    assert.ok(scheduled.gpus.every(({ simulated, model }) => simulated && model === "H100-SXM"));
    assert.equal(scheduled.location?.datacenter, "kumo-1");
    assert.equal(scheduled.nodeReachable, true);
    const first = { id: instanceId, attempt: 1 };
    await reportPhase(fixture, nodeId, first, AttemptPhase.RUNNING);
    assert.equal((await get())?.state, InstanceState.RUNNING);
    await client.restartInstance({ instanceId });
    await reportPhase(fixture, nodeId, first, AttemptPhase.ENDED, { exitCode: 143 });
    assert.equal((await get())?.state, InstanceState.PENDING);
    assert.deepEqual((await get())?.gpus, []);
    await fixture.scheduler.placePending(signal);
    assert.equal((await get())?.attempt, 2);
    const second = { id: instanceId, attempt: 2 };
    await reportPhase(fixture, nodeId, second, AttemptPhase.RUNNING);
    // Late news of the first attempt.
    await reportPhase(fixture, nodeId, first, AttemptPhase.ENDED, { exitCode: 1 });
    assert.equal((await get())?.state, InstanceState.RUNNING);
    await client.deleteInstance({ instanceId });
    const desired = await readDesiredSet(fixture, nodeId);
    const wished = desired.instances.find((each) => each.instanceId === instanceId);
    assert.equal(wished?.state, DesiredState.REMOVED);
    await reportPhase(fixture, nodeId, second, AttemptPhase.ENDED, {
      reason: InstanceReason.EXITED_NONZERO,
      exitCode: 137,
    });
    await reportPhase(fixture, nodeId, second, AttemptPhase.REMOVED);
    assert.equal((await get())?.state, InstanceState.DELETED);
    const after = await readDesiredSet(fixture, nodeId);
    assert.ok(!after.instances.some((each) => each.instanceId === instanceId));
    assert.ok(after.generation > desired.generation);
    const free = await fixture.db.database.system((tx) => fixture.placement.nodeAllocations(tx, [nodeId]));
    assert.deepEqual(free.get(nodeId)?.gpuUuids, []);
  });
});
