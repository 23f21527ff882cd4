import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { connect as connectHttp2, constants } from "node:http2";
import { connect as connectTcp } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectTls } from "node:tls";
import { promisify } from "node:util";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient, type ConnectRouter } from "@connectrpc/connect";
import { findTrailerError } from "@connectrpc/connect/protocol-grpc";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService, WatchInstancesResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { Health, HealthCheckResponse_ServingStatus as Serving } from "@clodei/proto/gen/grpc/health/v1/health";
import { ServerReflection } from "@clodei/proto/gen/grpc/reflection/v1/reflection";
import { ServerReflection as AlphaReflection } from "@clodei/proto/gen/grpc/reflection/v1alpha/reflection";
import { DomainError } from "../platform/errors.ts";
import type { CustomerCaller } from "./caller.ts";
import { callerOf, requestIdOf } from "./context.ts";
import { HealthState, healthHandlers } from "./health.ts";
import { RateLimiter } from "./rate-limit.ts";
import { createReflection } from "./reflection.ts";
import { sendPlain, startTestListener, testCallers, type TestListener, transportKinds } from "./test-listener.ts";

const admin = "Bearer role-ADMIN";
const secret = "a-secret-that-nobody-may-read";

function adminCallerOf(): CustomerCaller {
  const caller = testCallers["role-ADMIN"];
  if (caller?.kind !== "customer") throw new Error("the admin is a customer");
  return caller;
}

function reasonOf(error: unknown): string | undefined {
  return ConnectError.from(error).findDetails(ErrorInfoSchema)[0]?.reason;
}

/** Handlers that show what the listener does around them. */
function routes(router: ConnectRouter): void {
  router.service(IdentityService, {
    whoAmI: (_request, context) => {
      const caller = callerOf(context);
      return { callerId: "callerId" in caller ? caller.callerId : "", organizationName: requestIdOf(context) };
    },
  });
  router.service(InstanceService, {
    getInstance: () => {
      throw new Error(`password ${secret}`);
    },
    stopInstance: () => {
      throw new DomainError(ErrorReason.CONFLICT, "it moved", { retryAfterMs: 1_500, metadata: { version: "7" } });
    },
    async *watchInstances(_request, context) {
      yield create(WatchInstancesResponseSchema, { cursor: "first" });
      await new Promise((resolve) => context.signal.addEventListener("abort", resolve, { once: true }));
    },
  });
}

describe("the public listener", () => {
  test("speaks Connect, gRPC and gRPC-Web over both HTTP versions on one port", async () => {
    await using listener = await startTestListener(routes);
    for (const kind of transportKinds) {
      const client = createClient(IdentityService, listener.transport(kind, admin));
      const answer = await client.whoAmI({});
      assert.match(answer.callerId, /^usr_/, kind);
      const unknown = createClient(IdentityService, listener.transport(kind, "Bearer nobody"));
      await assert.rejects(unknown.whoAmI({}), (error) => reasonOf(error) === "TOKEN_INVALID", kind);
      const watch = createClient(InstanceService, listener.transport(kind, admin));
      for await (const message of watch.watchInstances({})) {
        assert.equal(message.cursor, "first", kind);
        break;
      }
    }
    const json = await sendPlain(listener, {
      path: "/clodei.v1.IdentityService/WhoAmI",
      headers: { "content-type": "application/json", authorization: admin },
      body: "{}",
    });
    assert.equal(json.status, 200);
    assert.match(json.body, /"callerId":"usr_/);
    assert.match(String(json.headers["strict-transport-security"]), /^max-age=\d{8}/);
    assert.match(String(json.headers["clodei-request-id"]), /^[0-9a-f-]{36}$/);
  });

  test("tells errors with reason, fields and delay, and keeps its own to the log", async () => {
    await using listener = await startTestListener(routes);
    for (const kind of transportKinds) {
      const client = createClient(InstanceService, listener.transport(kind, admin));
      const invalid = await rejection(
        client.createInstance({ spec: { image: "busybox", gpu: { model: "H100-SXM", count: 99 } } }),
      );
      assert.equal(invalid.code, Code.InvalidArgument, kind);
      const [violation] = invalid.findDetails(BadRequestSchema)[0]?.fieldViolations ?? [];
      assert.equal(violation?.field, "spec.gpu.count");
      assert.equal(violation?.reason, "uint32.lte");
      assert.match(violation?.description ?? "", /less than or equal to 16/);

      const conflict = await rejection(client.stopInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" }));
      assert.equal(conflict.code, Code.Aborted);
      const [info] = conflict.findDetails(ErrorInfoSchema);
      assert.equal(info?.reason, "CONFLICT");
      assert.equal(info?.domain, "clodei.com");
      assert.equal(info?.metadata["version"], "7");
      const [retry] = conflict.findDetails(RetryInfoSchema);
      assert.deepEqual([retry?.retryDelay?.seconds, retry?.retryDelay?.nanos], [1n, 500_000_000]);

      const internal = await rejection(client.getInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" }));
      assert.equal(internal.code, Code.Internal);
      assert.ok(!JSON.stringify(internal).includes(secret) && !internal.message.includes(secret));
      const requestId = internal.findDetails(ErrorInfoSchema)[0]?.metadata["requestId"] ?? "";
      assert.ok(
        listener.lines.some((line) => line.includes(requestId) && line.includes(secret)),
        "the log has its text",
      );
    }
  });

  test("tells an error that quotes a huge request as it tells any other", async () => {
    await using listener = await startTestListener(routes);
    const key = "é".repeat(500_000);
    for (const kind of transportKinds) {
      const client = createClient(InstanceService, listener.transport(kind, admin));
      const invalid = await rejection(client.createInstance({ spec: { image: "busybox", env: { [key]: "1" } } }));
      assert.deepEqual([invalid.code, reasonOf(invalid)], [Code.InvalidArgument, "INVALID_ARGUMENT"], kind);
      const [violation] = invalid.findDetails(BadRequestSchema)[0]?.fieldViolations ?? [];
      assert.match(violation?.field ?? "", /^spec\.env\["é+…$/u, kind);
      assert.match(invalid.rawMessage, /^spec\.env\["é+…$/u, kind);
    }
  });

  test("gives an error its reason and its bound also where the deadline passes before the body comes", async () => {
    await using listener = await startTestListener(routes);
    const body = JSON.stringify({ ["k".repeat(200_000)]: 1 });
    const frame = Buffer.concat([Buffer.alloc(5), Buffer.from(body)]);
    frame.writeUInt32BE(body.length, 1);
    const client = connectHttp2(listener.url, { ca: listener.caPem });
    const stream = client.request({
      ":method": "POST",
      ":path": "/clodei.v1.InstanceService/GetInstance",
      "content-type": "application/grpc+json",
      "grpc-timeout": "100m",
      te: "trailers",
      authorization: admin,
    });
    await sleep(300);
    stream.end(frame);
    // Alone, or behind headers that came before.
    const told = new Headers();
    const take = (headers: object): void => {
      for (const [name, value] of Object.entries(headers)) if (!name.startsWith(":")) told.set(name, String(value));
    };
    stream.once("response", take).once("trailers", take).resume();
    await once(stream, "close");
    client.close();
    const error = findTrailerError(told);
    assert.ok(error !== undefined);
    assert.equal(reasonOf(error), "INVALID_ARGUMENT");
    assert.ok(error.rawMessage.length > 500 && error.rawMessage.length <= 1_300, `${error.rawMessage.length}`);
    await sleep(50);
    assert.ok(listener.lines.some((line) => /GetInstance","code":"invalid_argument"/.test(line)));
  });

  test("logs each request with its id, method and code, and nothing that the customer sent", async () => {
    await using listener = await startTestListener(routes);
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    await rejection(
      client.createInstance({ spec: { image: "private/name", env: { PASSWORD: secret }, labels: { "a b": secret } } }),
    );
    await sendPlain(listener, { path: `/secret/${secret}`, headers: { authorization: `Bearer ${secret}` } });
    await sleep(50);
    const lines = listener.lines.map((line): Record<string, unknown> => JSON.parse(line) as Record<string, unknown>);
    const line = lines.find(({ method }) => method === "clodei.v1.InstanceService/CreateInstance");
    assert.match(String(line?.["requestId"]), /^[0-9a-f-]{36}$/);
    assert.equal(line?.["code"], "invalid_argument");
    assert.ok(!listener.lines.join("").includes(secret));
    assert.ok(!listener.lines.join("").includes("private/name"));
    assert.ok(!listener.lines.join("").includes("127.0.0.1"), "a network address is personal data");
  });

  test("says of a stream that its deadline passed, though its handler simply ends", async () => {
    await using listener = await startTestListener(routes);
    // Only in the header: a client that knows of it would give up by itself.
    const deadlines = { grpc: { "grpc-timeout": "300m" }, "connect-json": { "connect-timeout-ms": "300" } } as const;
    for (const kind of ["grpc", "connect-json"] as const) {
      const client = createClient(InstanceService, listener.transport(kind, admin));
      const cursors: string[] = [];
      const error = await rejection(
        (async () => {
          for await (const { cursor } of client.watchInstances({}, { headers: deadlines[kind] })) cursors.push(cursor);
        })(),
      );
      assert.deepEqual([error.code, reasonOf(error)], [Code.DeadlineExceeded, "DEADLINE_EXCEEDED"], kind);
      assert.deepEqual(cursors, ["first"], kind);
    }
    const logged = () =>
      listener.lines.filter((line) => /WatchInstances","code":"deadline_exceeded"/.test(line)).length;
    for (let n = 0; n < 500 && logged() < 2; n += 1) await sleep(10);
    assert.equal(logged(), 2);
  });

  test("refuses wrong credentials before it reads the body", async () => {
    await using listener = await startTestListener(routes);
    const startMs = performance.now();
    const answer = await sendPlain(listener, {
      path: "/clodei.v1.IdentityService/WhoAmI",
      headers: { "content-type": "application/json", authorization: "Bearer nobody", "content-length": "1000" },
      endless: true,
    });
    assert.equal(answer.status, 401);
    assert.match(answer.body, /TOKEN_INVALID/);
    assert.ok(performance.now() - startMs < 5_000);
  });

  test("refuses a message of more than 4 MiB, also one that unpacks to it", async () => {
    await using listener = await startTestListener(routes);
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    const large = { spec: { image: "busybox", env: { A: "x".repeat(4 * 1024 * 1024) } } };
    const refused = await rejection(client.createInstance(large));
    assert.deepEqual([refused.code, reasonOf(refused)], [Code.InvalidArgument, "INVALID_ARGUMENT"]);
    assert.match(refused.rawMessage, /larger than 4194304 bytes/);
    const { gzipSync } = await import("node:zlib");
    const body = gzipSync(Buffer.from(JSON.stringify(large)));
    assert.ok(body.length < 100_000);
    const answer = await new Promise<string>((resolve, reject) => {
      const session = connectHttp2(listener.url, { ca: listener.caPem });
      session.once("error", reject);
      const stream = session.request({
        [constants.HTTP2_HEADER_METHOD]: "POST",
        [constants.HTTP2_HEADER_PATH]: "/clodei.v1.InstanceService/CreateInstance",
        "content-type": "application/json",
        "content-encoding": "gzip",
        authorization: admin,
      });
      let text = "";
      stream.setEncoding("utf8");
      stream.on("data", (part: string) => (text += part));
      stream.once("end", () => {
        session.destroy();
        resolve(text);
      });
      stream.end(body);
    });
    assert.match(answer, /"invalid_argument".*larger than 4194304 bytes/);
  });

  test("accepts gzip and no other compression", async () => {
    await using listener = await startTestListener(routes);
    const send = (encoding: string) =>
      sendPlain(listener, {
        path: "/clodei.v1.IdentityService/WhoAmI",
        headers: { "content-type": "application/json", authorization: admin, "content-encoding": encoding },
        body: "{}",
      });
    assert.match((await send("br")).body, /unknown compression.*gzip/);
    assert.equal((await send("identity")).status, 200);
  });

  test("gives a reason also to errors that come before the handler and its interceptors", async () => {
    await using listener = await startTestListener(routes);
    const whoAmI = "/clodei.v1.IdentityService/WhoAmI";
    const json = { "content-type": "application/json", authorization: admin };
    const answers = {
      INVALID_ARGUMENT: await sendPlain(listener, { path: whoAmI, headers: json, body: "{" }),
      UNIMPLEMENTED: await sendPlain(listener, {
        path: whoAmI,
        headers: { ...json, "content-encoding": "br" },
        body: "{}",
      }),
      "UNIMPLEMENTED of a path": await sendPlain(listener, { path: "/no.Such/Method", headers: json, body: "{}" }),
    };
    for (const [name, { body, headers }] of Object.entries(answers)) {
      const told = JSON.parse(body) as { details: { type: string; debug: { reason: string; metadata: object } }[] };
      const { reason, metadata } = told.details[0]?.debug ?? {};
      assert.equal(reason, name.split(" ")[0], body);
      assert.deepEqual(metadata, { requestId: headers["clodei-request-id"] });
    }
    const large = { spec: { image: "busybox", env: { A: "x".repeat(4 * 1024 * 1024) } } };
    for (const kind of transportKinds) {
      const error = await rejection(
        createClient(InstanceService, listener.transport(kind, admin)).createInstance(large),
      );
      assert.deepEqual([error.code, reasonOf(error)], [Code.InvalidArgument, "INVALID_ARGUMENT"], kind);
    }
    const unknown = await rejection(createClient(NodeService, listener.transport("grpc", admin)).listNodes({}));
    assert.deepEqual([unknown.code, reasonOf(unknown)], [Code.Unimplemented, "UNIMPLEMENTED"]);
    await sleep(50);
    assert.ok(listener.lines.some((line) => /CreateInstance","code":"invalid_argument"/.test(line)));
    assert.ok(!listener.lines.some((line) => /"code":"http_[45]/.test(line)));
  });

  test("tells a client that sends no type of ours, or not by POST, what to send", async () => {
    await using listener = await startTestListener(routes);
    const [whoAmI, watch] = ["/clodei.v1.IdentityService/WhoAmI", "/clodei.v1.InstanceService/WatchInstances"];
    const form = "application/x-www-form-urlencoded";
    const cases = [
      [415, /Content-Type: application\/json/, { path: whoAmI, headers: {}, body: "" }],
      [415, /Content-Type: application\/json/, { path: whoAmI, headers: { "content-type": form }, body: "{}" }],
      [415, /must be a POST/, { method: "GET", path: "/clodei.v1.InstanceService/ListInstances" }],
      [415, /this method streams/, { path: watch, headers: { "content-type": "application/json" }, body: "{}" }],
      [
        405,
        /^GET cannot call this method: POST can$/,
        { method: "GET", path: "/clodei.v1.InstanceService/StopInstance" },
      ],
      [405, /^PUT cannot call this method/, { method: "PUT", path: watch, headers: {}, body: "{}" }],
    ] as const;
    for (const [status, words, request] of cases) {
      const answer = await sendPlain(listener, request);
      assert.equal(answer.status, status, answer.body);
      assert.equal(answer.headers["content-type"], "application/json");
      const told = JSON.parse(answer.body) as { code: string; message: string; details: { debug: object }[] };
      assert.equal(told.code, "invalid_argument");
      assert.match(told.message, words);
      const metadata = { requestId: answer.headers["clodei-request-id"] };
      assert.deepEqual(told.details[0]?.debug, { reason: "INVALID_ARGUMENT", domain: "clodei.com", metadata });
      if (status === 405) assert.match(String(answer.headers["allow"]), /POST/);
    }
  });

  test("refuses a field and an enum value that the schema does not know, in JSON, by name", async () => {
    await using listener = await startTestListener(routes);
    const headers = { "content-type": "application/json", authorization: admin };
    const path = "/clodei.v1.InstanceService/CreateInstance";
    const cases = [
      ["countries", "spec.location.countries", { image: "busybox", location: { countries: ["FR"] } }],
      ["RESTART_POLICY_SOMETIMES", "spec.restart_policy", { restartPolicy: "RESTART_POLICY_SOMETIMES" }],
      ["expected string", "spec.image", { image: 7 }],
    ] as const;
    for (const [name, field, spec] of cases) {
      const { status, body } = await sendPlain(listener, { path, headers, body: JSON.stringify({ spec }) });
      assert.equal(status, 400, body);
      assert.match(body, new RegExp(name));
      const { details } = JSON.parse(body) as { details: { debug: { fieldViolations?: { field: string }[] } }[] };
      assert.deepEqual(
        details.flatMap(({ debug }) => debug.fieldViolations ?? []).map((told) => told.field),
        [field],
      );
    }
  });

  test("limits how often one address and one caller may ask, and says how long to wait", async () => {
    await using byAddress = await startTestListener(routes, {
      addressLimiter: new RateLimiter({ perSecond: 0.5, burst: 2 }),
    });
    await using byCaller = await startTestListener(routes, {
      callerLimiter: new RateLimiter({ perSecond: 0.5, burst: 2 }),
    });
    for (const listener of [byAddress, byCaller]) {
      const client = createClient(IdentityService, listener.transport("grpc", admin));
      await client.whoAmI({});
      await client.whoAmI({});
      const error = await rejection(client.whoAmI({}));
      assert.equal(error.code, Code.ResourceExhausted);
      assert.equal(reasonOf(error), "RATE_LIMITED");
      const seconds = Number(error.findDetails(RetryInfoSchema)[0]?.retryDelay?.seconds);
      assert.ok(seconds >= 1 && seconds <= 2);
    }
    // Another caller has a bucket of its own.
    await createClient(IdentityService, byCaller.transport("grpc", "Bearer platform")).whoAmI({});
  });

  test("cuts a connection beyond those that its address may have, and serves other addresses", async () => {
    await using listener = await startTestListener(routes, { maxConnectionsPerAddress: 2 });
    const { port } = listener.listener;
    const open = (localAddress: string) => {
      const tcp = connectTcp({ host: "127.0.0.1", port, localAddress });
      const socket = connectTls({ socket: tcp, ca: listener.caPem, servername: "localhost" });
      const served = new Promise<boolean>((resolve) => {
        socket.once("secureConnect", () => resolve(true));
        socket.once("error", () => resolve(false));
        socket.once("close", () => resolve(false));
      });
      return { socket, served };
    };
    const [first, second] = [open("127.0.0.1"), open("127.0.0.1")];
    assert.deepEqual(await Promise.all([first.served, second.served]), [true, true]);
    assert.equal(await open("127.0.0.1").served, false);
    const other = open("127.0.0.2");
    assert.equal(await other.served, true);
    const { values } = await listener.metrics.refusedConnections.get();
    assert.equal(values[0]?.value, 1);
    first.socket.destroy();
    // The server learns of it a moment later.
    let again = open("127.0.0.1");
    while (!(await again.served)) again = open("127.0.0.1");
    for (const { socket } of [second, other, again]) socket.destroy();
  });

  test("lets the pages of configured origins read answers, and no others", async () => {
    await using listener = await startTestListener(routes);
    const path = "/clodei.v1.IdentityService/WhoAmI";
    const preflight = (origin: string) =>
      sendPlain(listener, {
        method: "OPTIONS",
        path,
        headers: { origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization" },
      });
    const allowed = await preflight("https://console.example");
    assert.equal(allowed.status, 204);
    assert.equal(allowed.headers["access-control-allow-origin"], "https://console.example");
    assert.match(String(allowed.headers["access-control-allow-headers"]), /Authorization/);
    assert.match(String(allowed.headers["access-control-allow-headers"]), /Connect-Protocol-Version/);
    assert.equal(allowed.headers["vary"], "origin");
    for (const origin of [
      "https://evil.example",
      "https://console.example.evil.example",
      "http://console.example",
      "null",
    ]) {
      assert.equal((await preflight(origin)).headers["access-control-allow-origin"], undefined, origin);
    }
    const answer = await sendPlain(listener, {
      path,
      headers: { origin: "https://console.example", "content-type": "application/json", authorization: admin },
      body: "{}",
    });
    assert.equal(answer.status, 200);
    assert.equal(answer.headers["access-control-allow-origin"], "https://console.example");
    assert.match(String(answer.headers["access-control-expose-headers"]), /Clodei-Request-Id/);
  });

  test("refuses an API key from a browser, also from an allowed origin, and never asks who it is", async () => {
    let asked = 0;
    await using listener = await startTestListener(routes, {
      authenticate: () => {
        asked += 1;
        return Promise.reject(new Error("asked"));
      },
    });
    for (const origin of ["https://console.example", "https://evil.example", listener.url, "null"]) {
      const answer = await sendPlain(listener, {
        path: "/clodei.v1.IdentityService/WhoAmI",
        headers: { origin, "content-type": "application/json", authorization: "bearer  clodei_sk_x_y_z" },
        body: "{}",
      });
      assert.equal(answer.status, 403, origin);
      assert.match(answer.body, /API_KEY_FROM_BROWSER/);
    }
    assert.equal(asked, 0);
  });

  test("answers what is malformed, and lives on", async () => {
    await using listener = await startTestListener(routes);
    const raw = (text: string): Promise<string> =>
      new Promise((resolve, reject) => {
        const socket = connectTls({
          host: "127.0.0.1",
          port: listener.listener.port,
          ca: listener.caPem,
          servername: "localhost",
        });
        let answer = "";
        socket.setEncoding("utf8");
        socket.on("data", (part: string) => (answer += part));
        socket.once("close", () => resolve(answer));
        socket.once("error", reject);
        socket.once("secureConnect", () => socket.write(text));
        setTimeout(() => socket.destroy(), 500);
      });
    const path = "/clodei.v1.IdentityService/WhoAmI";
    const head = "Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
    assert.match(await raw(`POST ${path} HTTP/1.0\r\n${head}`), /^HTTP\/1\.1 400/);
    assert.match(await raw(`POST ${path} HTTP/1.1\r\nHost: [\r\n${head}`), /^HTTP\/1\.1 400/);
    assert.match(await raw("nonsense\r\n\r\n"), /^HTTP\/1\.1 400/);
    const unknown = await sendPlain(listener, {
      path: "/clodei.v1.IdentityService/Nope",
      headers: { "content-type": "application/json" },
    });
    assert.equal(unknown.status, 404);
    assert.match(unknown.body, /"unimplemented"/);
    const grpc = await sendPlain(listener, {
      path: "/no.Such/Method",
      headers: { "content-type": "application/grpc" },
    });
    assert.equal(grpc.headers["grpc-status"], "12");
    // Plain text on the TLS port.
    await new Promise<void>((resolve) => {
      const socket = connectTcp(listener.listener.port, "127.0.0.1", () => socket.write("GET / HTTP/1.1\r\n\r\n"));
      socket.once("close", () => resolve());
      socket.on("error", () => undefined);
      socket.resume();
    });
    await createClient(IdentityService, listener.transport("grpc", admin)).whoAmI({});
  });

  test("speaks TLS 1.2 and 1.3 and nothing older, and takes a new certificate without a restart", async () => {
    await using listener = await startTestListener(routes);
    const handshake = (options: { minVersion?: "TLSv1.1"; maxVersion?: "TLSv1.1" | "TLSv1.2" }) =>
      new Promise<{ protocol: string | null; serial: string }>((resolve, reject) => {
        const socket = connectTls(
          {
            host: "127.0.0.1",
            port: listener.listener.port,
            ca: listener.caPem,
            servername: "localhost",
            // An older OpenSSL level, so that it is the server that refuses.
            ciphers: "DEFAULT@SECLEVEL=0",
            ...options,
          },
          () => {
            resolve({ protocol: socket.getProtocol(), serial: socket.getPeerCertificate().serialNumber });
            socket.destroy();
          },
        );
        socket.once("error", reject);
      });
    assert.equal((await handshake({})).protocol, "TLSv1.3");
    assert.equal((await handshake({ maxVersion: "TLSv1.2" })).protocol, "TLSv1.2");
    await assert.rejects(
      handshake({ minVersion: "TLSv1.1", maxVersion: "TLSv1.1" }),
      /protocol version|alert|ECONNRESET/i,
    );
    const before = (await handshake({})).serial;
    listener.listener.setCertificate(await listener.authority.issueListenerCertificate(["localhost"], new Date()));
    const after = await handshake({});
    assert.notEqual(after.serial, before);
    await assert.rejects(
      handshake({ minVersion: "TLSv1.1", maxVersion: "TLSv1.1" }),
      /protocol version|alert|ECONNRESET/i,
    );
  });

  test("ends an open stream within a second of its caller's access, and keeps it while the database cannot be asked", async () => {
    let holds = true;
    let broken = true;
    await using listener = await startTestListener(routes, {
      stillHolds: () => (broken ? Promise.reject(new Error("no database")) : Promise.resolve(holds)),
    });
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    let open = true;
    const ended = rejection(
      (async () => {
        for await (const _message of client.watchInstances({}));
      })(),
    ).finally(() => (open = false));
    await sleep(400);
    assert.ok(open);
    broken = false;
    await sleep(300);
    assert.ok(open);
    holds = false;
    const startMs = performance.now();
    assert.equal(reasonOf(await ended), "PERMISSION_DENIED");
    assert.ok(performance.now() - startMs < 1_000);
  });

  test("holds none of the messages that an open stream has sent", async () => {
    const sent: WeakRef<object>[] = [];
    await using listener = await startTestListener(
      (router) =>
        router.service(InstanceService, {
          async *watchInstances(_request, context) {
            for (let n = 0; n < 200; n += 1) {
              const message = create(WatchInstancesResponseSchema, { cursor: String(n) });
              sent.push(new WeakRef(message));
              yield message;
            }
            await new Promise((resolve) => context.signal.addEventListener("abort", resolve, { once: true }));
          },
        }),
      { recheckMs: 60_000 },
    );
    const stop = new AbortController();
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    let received = 0;
    const reading = rejection(
      (async () => {
        for await (const _message of client.watchInstances({}, { signal: stop.signal })) received += 1;
      })(),
    );
    while (received < 200) await sleep(10);
    setFlagsFromString("--expose-gc");
    (runInNewContext("gc") as () => void)();
    await sleep(10);
    const held = sent.filter((message) => message.deref() !== undefined).length;
    assert.ok(held < 20, `${held} of 200 messages are still in memory`);
    const openStreams = async (): Promise<unknown> => (await listener.metrics.openStreams.get()).values[0]?.value;
    assert.equal(await openStreams(), 1);
    stop.abort();
    await reading;
    for (let n = 0; n < 100 && (await openStreams()) !== 0; n += 1) await sleep(10);
    assert.equal(await openStreams(), 0);
    const durations = await listener.metrics.durationSeconds.get();
    assert.ok(!durations.values.some(({ labels }) => labels.method === "WatchInstances"));
  });

  test("does not take the end of one token for the end of another of the same person", async () => {
    const expireTimes = [new Date(0), new Date(Date.now() + 60_000)] as const;
    await using listener = await startTestListener(routes, {
      authenticate: (headers) =>
        Promise.resolve({
          ...adminCallerOf(),
          tokenExpireTime: expireTimes[Number(headers.get("x-token"))] ?? new Date(),
        }),
      stillHolds: (caller) =>
        Promise.resolve("tokenExpireTime" in caller && (caller.tokenExpireTime ?? new Date(0)) > new Date()),
    });
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    const watch = async (token: string, signal?: AbortSignal): Promise<void> => {
      const options = { headers: { "x-token": token }, ...(signal === undefined ? {} : { signal }) };
      for await (const _message of client.watchInstances({}, options));
    };
    const stop = new AbortController();
    const [old, renewed] = [rejection(watch("0")), rejection(watch("1", stop.signal))];
    assert.equal(reasonOf(await old), "PERMISSION_DENIED");
    await sleep(300);
    stop.abort();
    assert.equal((await renewed).code, Code.Canceled);
  });

  test("a drain ends streams as unavailable, lets a request finish, and closes its port", async () => {
    const release = Promise.withResolvers<void>();
    const entered = Promise.withResolvers<void>();
    await using listener = await startTestListener((router) => {
      routes(router);
      router.rpc(InstanceService.method.deleteInstance, async () => {
        entered.resolve();
        await release.promise;
        return {};
      });
    });
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    const http1 = createClient(IdentityService, listener.transport("connect-http1", admin));
    await http1.whoAmI({}); // an idle connection that is kept alive
    const watch = rejection(
      (async () => {
        for await (const _message of client.watchInstances({}));
      })(),
    );
    const slow = client.deleteInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" });
    await entered.promise;
    const startMs = performance.now();
    const closed = listener.listener.close(20_000);
    const error = await watch;
    assert.equal(error.code, Code.Unavailable);
    assert.ok(error.findDetails(RetryInfoSchema).length === 1);
    release.resolve();
    await slow;
    await closed;
    assert.ok(performance.now() - startMs < 5_000, "it does not wait for the whole time");
    await assert.rejects(sendPlain(listener, { path: "/" }), /ECONNREFUSED/);
  });

  test("a drain cuts what has not finished in time", async () => {
    const entered = Promise.withResolvers<void>();
    await using listener = await startTestListener((router) => {
      router.rpc(InstanceService.method.deleteInstance, async () => {
        entered.resolve();
        await sleep(3_000);
        return {};
      });
    });
    const client = createClient(InstanceService, listener.transport("grpc", admin));
    const slow = rejection(client.deleteInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" }));
    await entered.promise;
    const startMs = performance.now();
    await listener.listener.close(100);
    assert.ok(performance.now() - startMs < 2_000);
    await slow;
  });
});

describe("health and reflection", () => {
  const services = [InstanceService, IdentityService, Health, ServerReflection, AlphaReflection];
  const start = (state: HealthState): Promise<TestListener> => {
    const reflection = createReflection(services);
    return startTestListener(
      (router) => {
        router.service(Health, healthHandlers(state, services));
        router.service(ServerReflection, reflection.v1);
        router.service(AlphaReflection, reflection.v1alpha);
        router.service(InstanceService, {});
        router.service(IdentityService, {});
      },
      // The database is lost: nobody can be authenticated, and both must answer all the same.
      { authenticate: () => Promise.reject(new Error("no database")) },
    );
  };

  test("each service serves or not, and all of them flip together", async () => {
    const state = new HealthState();
    await using listener = await start(state);
    const client = createClient(Health, listener.transport("grpc", "Bearer whoever"));
    const all = async (): Promise<Set<Serving>> => {
      const { statuses } = await client.list({});
      assert.deepEqual(Object.keys(statuses).toSorted(), ["", ...services.map(({ typeName }) => typeName)].toSorted());
      const checked = await Promise.all(Object.keys(statuses).map((service) => client.check({ service })));
      return new Set([...Object.values(statuses), ...checked].map(({ status }) => status));
    };
    assert.deepEqual(await all(), new Set([Serving.NOT_SERVING]));
    state.set("starting", false);
    assert.deepEqual(await all(), new Set([Serving.SERVING]));
    assert.equal((await rejection(client.check({ service: "no.Such" }))).code, Code.NotFound);

    const seen: Serving[] = [];
    const unknown: Serving[] = [];
    const stop = new AbortController();
    const watch = (service: string, into: Serving[]): Promise<unknown> =>
      (async () => {
        for await (const { status } of client.watch({ service }, { signal: stop.signal })) into.push(status);
      })().catch(() => undefined);
    const watches = [watch(InstanceService.typeName, seen), watch("no.Such", unknown)];
    const until = async (expected: Serving[]): Promise<void> => {
      for (let n = 0; n < 200 && seen.length < expected.length; n += 1) await sleep(10);
      assert.deepEqual(seen, expected);
    };
    await until([Serving.SERVING]);
    state.set("database", true);
    await until([Serving.SERVING, Serving.NOT_SERVING]);
    assert.deepEqual(await all(), new Set([Serving.NOT_SERVING]));
    state.set("draining", true);
    state.set("database", false);
    assert.deepEqual(await all(), new Set([Serving.NOT_SERVING]), "two reasons need two ends");
    state.set("draining", false);
    await until([Serving.SERVING, Serving.NOT_SERVING, Serving.SERVING]);
    assert.deepEqual(unknown, [Serving.SERVICE_UNKNOWN]);
    stop.abort();
    await Promise.all(watches);
  });

  test("a watch of health sees the drain before it ends", async () => {
    const state = new HealthState();
    state.set("starting", false);
    await using listener = await start(state);
    const client = createClient(Health, listener.transport("grpc"));
    const seen: Serving[] = [];
    const ended = rejection(
      (async () => {
        for await (const { status } of client.watch({ service: "" })) seen.push(status);
      })(),
    );
    for (let n = 0; n < 200 && seen.length === 0; n += 1) await sleep(10);
    state.set("draining", true);
    await listener.listener.close(5_000);
    assert.equal((await ended).code, Code.Unavailable);
    assert.deepEqual(seen, [Serving.SERVING, Serving.NOT_SERVING]);
  });

  test("buf lists and describes the services over every protocol, and knows messages by both versions", async () => {
    await using listener = await start(new HealthState());
    const folder = await mkdtemp(join(tmpdir(), "clodei-buf-"));
    try {
      const caFile = join(folder, "ca.pem");
      await writeFile(caFile, listener.caPem);
      const buf = async (...args: string[]): Promise<string> => {
        const { stdout } = await promisify(execFile)(bufPath(), ["curl", "--cacert", caFile, ...args], {
          env: { HOME: folder, PATH: "/usr/bin:/bin" },
        });
        return stdout;
      };
      for (const version of ["grpc-v1", "grpc-v1alpha"]) {
        const list = await buf("--reflect-protocol", version, "--list-services", listener.url);
        assert.deepEqual(
          list.trim().split("\n").toSorted(),
          services.map(({ typeName }) => typeName).toSorted(),
          version,
        );
      }
      const methods = await buf("--list-methods", listener.url);
      assert.match(methods, /clodei\.v1\.InstanceService\/CreateInstance/);
      for (const protocol of ["connect", "grpc", "grpcweb"]) {
        const checked = await buf(
          "--protocol",
          protocol,
          "-d",
          '{"service":""}',
          `${listener.url}/grpc.health.v1.Health/Check`,
        );
        assert.match(checked, /NOT_SERVING/, protocol);
      }
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });

  test("reflection answers by file, symbol, part of a symbol and extension, and says what it does not know", async () => {
    await using listener = await start(new HealthState());
    for (const service of [ServerReflection, AlphaReflection] as const) {
      const client = createClient(service as typeof ServerReflection, listener.transport("grpc"));
      const ask = async (messageRequest: {
        case: "fileByFilename" | "fileContainingSymbol" | "allExtensionNumbersOfType";
        value: string;
      }) => {
        async function* one() {
          yield { messageRequest };
        }
        for await (const { messageResponse } of client.serverReflectionInfo(one())) return messageResponse;
        throw new Error("no answer");
      };
      const files = async (request: Parameters<typeof ask>[0]): Promise<number> => {
        const answer = await ask(request);
        return answer.case === "fileDescriptorResponse" ? answer.value.fileDescriptorProto.length : 0;
      };
      assert.ok((await files({ case: "fileByFilename", value: "clodei/v1/instance_service.proto" })) > 5);
      assert.ok((await files({ case: "fileByFilename", value: "google/protobuf/timestamp.proto" })) === 1);
      for (const symbol of [
        "clodei.v1.InstanceService",
        "clodei.v1.InstanceService.CreateInstance",
        "clodei.v1.InstanceSpec",
        "clodei.v1.InstanceSpec.image",
        "clodei.v1.InstanceState",
        "clodei.options.v1.authorization",
        // No method names these; who gets an error wants to read it.
        "google.rpc.Status",
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
        "clodei.v1.ErrorReason",
      ]) {
        assert.ok((await files({ case: "fileContainingSymbol", value: symbol })) >= 1, symbol);
      }
      for (const symbol of ["clodei.v1.Nope", "clodei.v1.InstanceSpec.nope", "", "."]) {
        assert.equal((await ask({ case: "fileContainingSymbol", value: symbol })).case, "errorResponse", symbol);
      }
      const numbers = await ask({ case: "allExtensionNumbersOfType", value: "google.protobuf.MethodOptions" });
      assert.ok(numbers.case === "allExtensionNumbersResponse" && numbers.value.extensionNumber.includes(50_901));
    }
  });
});

async function rejection(promise: Promise<unknown>): Promise<ConnectError> {
  try {
    await promise;
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new Error("it did not fail");
}

/** The program itself: its wrapper needs a Node in the path. */
function bufPath(): string {
  const name = `@bufbuild/buf-${process.platform}-${process.arch}`;
  return new URL(import.meta.resolve(`${name}/bin/buf`)).pathname;
}
