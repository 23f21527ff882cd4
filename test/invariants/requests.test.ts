// Invariants of the architecture about requests: 1, 8, 9, 10 and 12, through the public listener of a whole system.
import assert from "node:assert/strict";
import { request } from "node:https";
import { after, before, describe, test } from "node:test";
import { CatalogService } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService, type WatchInstancesResponse } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { newId } from "@clodei/proto/ids";
import { type ClodeiClient, ClodeiError } from "@clodei/sdk";
import { listContainers } from "../harness/containers.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { testImage, TestSystem } from "../harness/system.ts";

const services = [InstanceService, CatalogService, NodeService, IdentityService, EnrollmentService];

describe("what requests may do", { skip: engineUnavailable, timeout: 240_000 }, () => {
  let system: TestSystem;
  let stranger: ClodeiClient;
  before(async () => {
    system = await TestSystem.start({ agents: [{ name: "mad-1", simulateGpus: "4xH100-SXM" }] });
    stranger = system.connect(await system.createOrganization("umbrella"));
  });
  after(async () => {
    stranger?.close();
    await system[Symbol.asyncDispose]();
  });

  const sleeper = {
    image: testImage,
    command: ["sleep", "300"],
    cpuMillis: 50,
    memoryMib: 16,
    stopGraceSeconds: 0,
  } as const;

  test("invariant 1: a GPU is allocated to at most one live instance", async () => {
    const asked = await Promise.all(
      Array.from({ length: 8 }, (_, index) =>
        (index % 2 === 0 ? system.client : stranger).instances.run({ ...sleeper, gpu: { count: 1 } }),
      ),
    );
    // A GPU is free again when its instance was deleted, so all eight run at some time, four at once.
    const waiting = new Set(asked);
    const holders = new Map<string, string>();
    while (waiting.size > 0) {
      const running = await Promise.any(
        [...waiting].map(async (instance) => {
          await instance.waitUntilRunning({ timeoutMs: 60_000 });
          return instance;
        }),
      );
      for (const instance of waiting) await instance.refresh();
      holders.clear();
      for (const instance of waiting) {
        for (const { uuid } of instance.instance.gpus) {
          assert.equal(holders.get(uuid), undefined, `${uuid} is held twice`);
          holders.set(uuid, instance.id);
        }
      }
      assert.ok(holders.size <= 4);
      waiting.delete(running);
      await running.delete();
      await running.waitUntilDeleted({ timeoutMs: 60_000 });
    }
  });

  test("invariant 8: a request replayed with its idempotency key has one effect", async () => {
    const key = "order-4711";
    const send = () => system.client.instances.run({ ...sleeper, labels: { order: "4711" } }, { idempotencyKey: key });
    const [first, ...others] = await Promise.all(Array.from({ length: 8 }, send));
    assert.ok(first);
    for (const other of others) assert.equal(other.id, first.id);
    const found = await Array.fromAsync(system.client.instances.list({ labels: { order: "4711" } }));
    assert.equal(found.length, 1);
    await first.waitUntilRunning({ timeoutMs: 30_000 });
    assert.equal((await listContainers(system.engine, first.id)).length, 1);
    await assert.rejects(
      system.client.instances.run({ ...sleeper, labels: { order: "other" } }, { idempotencyKey: key }),
      (error) => error instanceof ClodeiError && error.reason === "IDEMPOTENCY_KEY_REUSED",
    );
    // Another organization's key of the same text is another key.
    const other = await stranger.instances.run({ ...sleeper }, { idempotencyKey: key });
    assert.notEqual(other.id, first.id);
    await Promise.all([first.delete(), other.delete()]);
  });

  test("invariant 9: no caller learns of another organization's objects, by any RPC or error text", async () => {
    const instance = await system.client.instances.run({ ...sleeper, labels: { secret: "project-x" } });
    const absent = newId("ins");
    const calls = stranger.services.instances;
    const each = (instanceId: string): readonly (() => Promise<unknown>)[] => [
      () => calls.getInstance({ instanceId }),
      () => calls.stopInstance({ instanceId }),
      () => calls.startInstance({ instanceId }),
      () => calls.restartInstance({ instanceId }),
      () => calls.deleteInstance({ instanceId }),
      () => calls.listInstanceEvents({ instanceId }),
      () => Array.fromAsync(calls.streamLogs({ instanceId })),
      () => Array.fromAsync(calls.watchInstances({ instanceId })),
    ];
    const answer = async (call: () => Promise<unknown>, id: string): Promise<string> => {
      const error = await call().then(
        () => assert.fail("was answered"),
        (reason: unknown) => reason,
      );
      assert.ok(error instanceof ClodeiError);
      assert.equal(error.reason, "NOT_FOUND");
      return JSON.stringify([error.code, error.message, error.fieldViolations]).replaceAll(id, "ID");
    };
    const foreign = each(instance.id);
    const nobodys = each(absent);
    for (const [index, call] of foreign.entries()) {
      const other = nobodys[index];
      assert.ok(other);
      assert.equal(await answer(call, instance.id), await answer(other, absent), `call ${index} tells them apart`);
    }
    assert.deepEqual(
      await Array.fromAsync(stranger.instances.list({ showDeleted: true, labels: { secret: "project-x" } })),
      [],
    );
    const shown = await Array.fromAsync(takeUntilBookmark(calls.watchInstances({})));
    assert.ok(!shown.includes(instance.id), "a watch shows it");
    const [still] = await Array.fromAsync(system.client.instances.list({ labels: { secret: "project-x" } }));
    assert.equal(still?.id, instance.id, "it was changed from outside");
    await instance.delete();
  });

  test("invariant 10: no RPC is callable without a declared role", async () => {
    const withoutKey = createAnonymous(system);
    const operator = system.operator;
    for (const service of services) {
      for (const method of service.methods) {
        const code = await withoutKey(`${service.typeName}/${method.name}`, method.methodKind);
        // Enrollment proves itself in the message: an empty one breaks its rules.
        const expected = service === EnrollmentService ? "invalid_argument" : "unauthenticated";
        assert.equal(code, expected, `${method.name} answered ${code || "something"} to nobody`);
      }
    }
    // A customer's administrator is no operator, and an operator is no customer.
    await assert.rejects(
      Array.fromAsync(system.client.nodes.list()),
      (error) => error instanceof ClodeiError && error.reason === "PERMISSION_DENIED",
    );
    await assert.rejects(
      operator.instances.run(sleeper),
      (error) => error instanceof ClodeiError && error.reason === "PERMISSION_DENIED",
    );
  });

  test("invariant 12: no secret, token or key appears in a log line or an error message", async () => {
    const secrets = ["hunter2-in-env", "s3cret-argument"];
    const instance = await system.client.instances.run({
      ...sleeper,
      command: ["sh", "-c", "echo out-put-of-a-customer; sleep 300", secrets[1] ?? ""],
      env: { PASSWORD: secrets[0] ?? "" },
    });
    await instance.waitUntilRunning({ timeoutMs: 30_000 });
    const { token } = await system.operator.nodes.createEnrollmentToken({
      location: { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 },
    });
    const apiKey = await system.createOrganization("initech");
    using client = system.connect(apiKey);
    await client.identity.whoAmI();
    // Errors on purpose, with the secrets in them.
    const texts: string[] = [];
    for (const attempt of [
      () => client.instances.run({ ...sleeper, env: { "BAD-NAME": "hunter2-in-env" } }),
      () => client.services.enrollment.enroll({ enrollmentToken: `${token}x`, certificateRequest: new Uint8Array(8) }),
      () => client.instances.run({ ...sleeper, args: ["s3cret-argument".repeat(1000)] }),
    ]) {
      const error: unknown = await attempt().catch((reason: unknown) => reason);
      assert.ok(error instanceof ClodeiError);
      texts.push(JSON.stringify([error.message, error.fieldViolations, error.metadata]));
    }
    await instance.delete();
    await instance.waitUntilDeleted({ timeoutMs: 30_000 });
    texts.push(system.controlPlane.program.output, system.agent("mad-1").program.output);
    assert.ok(texts.join("").length > 1000, "nothing was logged, so nothing was shown");
    const secretPart = (text: string, separator: string): string => text.split(separator).at(-1) ?? text;
    const forbidden = [
      ...secrets,
      "out-put-of-a-customer",
      apiKey,
      secretPart(apiKey.replace(/_[^_]*$/, ""), "_"),
      token,
      secretPart(token, "-"),
    ];
    for (const secret of forbidden) {
      assert.ok(!texts.some((text) => text.includes(secret)), `${secret.slice(0, 8)}… appears`);
    }
  });

  /** Calls without credentials, as plain JSON over HTTP; returns Connect's code of the error, "" without one. */
  function createAnonymous(target: TestSystem) {
    return async (method: string, kind: string): Promise<string> => {
      const { promise, resolve, reject } = Promise.withResolvers<string>();
      const unary = kind === "unary";
      const headers = {
        "content-type": unary ? "application/json" : "application/connect+json",
        "connect-protocol-version": "1",
      };
      const url = `${target.controlPlane.listening.publicUrl}/${method}`;
      const outgoing = request(url, { method: "POST", ca: target.ca, headers }, (incoming) => {
        let text = "";
        incoming.setEncoding("utf8").on("data", (part: string) => (text += part));
        incoming.on("error", reject);
        incoming.on("end", () => resolve(/"code":"(\w+)"/.exec(text)?.[1] ?? ""));
      });
      outgoing.on("error", reject);
      // An enveloped empty message where the method streams.
      outgoing.end(unary ? "{}" : Buffer.concat([Buffer.from([0, 0, 0, 0, 2]), Buffer.from("{}")]));
      return promise;
    };
  }
});

/** The instances that a watch shows before its first bookmark. */
async function* takeUntilBookmark(stream: AsyncIterable<WatchInstancesResponse>): AsyncGenerator<string> {
  for await (const { event } of stream) {
    if (event.case === "bookmark" || event.case === undefined) return;
    yield event.value.id;
  }
}
