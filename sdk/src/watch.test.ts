import assert from "node:assert/strict";
import { setTimeout as delay } from "node:timers/promises";
import { test } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { type Instance, InstanceSchema, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import type { WatchInstancesRequest, WatchInstancesResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { ClodeiError } from "./errors.ts";
import {
  ended,
  errorWith,
  instances,
  type ServerForClientTests,
  startServerForClientTests,
  take,
} from "./server-for-client-tests.ts";
import type { WatchEvent } from "./watch.ts";

const id = newId("ins");

function instance(
  version: number,
  state: InstanceState,
  fields: MessageInitShape<typeof InstanceSchema> = {},
): Instance {
  return create(InstanceSchema, { id, version: BigInt(version), state, attempt: 1, ...fields });
}

type WatchMessage = MessageInitShape<typeof WatchInstancesResponseSchema>;

const snapshot = (value: Instance): WatchMessage => ({ event: { case: "snapshot", value } });
const change = (value: Instance, cursor: string): WatchMessage => ({ event: { case: "change", value }, cursor });
const bookmark = (cursor: string): WatchMessage => ({ event: { case: "bookmark", value: {} }, cursor });

/** What a watch says, in short. */
function inShort(event: WatchEvent<Instance>): string {
  switch (event.type) {
    case "snapshot":
    case "change":
      return `${event.type} ${event.value.version}`;
    case "bookmark":
    case "reset":
      return event.type;
  }
}

test("as many watches as a connection takes leave room for calls and for more watches", async () => {
  let open = 0;
  await using server = await startServerForClientTests(
    instances({
      async *watchInstances(_request, context) {
        open++;
        yield snapshot(instance(1, InstanceState.PENDING));
        await ended(context.signal);
        open--;
      },
      getInstance: () => ({ instance: instance(1, InstanceState.PENDING) }),
    }),
  );
  const client = server.client();
  const watches = Array.from({ length: 250 }, () => client.instances.watch()[Symbol.asyncIterator]());
  const events = await Promise.all(watches.map((watch) => watch.next()));
  assert.ok(events.every(({ done }) => done !== true));
  assert.equal((await client.instances.get(id)).id, id);
  assert.equal(open, 250);
  client.close();
});

test("a watch goes on from its cursor after a cut connection, a drained one and a server that ends it", async () => {
  const cursors: string[] = [];
  const breaks = [() => server.cutConnections(), () => server.drainConnections(), () => undefined];
  const server: ServerForClientTests = await startServerForClientTests(
    instances({
      async *watchInstances(request: WatchInstancesRequest, context) {
        cursors.push(request.cursor);
        if (request.cursor === "") {
          yield snapshot(instance(1, InstanceState.PENDING));
          yield bookmark("c1");
        }
        const next = cursors.length + 1;
        yield change(instance(next, InstanceState.PULLING), `c${next}`);
        const breakIt = breaks.shift();
        if (breakIt === undefined) return await ended(context.signal);
        await delay(20);
        breakIt();
        await delay(20);
      },
    }),
  );
  await using _ = server;
  const events = await take(6, server.client().instances.watch());
  assert.deepEqual(events.map(inShort), ["snapshot 1", "bookmark", "change 2", "change 3", "change 4", "change 5"]);
  assert.deepEqual(cursors, ["", "c2", "c3", "c4"]);
});

test("a snapshot that was cut is taken again, and the watch says so", async () => {
  let opened = 0;
  const server: ServerForClientTests = await startServerForClientTests(
    instances({
      async *watchInstances(_request, context) {
        yield snapshot(instance(1, InstanceState.PENDING));
        if (opened++ === 0) {
          await delay(20);
          server.cutConnections();
          return;
        }
        yield bookmark("c1");
        await ended(context.signal);
      },
    }),
  );
  await using _ = server;
  const events = await take(4, server.client().instances.watch());
  assert.deepEqual(events.map(inShort), ["snapshot 1", "reset", "snapshot 1", "bookmark"]);
});

test("a cursor that is too old leads to a new snapshot at once, and the watch says so", async () => {
  const cursors: string[] = [];
  await using server = await startServerForClientTests(
    instances({
      async *watchInstances(request, context) {
        cursors.push(request.cursor);
        if (request.cursor !== "") throw errorWith(Code.OutOfRange, "CURSOR_EXPIRED");
        yield snapshot(instance(7, InstanceState.RUNNING));
        yield bookmark("c7");
        await ended(context.signal);
      },
    }),
  );
  const events = await take(3, server.client().instances.watch({ cursor: "old" }));
  assert.deepEqual(events.map(inShort), ["reset", "snapshot 7", "bookmark"]);
  assert.deepEqual(cursors, ["old", ""]);
});

test("an error that waiting cannot mend ends a watch", async () => {
  await using server = await startServerForClientTests(
    instances({
      // oxlint-disable-next-line require-yield -- this is what the test is about
      async *watchInstances() {
        throw errorWith(Code.PermissionDenied, "PERMISSION_DENIED");
      },
    }),
  );
  await assert.rejects(take(1, server.client().instances.watch()), (error: unknown) => {
    return error instanceof ClodeiError && error.reason === "PERMISSION_DENIED";
  });
});

test("a watch gives up after the time that was set", async () => {
  await using server = await startServerForClientTests(() => undefined);
  const token = () => "t";
  const client = server.client({ endpoint: "https://127.0.0.1:1", token, timeoutMs: 150, retry: { baseDelayMs: 20 } });
  const beginMs = performance.now();
  await assert.rejects(take(1, client.instances.watch()), (error: unknown) => {
    return error instanceof ClodeiError && error.reason === "UNAVAILABLE" && error.message.includes("ECONNREFUSED");
  });
  assert.ok(performance.now() - beginMs < 10_000);
});

test("an abort ends a watch, and so does leaving the loop: the server is told", async () => {
  let open = 0;
  await using server = await startServerForClientTests(
    instances({
      async *watchInstances(_request, context) {
        open++;
        yield bookmark("c1");
        await ended(context.signal);
        open--;
      },
    }),
  );
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 50);
  await assert.rejects(take(2, server.client().instances.watch({ signal: controller.signal })), (error: unknown) => {
    return error instanceof ClodeiError && error.reason === "CANCELED";
  });
  await take(1, server.client().instances.watch());
  for (let left = 100; open > 0 && left > 0; left--) await delay(20);
  assert.equal(open, 0);
});
