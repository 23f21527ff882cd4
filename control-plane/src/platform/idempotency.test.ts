import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { create, type DescMethodUnary } from "@bufbuild/protobuf";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import {
  CreateInstanceRequestSchema,
  type CreateInstanceResponseSchema,
  InstanceService,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { CreateEnrollmentTokenRequestSchema, NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { newId, type OrganizationId } from "@clodei/proto/ids";
import { DomainError } from "./errors.ts";
import { hashRequest, type IdempotentResult, pruneIdempotencyRecords, runIdempotent } from "./idempotency.ts";
import { startTestDatabase, type TestDatabase } from "./test-database.ts";

describe("idempotency", () => {
  let db: TestDatabase;
  before(async () => {
    db = await startTestDatabase();
  });
  after(async () => {
    await db[Symbol.asyncDispose]();
  });

  type Method = DescMethodUnary<typeof CreateInstanceRequestSchema, typeof CreateInstanceResponseSchema>;
  type Run = { organizationId: OrganizationId; callerId?: string; method?: Method; key: string; image?: string };
  let effects = 0;
  const run = (
    options: Run,
    during: () => Promise<void> = async () => undefined,
  ): Promise<IdempotentResult<{ instance?: { id: string } | undefined }>> =>
    db.database.tenant(options.organizationId, (tx) =>
      runIdempotent(
        tx,
        {
          callerId: options.callerId ?? "key_1",
          method: options.method ?? InstanceService.method.createInstance,
          request: create(CreateInstanceRequestSchema, {
            spec: { image: options.image ?? "busybox" },
            idempotencyKey: options.key,
          }),
        },
        async () => {
          effects += 1;
          const id = `effect ${effects}`;
          await during();
          return { instance: { id } };
        },
      ),
    );

  test("the same key and content replays the first answer, and has one effect", async () => {
    const organizationId = newId("org");
    const before = effects;
    const first = await run({ organizationId, key: "k" });
    const second = await run({ organizationId, key: "k" });
    assert.equal(effects, before + 1);
    assert.equal(first.replayed, false);
    assert.equal(second.replayed, true);
    assert.equal(second.response.instance?.id, first.response.instance?.id);
  });

  test("the same key with other content is refused", async () => {
    const organizationId = newId("org");
    await run({ organizationId, key: "k", image: "busybox" });
    await assert.rejects(
      run({ organizationId, key: "k", image: "debian" }),
      isReason(ErrorReason.IDEMPOTENCY_KEY_REUSED),
    );
  });

  test("a key belongs to its organization, caller and method", async () => {
    const [organizationId, other] = [newId("org"), newId("org")];
    const otherMethod = { ...InstanceService.method.createInstance, name: "StopInstance" };
    const results = [
      await run({ organizationId, key: "k" }),
      await run({ organizationId: other, key: "k" }),
      await run({ organizationId, key: "k", callerId: "key_2" }),
      await run({ organizationId, key: "k", method: otherMethod }),
      await run({ organizationId, key: "" }),
      await run({ organizationId, key: "" }),
    ];
    assert.equal(new Set(results.map(({ response }) => response.instance?.id)).size, results.length);
    assert.ok(results.every(({ replayed }) => !replayed));
  });

  test("a failure rolls everything back and burns no key", async () => {
    const organizationId = newId("org");
    const fail = async (): Promise<void> => {
      throw new DomainError(ErrorReason.FAILED_PRECONDITION, "not now");
    };
    await assert.rejects(run({ organizationId, key: "k" }, fail), isReason(ErrorReason.FAILED_PRECONDITION));
    const after = await run({ organizationId, key: "k" });
    assert.equal(after.replayed, false);
  });

  test("a duplicate in flight waits for the first and replays its answer", async () => {
    const organizationId = newId("org");
    const before = effects;
    const started = Promise.withResolvers<void>();
    const mayEnd = Promise.withResolvers<void>();
    const first = run({ organizationId, key: "k" }, async () => {
      started.resolve();
      await mayEnd.promise;
    });
    await started.promise;
    const duplicates = [run({ organizationId, key: "k" }), run({ organizationId, key: "k" })];
    setTimeout(mayEnd.resolve, 100);
    const [answer, ...replays] = await Promise.all([first, ...duplicates]);
    assert.equal(effects, before + 1);
    for (const replay of replays) {
      assert.equal(replay.replayed, true);
      assert.equal(replay.response.instance?.id, answer.response.instance?.id);
    }
  });

  test("a duplicate in flight of one that fails has the effect itself", async () => {
    const organizationId = newId("org");
    const started = Promise.withResolvers<void>();
    const mayFail = Promise.withResolvers<void>();
    const first = run({ organizationId, key: "k" }, async () => {
      started.resolve();
      await mayFail.promise;
      throw new Error("died");
    });
    await started.promise;
    const duplicate = run({ organizationId, key: "k" });
    setTimeout(mayFail.resolve, 100);
    await assert.rejects(first, /died/);
    assert.equal((await duplicate).replayed, false);
  });

  test("a duplicate of a request that takes longer than five seconds is told to come again", async () => {
    const organizationId = newId("org");
    const started = Promise.withResolvers<void>();
    const mayEnd = Promise.withResolvers<void>();
    const first = run({ organizationId, key: "k" }, async () => {
      started.resolve();
      await mayEnd.promise;
    });
    await started.promise;
    const startMs = performance.now();
    await assert.rejects(run({ organizationId, key: "k" }), (error) => {
      assert.ok(isReason(ErrorReason.IDEMPOTENCY_KEY_IN_FLIGHT)(error));
      assert.ok(error instanceof DomainError && error.retryAfterMs !== undefined);
      return true;
    });
    const waitedMs = performance.now() - startMs;
    assert.ok(waitedMs >= 4_900 && waitedMs < 60_000, `it waited ${waitedMs} ms`);
    mayEnd.resolve();
    await first;
  });

  test("a secret is in the first answer alone, and not in the database", async () => {
    const secret = "CLDT-1-this-is-a-secret";
    const call = (): Promise<IdempotentResult<{ token: string; enrollmentToken?: { id: string } | undefined }>> =>
      db.database.system((tx) =>
        runIdempotent(
          tx,
          {
            callerId: "opr_1",
            method: NodeService.method.createEnrollmentToken,
            request: create(CreateEnrollmentTokenRequestSchema, { nodeName: "n", idempotencyKey: "k" }),
          },
          async () => ({ token: secret, enrollmentToken: { id: "ent_1" } }),
          {
            strip(response) {
              response.token = "";
            },
          },
        ),
      );
    const first = await call();
    assert.equal(first.response.token, secret);
    assert.equal(first.redacted, false);
    const second = await call();
    assert.equal(second.response.token, "");
    assert.equal(second.response.enrollmentToken?.id, "ent_1");
    assert.equal(second.redacted, true);
    const rows = await db.database.system((tx) =>
      tx.query<{ response: Buffer }>("select response from idempotency_records"),
    );
    assert.ok(rows.every(({ response }) => !response.includes(secret)));
  });

  test("the digest of a request does not depend on the order of its maps, nor on the key", () => {
    const withEnvironment = (env: Record<string, string>, idempotencyKey: string): Buffer =>
      hashRequest(CreateInstanceRequestSchema, create(CreateInstanceRequestSchema, { spec: { env }, idempotencyKey }));
    const first = withEnvironment({ a: "1", b: "2" }, "x");
    assert.deepEqual(withEnvironment({ b: "2", a: "1" }, "y"), first);
    assert.notDeepEqual(withEnvironment({ a: "2", b: "1" }, "x"), first);
  });

  test("records past their retention go", async () => {
    const organizationId = newId("org");
    await run({ organizationId, key: "k" });
    assert.equal(await pruneIdempotencyRecords(db.database, new Date()), 0);
    assert.ok((await pruneIdempotencyRecords(db.database, new Date(Date.now() + 25 * 60 * 60 * 1_000))) >= 1);
    assert.equal((await run({ organizationId, key: "k" })).replayed, false);
  });

  function isReason(reason: ErrorReason): (error: unknown) => boolean {
    return (error) => error instanceof DomainError && error.reason === reason;
  }
});
