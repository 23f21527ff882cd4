import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { create as createMessage } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { type Instance, InstanceSpecSchema, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import type { WatchInstancesRequest, WatchInstancesResponse } from "@clodei/proto/gen/clodei/v1/instance_service";
import type { CustomerCaller } from "../rpc/caller.ts";
import { createCustomer, type Fixture, startFixture } from "./test-fixture.ts";

let fixture: Fixture;
before(async () => {
  fixture = await startFixture();
});
after(() => fixture[Symbol.asyncDispose]());

const image = "library/busybox";
type Request = Partial<Pick<WatchInstancesRequest, "cursor" | "instanceId">> & {
  filter?: { labels?: Record<string, string> };
};

/** A watch that is read message by message. */
function watch(customer: CustomerCaller, request: Request = {}) {
  const abort = new AbortController();
  const stream = fixture.client(customer).watchInstances(request, { signal: abort.signal });
  const iterator = stream[Symbol.asyncIterator]();
  const read = async (): Promise<WatchInstancesResponse> => {
    const result = await iterator.next();
    if (result.done === true) throw new Error("the watch ended");
    return result.value;
  };
  return {
    read,
    /** The next change; bookmarks in between are passed over. */
    async change(): Promise<{ instance: Instance; cursor: string }> {
      for (;;) {
        const { event, cursor } = await read();
        if (event.case === "change") return { instance: event.value, cursor };
        assert.equal(event.case, "bookmark");
      }
    },
    /** Reads up to the first bookmark. */
    async snapshot(): Promise<{ instances: Instance[]; cursor: string }> {
      const instances: Instance[] = [];
      for (;;) {
        const { event, cursor } = await read();
        if (event.case === "bookmark") return { instances, cursor };
        assert.ok(event.case === "snapshot" || event.case === "change");
        assert.equal(cursor, "");
        instances.push(event.value);
      }
    },
    async stop(): Promise<void> {
      abort.abort();
      await iterator.next().catch(() => undefined);
    },
  };
}

async function create(customer: CustomerCaller, labels: Record<string, string> = {}): Promise<string> {
  const { instance } = await fixture.client(customer).createInstance({ spec: { image, labels } });
  return instance?.id ?? "";
}

describe("a watch", () => {
  it("sends what is there, a bookmark, and then every change in order", async () => {
    const customer = createCustomer();
    const client = fixture.client(customer);
    const first = await create(customer);
    const watching = watch(customer);
    const { instances } = await watching.snapshot();
    assert.deepEqual(
      instances.map(({ id }) => id),
      [first],
    );
    const second = await create(customer);
    await client.stopInstance({ instanceId: first });
    await client.deleteInstance({ instanceId: first });
    const seen: unknown[] = [];
    for (let count = 0; count < 3; count += 1) {
      const { instance } = await watching.change();
      seen.push([instance.id, instance.version, instance.state]);
    }
    assert.deepEqual(seen, [
      [second, 1n, InstanceState.PENDING],
      [first, 2n, InstanceState.STOPPED],
      [first, 3n, InstanceState.DELETED],
    ]);
    await watching.stop();
  });

  it("resumes after a break without losing or doubling a change", async () => {
    const customer = createCustomer();
    const client = fixture.client(customer);
    const instanceId = await create(customer);
    const first = watch(customer);
    let { cursor } = await first.snapshot();
    await first.stop();
    const versions: bigint[] = [];
    for (let round = 0; round < 4; round += 1) {
      await client.stopInstance({ instanceId });
      await client.startInstance({ instanceId });
      // Each watch reads one change and breaks.
      const again = watch(customer, { cursor });
      const change = await again.change();
      versions.push(change.instance.version);
      ({ cursor } = change);
      await again.stop();
    }
    const last = watch(customer, { cursor });
    for (let count = 0; count < 4; count += 1) versions.push((await last.change()).instance.version);
    await last.stop();
    assert.deepEqual(versions, [2n, 3n, 4n, 5n, 6n, 7n, 8n, 9n]);
  });

  it("does not skip a transaction that began before one that was seen and committed after it", async () => {
    const customer = createCustomer();
    const watching = watch(customer);
    await watching.snapshot();
    const { database } = fixture.db;
    const wrote = Promise.withResolvers<void>();
    const mayCommit = Promise.withResolvers<void>();
    const spec = createMessage(InstanceSpecSchema, { image, labels: { order: "older" } });
    const older = database.tenant(customer.organizationId, async (tx) => {
      const instance = await fixture.instances.create(tx, spec, customer.callerId);
      wrote.resolve();
      await mayCommit.promise;
      return instance;
    });
    await wrote.promise;
    const newer = await create(customer);
    assert.equal((await watching.change()).instance.id, newer);
    mayCommit.resolve();
    const { id } = await older;
    assert.equal((await watching.change()).instance.id, id);
    await watching.stop();
  });

  it("obeys its filter, and shows nothing of others", async () => {
    const customer = createCustomer();
    const watching = watch(customer, { filter: { labels: { team: "a" } } });
    await watching.snapshot();
    await create(createCustomer(), { team: "a" });
    await create(customer, { team: "b" });
    const mine = await create(customer, { team: "a" });
    assert.equal((await watching.change()).instance.id, mine);
    await watching.stop();
    const one = watch(customer, { instanceId: mine });
    const { instances } = await one.snapshot();
    assert.deepEqual(
      instances.map(({ id }) => id),
      [mine],
    );
    await one.stop();
  });

  it("tells of a change within milliseconds of its commit", async () => {
    const customer = createCustomer();
    const watching = watch(customer);
    await watching.snapshot();
    const delays: number[] = [];
    for (let count = 0; count < 20; count += 1) {
      await create(customer);
      const committed = performance.now();
      await watching.change();
      delays.push(performance.now() - committed);
    }
    await watching.stop();
    const median = delays.toSorted((a, b) => a - b)[10] ?? Infinity;
    // By the poll it would be a second. Far above what is measured (about a millisecond), for a machine that is busy.
    assert.ok(median < 500, `the median is ${median} ms`);
  });

  it("sends every instance of more than a page, each as it is at the bookmark", async () => {
    const customer = createCustomer();
    const client = fixture.client(customer);
    const spec = createMessage(InstanceSpecSchema, { image });
    const created = await fixture.db.database.tenant(customer.organizationId, async (tx) => {
      const instances: string[] = [];
      for (let count = 0; count < 520; count += 1) {
        instances.push((await fixture.instances.create(tx, spec, customer.callerId)).id);
      }
      return instances;
    });
    const watching = watch(customer);
    const firstMessage = await watching.read();
    // The snapshot has begun; an instance of its first page changes before it ends.
    const changed = firstMessage.event.case === "snapshot" ? firstMessage.event.value.id : "";
    await client.stopInstance({ instanceId: changed });
    const { instances, cursor } = await watching.snapshot();
    const latest = new Map(instances.map((instance) => [instance.id, instance]));
    latest.set(changed, latest.get(changed) ?? assert.fail("the change came before the bookmark"));
    assert.equal(latest.get(changed)?.state, InstanceState.STOPPED);
    assert.deepEqual([...latest.keys()].toSorted(), created.toSorted());
    await client.startInstance({ instanceId: changed });
    const { instance } = await watching.change();
    assert.equal(instance.version, 3n, "what was sent before the bookmark does not come again");
    await watching.stop();
    const again = watch(customer, { cursor });
    assert.equal((await again.change()).instance.version, 3n);
    await again.stop();
  });

  it("refuses a cursor that is not one of ours", async () => {
    const watching = watch(createCustomer(), { cursor: "bm9uc2Vuc2U" });
    await assert.rejects(watching.read(), (error: unknown) => ConnectError.from(error).code === Code.InvalidArgument);
  });

  it("ends as unavailable when the server drains", async () => {
    const customer = createCustomer();
    const watching = watch(customer);
    await watching.snapshot();
    const next = watching.read();
    fixture.drain.abort();
    await assert.rejects(next, (error: unknown) => ConnectError.from(error).code === Code.Unavailable);
  });
});
