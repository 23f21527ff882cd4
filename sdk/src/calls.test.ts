import assert from "node:assert/strict";
import { createServer as createPlainServer } from "node:http2";
import { createServer } from "node:net";
import { test } from "node:test";
import { Code } from "@connectrpc/connect";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import type { CreateInstanceRequest } from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { createClient } from "./client.ts";
import { ClodeiError } from "./errors.ts";
import { errorWith, instances, startServerForClientTests } from "./server-for-client-tests.ts";

const id = newId("ins");

const created = { instance: { id, state: InstanceState.PENDING, version: 1n, attempt: 1 } };

/** Waits for the end of a request, and fails it. */
async function aborted(signal: AbortSignal): Promise<never> {
  return await new Promise((_resolve, reject) => {
    signal.addEventListener("abort", () => reject(new Error("aborted")));
  });
}

/** Asserts that a promise rejects with a ClodeiError, and returns it. */
async function rejection(promise: Promise<unknown>): Promise<ClodeiError> {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof ClodeiError, String(error));
    return error;
  }
  return assert.fail("it did not reject");
}

test("a call that fails with UNAVAILABLE is sent again until it succeeds, with one idempotency key", async () => {
  let failures = 3;
  await using server = await startServerForClientTests(
    instances({
      createInstance() {
        if (failures-- > 0) throw errorWith(Code.Unavailable, "UNAVAILABLE");
        return created;
      },
    }),
  );
  const instance = await server.client().instances.run({ image: "busybox" });
  assert.equal(instance.id, id);
  assert.equal(server.requests.length, 4);
  const keys = new Set(server.requests.map(({ message }) => (message as CreateInstanceRequest).idempotencyKey));
  assert.equal(keys.size, 1);
  assert.match([...keys].join(), /^[0-9a-f-]{36}$/);
});

test("two calls have two idempotency keys, and a key of the caller is kept", async () => {
  await using server = await startServerForClientTests(instances({ createInstance: () => created }));
  const client = server.client();
  await client.instances.run({ image: "busybox" });
  await client.instances.run({ image: "busybox" });
  await client.instances.run({ image: "busybox" }, { idempotencyKey: "mine" });
  const keys = server.requests.map(({ message }) => (message as CreateInstanceRequest).idempotencyKey);
  assert.equal(new Set(keys).size, 3);
  assert.equal(keys[2], "mine");
});

test("a request object of the caller is not changed", async () => {
  await using server = await startServerForClientTests(instances({ stopInstance: () => created }));
  const request = { instanceId: id };
  await server.client().services.instances.stopInstance(request);
  assert.deepEqual(request, { instanceId: id });
});

test("a call whose connection is cut before the answer is sent again", async () => {
  let cuts = 2;
  await using server = await startServerForClientTests(
    instances({
      async createInstance() {
        if (cuts-- > 0) {
          server.cutConnections();
          await new Promise((resolve) => setTimeout(resolve, 20));
        }
        return created;
      },
    }),
  );
  await server.client().instances.run({ image: "busybox" });
  const keys = new Set(server.requests.map(({ message }) => (message as CreateInstanceRequest).idempotencyKey));
  assert.deepEqual([server.requests.length, keys.size], [3, 1]);
});

test("an answer that cannot be read is no lost connection, and the call is not sent again", async () => {
  let requests = 0;
  const server = createPlainServer((_request, response) => {
    requests++;
    response.writeHead(200, { "content-type": "application/proto" }).end(Buffer.of(0xff));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  assert.ok(address !== null && typeof address === "object");
  using client = createClient({ endpoint: `http://127.0.0.1:${address.port}`, token: () => "t" });
  const error = await rejection(client.instances.get(id));
  server.close();
  assert.deepEqual([error.code, error.reason, requests], ["internal", "INTERNAL", 1], error.message);
});

test("what the caller does to a specification after the call does not change its retries", async () => {
  const args = ["echo"];
  let failures = 1;
  await using server = await startServerForClientTests(
    instances({
      createInstance() {
        args[0] = "changed";
        if (failures-- > 0) throw errorWith(Code.Unavailable, "UNAVAILABLE");
        return created;
      },
    }),
  );
  await server.client().instances.run({ image: "busybox", args }, { idempotencyKey: "mine" });
  const sent = server.requests.map(({ message }) => (message as CreateInstanceRequest).spec?.args);
  assert.deepEqual(sent, [["echo"], ["echo"]]);
});

test("tries end after the number that was set", async () => {
  await using server = await startServerForClientTests(
    instances({
      getInstance() {
        throw errorWith(Code.Unavailable, "UNAVAILABLE");
      },
    }),
  );
  const client = server.client({ retry: { maxAttempts: 3, baseDelayMs: 1 } });
  assert.equal((await rejection(client.instances.get(id))).reason, "UNAVAILABLE");
  assert.equal(server.requests.length, 3);
});

test("errors that a second try cannot mend are not retried", async () => {
  const errors = [
    errorWith(Code.InvalidArgument, "INVALID_ARGUMENT"),
    errorWith(Code.NotFound, "NOT_FOUND"),
    errorWith(Code.Unauthenticated, "API_KEY_INVALID"),
    errorWith(Code.PermissionDenied, "PERMISSION_DENIED"),
    errorWith(Code.FailedPrecondition, "IDEMPOTENCY_KEY_REUSED"),
    errorWith(Code.ResourceExhausted, "QUOTA_EXCEEDED"),
    errorWith(Code.Aborted, "CONFLICT"),
    errorWith(Code.Internal, "INTERNAL"),
    errorWith(Code.DeadlineExceeded, "DEADLINE_EXCEEDED"),
    errorWith(Code.Unimplemented, "NOT_SUPPORTED_YET"),
  ];
  const sent = [...errors];
  await using server = await startServerForClientTests(
    instances({
      createInstance() {
        throw sent.shift() ?? new Error("too many requests");
      },
    }),
  );
  const client = server.client();
  for (const expected of errors) {
    const error = await rejection(client.instances.run({ image: "busybox" }));
    assert.equal(error.message, expected.rawMessage);
  }
  assert.equal(server.requests.length, errors.length);
});

test("a method without an idempotency key that changes something is sent once", async () => {
  await using server = await startServerForClientTests(
    (router) =>
      void router.service(EnrollmentService, {
        enroll() {
          throw errorWith(Code.Unavailable, "UNAVAILABLE");
        },
      }),
  );
  const error = await rejection(server.client().services.enrollment.enroll({ enrollmentToken: "x" }));
  assert.equal(error.reason, "UNAVAILABLE");
  assert.equal(server.requests.length, 1);
});

test("RetryInfo is waited for: an idempotency key in flight, a rate limit", async () => {
  const errors = [
    errorWith(Code.Aborted, "IDEMPOTENCY_KEY_IN_FLIGHT", { retryAfterMs: 120 }),
    errorWith(Code.ResourceExhausted, "RATE_LIMITED", { retryAfterMs: 120 }),
  ];
  await using server = await startServerForClientTests(
    instances({
      createInstance() {
        const error = errors.shift();
        if (error !== undefined) throw error;
        return created;
      },
    }),
  );
  const beginMs = performance.now();
  await server.client().instances.run({ image: "busybox" });
  const tookMs = performance.now() - beginMs;
  assert.ok(tookMs >= 240, `${tookMs}`);
  assert.equal(server.requests.length, 3);
});

test("a retry that the deadline leaves no time for is not waited for", async () => {
  await using server = await startServerForClientTests(
    instances({
      createInstance() {
        throw errorWith(Code.ResourceExhausted, "RATE_LIMITED", { retryAfterMs: 60_000 });
      },
    }),
  );
  const beginMs = performance.now();
  const error = await rejection(server.client().instances.run({ image: "busybox" }, { timeoutMs: 20_000 }));
  assert.deepEqual([error.reason, error.retryAfterMs], ["RATE_LIMITED", 60_000]);
  assert.ok(performance.now() - beginMs < 10_000);
});

test("a deadline ends a call that the server does not answer, and the server is told", async () => {
  const { promise: canceled, resolve } = Promise.withResolvers<void>();
  await using server = await startServerForClientTests(
    instances({
      async getInstance(_request, context) {
        context.signal.addEventListener("abort", () => resolve());
        return await aborted(context.signal);
      },
    }),
  );
  // Time enough to connect: the server is to see each call.
  for (const options of [{ timeoutMs: 1_000 }, {}]) {
    const client = server.client({ timeoutMs: 1_500 });
    const beginMs = performance.now();
    const error = await rejection(client.instances.get(id, options));
    assert.deepEqual([error.reason, error.code], ["DEADLINE_EXCEEDED", "deadline_exceeded"]);
    assert.ok(performance.now() - beginMs < 20_000);
  }
  await canceled;
  assert.equal(server.requests.length, 2);
});

test("a server that never completes the connection is tried again, and given up at the deadline", async () => {
  let connections = 0;
  const silent = createServer(() => connections++);
  await new Promise<void>((resolve) => silent.listen(0, "127.0.0.1", resolve));
  const address = silent.address();
  assert.ok(address !== null && typeof address === "object");
  await using server = await startServerForClientTests(() => undefined);
  const endpoint = `https://127.0.0.1:${address.port}`;
  const slow = server.client({ endpoint, timeoutMs: 200 });
  assert.equal((await rejection(slow.identity.whoAmI())).reason, "DEADLINE_EXCEEDED");
  const quick = server.client({
    endpoint,
    connectTimeoutMs: 50,
    timeoutMs: 2000,
    retry: { maxAttempts: 3, baseDelayMs: 1 },
  });
  const error = await rejection(quick.identity.whoAmI());
  assert.equal(error.reason, "UNAVAILABLE");
  assert.match(error.message, /no connection within 50 ms/);
  assert.equal(connections, 4);
  slow.close();
  silent.close();
});

test("an abort ends a call at once, also while it waits for its next try", async () => {
  await using server = await startServerForClientTests(
    instances({
      getInstance() {
        throw errorWith(Code.Unavailable, "UNAVAILABLE", { retryAfterMs: 20_000 });
      },
    }),
  );
  const controller = new AbortController();
  const reason = new Error("the user left");
  const beginMs = performance.now();
  setTimeout(() => controller.abort(reason), 100);
  const error = await rejection(server.client().instances.get(id, { signal: controller.signal }));
  assert.deepEqual([error.reason, error.code, error.cause], ["CANCELED", "canceled", reason]);
  assert.ok(performance.now() - beginMs < 10_000);
  const before = await rejection(server.client().instances.get(id, { signal: controller.signal }));
  assert.equal(before.reason, "CANCELED");
  assert.equal(server.requests.length, 1);
});

test("a closed client cancels what it does and takes nothing new", async () => {
  await using server = await startServerForClientTests(
    instances({ getInstance: async (_request, context) => await aborted(context.signal) }),
  );
  const client = server.client();
  const call = rejection(client.instances.get(id));
  setTimeout(() => client.close(), 50);
  assert.equal((await call).reason, "CANCELED");
  assert.equal((await rejection(client.instances.get(id))).reason, "CANCELED");
});

test("an error carries reason, fields, request id, retry delay and metadata", async () => {
  await using server = await startServerForClientTests(
    instances({
      createInstance() {
        throw errorWith(Code.InvalidArgument, "INVALID_ARGUMENT", {
          message: "spec.image is malformed",
          fields: { "spec.image": "must match" },
          metadata: { more: "facts" },
        });
      },
    }),
  );
  const error = await rejection(server.client().instances.run({ image: "Bad Image" }));
  assert.equal(error.name, "ClodeiError");
  assert.equal(error.message, "spec.image is malformed");
  assert.equal(error.code, "invalid_argument");
  assert.equal(error.reason, "INVALID_ARGUMENT");
  assert.deepEqual(error.fieldViolations, [{ field: "spec.image", rule: "string.pattern", message: "must match" }]);
  assert.equal(error.requestId, "r-1");
  assert.equal(error.metadata["more"], "facts");
});

test("a reason that this version does not know keeps its name, and its code gives the reason", async () => {
  await using server = await startServerForClientTests(
    instances({
      getInstance() {
        throw errorWith(Code.NotFound, "FROM_THE_FUTURE" as "NOT_FOUND");
      },
    }),
  );
  const error = await rejection(server.client().instances.get(id));
  assert.deepEqual([error.reason, error.metadata["reason"]], ["NOT_FOUND", "FROM_THE_FUTURE"]);
});

test("credentials go with every request, a token is asked for each time", async () => {
  await using server = await startServerForClientTests(
    (router) => void router.service(IdentityService, { whoAmI: () => ({}) }),
  );
  let asked = 0;
  const client = server.client({ token: () => `token-${++asked}`, organization: "org_x" });
  await client.identity.whoAmI();
  await client.identity.whoAmI();
  await server.client().identity.whoAmI();
  const headers = server.requests.map(({ header }) => header);
  assert.deepEqual(
    headers.map((header) => header.get("authorization")),
    ["Bearer token-1", "Bearer token-2", `Bearer ${server.apiKey}`],
  );
  assert.deepEqual(
    headers.map((header) => header.get("clodei-organization")),
    ["org_x", "org_x", null],
  );
});

test("what a token function throws is told as its own, and tried again where its connection was lost", async () => {
  await using server = await startServerForClientTests(
    (router) => void router.service(IdentityService, { whoAmI: () => ({}) }),
  );
  const cause = new TypeError("session is undefined");
  const token = () => {
    throw cause;
  };
  const error = await rejection(server.client({ token }).identity.whoAmI());
  assert.deepEqual(
    [error.reason, error.message, error.cause],
    ["CREDENTIALS_MISSING", "the token function failed: session is undefined", cause],
  );
  let failures = 1;
  const recovering = () => {
    if (failures-- > 0)
      throw new TypeError("fetch failed", { cause: Object.assign(new Error(), { code: "ECONNRESET" }) });
    return "t";
  };
  await server.client({ token: recovering }).identity.whoAmI();
  assert.equal(server.requests.length, 1);
});

test("a mistyped API key is refused before anything is sent, and is not shown", () => {
  const apiKey =
    "clodei_sk_key_01h455vb4pex5vsknk084sn02q_0123456789abcdefghjkmnpqrstvwxyz0123456789abcdefghjk_00000000";
  assert.throws(
    () => createClient({ endpoint: "https://127.0.0.1:1", apiKey }),
    (error: unknown) =>
      error instanceof ClodeiError && error.reason === "API_KEY_MALFORMED" && !error.message.includes(apiKey),
  );
});

test("options that cannot work are refused at once", () => {
  const token = () => "t";
  const cases: [Parameters<typeof createClient>[0], string][] = [
    [{ endpoint: "https://localhost" }, "CREDENTIALS_MISSING"],
    [{ endpoint: "https://localhost", token, apiKey: "x" }, "CREDENTIALS_MISSING"],
    [{ endpoint: "localhost:8443", token }, "INVALID_ARGUMENT"],
    [{ endpoint: "http://api.example", token }, "INVALID_ARGUMENT"],
    [{ endpoint: "https://localhost", token, ca: "/etc/ca.pem" }, "INVALID_ARGUMENT"],
  ];
  for (const [options, reason] of cases) {
    assert.throws(
      () => createClient(options),
      (error: unknown) => error instanceof ClodeiError && error.reason === reason,
    );
  }
});

test("a server whose certificate is of another authority is refused at once, and nothing is sent to it", async () => {
  await using server = await startServerForClientTests(() => undefined);
  await using other = await startServerForClientTests(() => undefined);
  // A retry would wait for minutes, and so end as CANCELED.
  const client = server.client({ ca: other.ca, timeoutMs: 0, retry: { baseDelayMs: 600_000, maxDelayMs: 600_000 } });
  const error = await rejection(client.identity.whoAmI({ signal: AbortSignal.timeout(5_000) }));
  assert.match(error.message, /was not signed by the authority in ca/);
  assert.equal(server.requests.length, 0);
});

test("numbers that no message can hold are refused with their fields, before anything is sent", async () => {
  await using server = await startServerForClientTests(instances({ createInstance: () => created }));
  const spec = {
    image: "busybox",
    memoryMib: 1.5,
    cpuMillis: -1,
    gpu: { count: Number.NaN },
    maxRunTimeSeconds: Number.NaN,
  };
  const error = await rejection(server.client().instances.run(spec));
  assert.deepEqual(
    error.fieldViolations.map(({ field }) => field),
    ["spec.gpu.count", "spec.cpu_millis", "spec.memory_mib", "spec.max_run_time"],
  );
  assert.equal(server.requests.length, 0);
});

test("a specification arrives as it was written, in the schema's units", async () => {
  await using server = await startServerForClientTests(instances({ createInstance: () => created }));
  await server.client().instances.run({
    image: "pytorch/pytorch",
    command: ["/bin/sh"],
    args: ["-c", "nvidia-smi"],
    env: { A: "1" },
    gpu: { model: "H100-SXM", count: 8, minMemoryMib: 80_000 },
    cpuMillis: 4000,
    memoryMib: 65_536,
    location: { country: "ES" },
    labels: { team: "vision" },
    restartPolicy: "ON_FAILURE",
    pullPolicy: "ALWAYS",
    placementTimeoutSeconds: 90,
    maxRunTimeSeconds: 1.5,
    stopGraceSeconds: 0,
  });
  const spec = (server.requests[0]?.message as CreateInstanceRequest | undefined)?.spec;
  assert.deepEqual([spec?.gpu?.model, spec?.gpu?.count, spec?.gpu?.minMemoryMib], ["H100-SXM", 8, 80_000]);
  assert.deepEqual([spec?.cpuMillis, spec?.memoryMib, spec?.diskMib], [4000, 65_536, undefined]);
  assert.deepEqual([spec?.location?.country, spec?.location?.region], ["ES", undefined]);
  assert.deepEqual([spec?.restartPolicy, spec?.pullPolicy], [2, 2]);
  assert.deepEqual(
    [spec?.placementTimeout?.seconds, spec?.maxRunTime?.nanos, spec?.stopGrace?.seconds],
    [90n, 500_000_000, 0n],
  );
});
