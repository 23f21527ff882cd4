import assert from "node:assert/strict";
import { setTimeout as delay } from "node:timers/promises";
import { test } from "node:test";
import { inspect } from "node:util";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Instance, InstanceReason, InstanceSchema, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import type { WatchInstancesResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { ClodeiError, InstanceEndedError } from "./errors.ts";
import { ended, instances, type ServerForClientTests, startServerForClientTests } from "./server-for-client-tests.ts";

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

/** A server that creates an instance and then shows these states of it, by watch alone. */
async function serverWithStates(states: Instance[], stepMs = 10): Promise<ServerForClientTests> {
  return await startServerForClientTests(
    instances({
      createInstance: () => ({ instance: instance(1, InstanceState.PENDING) }),
      async *watchInstances(request, context) {
        assert.equal(request.instanceId, id);
        const [first = instance(1, InstanceState.PENDING), ...rest] = states;
        yield snapshot(first);
        yield bookmark("c1");
        for (const state of rest) {
          await delay(stepMs);
          yield change(state, `c${state.version}`);
        }
        await ended(context.signal);
      },
    }),
  );
}

test("waitUntilRunning resolves at the change to RUNNING, without asking twice", async () => {
  await using server = await serverWithStates([
    instance(1, InstanceState.PENDING),
    instance(2, InstanceState.PULLING),
    instance(3, InstanceState.RUNNING),
    instance(4, InstanceState.STOPPED),
  ]);
  const handle = await server.client().instances.run({ image: "busybox" });
  assert.equal((await handle.waitUntilRunning()).version, 3n);
  assert.equal(handle.state, "RUNNING");
  assert.deepEqual(
    server.requests.map(({ method }) => method),
    ["CreateInstance", "WatchInstances"],
  );
});

test("waitUntilRunning counts a short job that has completed as having run", async () => {
  const reason = InstanceReason.COMPLETED;
  await using server = await serverWithStates([instance(5, InstanceState.STOPPED, { reason, exitCode: 0 })]);
  const handle = await server.client().instances.run({ image: "busybox" });
  assert.equal((await handle.waitUntilRunning()).exitCode, 0);
  assert.deepEqual([handle.state, handle.reason], ["STOPPED", "COMPLETED"]);
});

test("waitUntilRunning rejects with what became of the instance", async () => {
  const cases: [Instance, string, string][] = [
    [
      instance(2, InstanceState.FAILED, { reason: InstanceReason.IMAGE_NOT_FOUND, message: "no such image" }),
      "FAILED",
      "IMAGE_NOT_FOUND",
    ],
    [
      instance(2, InstanceState.FAILED, { reason: InstanceReason.EXITED_NONZERO, exitCode: 3 }),
      "FAILED",
      "EXITED_NONZERO",
    ],
    [
      instance(2, InstanceState.STOPPED, { reason: InstanceReason.STOPPED_BY_REQUEST }),
      "STOPPED",
      "STOPPED_BY_REQUEST",
    ],
    [instance(2, InstanceState.DELETED), "DELETED", "UNSPECIFIED"],
  ];
  for (const [last, state, reason] of cases) {
    await using server = await serverWithStates([instance(1, InstanceState.PENDING), last]);
    const handle = await server.client().instances.run({ image: "busybox" });
    await assert.rejects(handle.waitUntilRunning(), (error: unknown) => {
      assert.ok(error instanceof InstanceEndedError && error instanceof ClodeiError);
      assert.deepEqual([error.state, error.instanceReason, error.exitCode], [state, reason, last.exitCode]);
      assert.ok(error.message.includes(last.message));
      assert.equal(error.instance.id, handle.id);
      // A dump tells names, and not the numbers of enums.
      const dump = inspect(error);
      assert.ok(dump.includes(`instanceReason: '${reason}'`) && !/(?:state|reason): \d/u.test(dump), dump);
      return true;
    });
  }
});

test("waitUntilStopped resolves for every end, and waitUntilDeleted only for the last", async () => {
  await using server = await serverWithStates([
    instance(1, InstanceState.RUNNING),
    instance(2, InstanceState.FAILED, { exitCode: 3 }),
    instance(3, InstanceState.DELETED),
  ]);
  const handle = await server.client().instances.run({ image: "busybox" });
  assert.equal((await handle.waitUntilStopped()).exitCode, 3);
  assert.equal((await handle.waitUntilDeleted()).version, 3n);
});

test("a wait ends at its deadline with the state so far, and at an abort", async () => {
  const reason = InstanceReason.WAITING_FOR_CAPACITY;
  await using server = await serverWithStates([instance(2, InstanceState.PENDING, { reason })]);
  const handle = await server.client().instances.run({ image: "busybox" });
  await assert.rejects(handle.waitUntilRunning({ timeoutMs: 1_000 }), (error: unknown) => {
    assert.ok(error instanceof ClodeiError && error.reason === "DEADLINE_EXCEEDED");
    return /PENDING \(WAITING_FOR_CAPACITY\) and not RUNNING after 1000 ms/.test(error.message);
  });
  await assert.rejects(handle.waitUntilRunning({ signal: AbortSignal.timeout(50) }), (error: unknown) => {
    return error instanceof ClodeiError && error.reason === "CANCELED";
  });
});

test("a snapshot without the instance is followed by a look at it: deleted ones are not in it", async () => {
  await using server = await startServerForClientTests(
    instances({
      createInstance: () => ({ instance: instance(1, InstanceState.PENDING) }),
      getInstance: () => ({ instance: instance(9, InstanceState.DELETED) }),
      async *watchInstances(_request, context) {
        yield bookmark("c1");
        await ended(context.signal);
      },
    }),
  );
  const handle = await server.client().instances.run({ image: "busybox" });
  assert.equal((await handle.waitUntilDeleted()).version, 9n);
});
