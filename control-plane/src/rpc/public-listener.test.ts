import assert from "node:assert/strict";
import { connect as connectTcp } from "node:net";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectTls } from "node:tls";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { create } from "@bufbuild/protobuf";
import { Code, createClient } from "@connectrpc/connect";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService, WatchInstancesResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { RetryInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import type { CustomerCaller } from "./caller.ts";
import { RateLimiter } from "./rate-limit.ts";
import {
  adminCredential,
  reasonOf,
  rejection,
  secret,
  sendPlain,
  showingRoutes,
  startTestListener,
  testCallers,
  transportKinds,
} from "./test-listener.ts";

function adminCallerOf(): CustomerCaller {
  const caller = testCallers["role-ADMIN"];
  if (caller?.kind !== "customer") throw new Error("the admin is a customer");
  return caller;
}

describe("the public listener", { timeout: 120_000 }, () => {
  test("speaks Connect, gRPC and gRPC-Web over both HTTP versions on one port", async () => {
    await using listener = await startTestListener(showingRoutes);
    for (const kind of transportKinds) {
      const client = createClient(IdentityService, listener.transport(kind, adminCredential));
      const answer = await client.whoAmI({});
      assert.match(answer.callerId, /^usr_/, kind);
      const unknown = createClient(IdentityService, listener.transport(kind, "Bearer nobody"));
      await assert.rejects(unknown.whoAmI({}), (error) => reasonOf(error) === "TOKEN_INVALID", kind);
      const watch = createClient(InstanceService, listener.transport(kind, adminCredential));
      for await (const message of watch.watchInstances({})) {
        assert.equal(message.cursor, "first", kind);
        break;
      }
    }
    const json = await sendPlain(listener, {
      path: "/clodei.v1.IdentityService/WhoAmI",
      headers: { "content-type": "application/json", authorization: adminCredential },
      body: "{}",
    });
    assert.equal(json.status, 200);
    assert.match(json.body, /"callerId":"usr_/);
    assert.match(String(json.headers["strict-transport-security"]), /^max-age=\d{8}/);
    assert.match(String(json.headers["clodei-request-id"]), /^[0-9a-f-]{36}$/);
  });

  test("logs each request with its id, method and code, and nothing that the customer sent", async () => {
    await using listener = await startTestListener(showingRoutes);
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
    await rejection(
      client.createInstance({ spec: { image: "private/name", env: { PASSWORD: secret }, labels: { "a b": secret } } }),
    );
    await sendPlain(listener, { path: `/secret/${secret}`, headers: { authorization: `Bearer ${secret}` } });
    await listener.untilLogged(/CreateInstance","code"/);
    await listener.untilLogged(/"method":"unknown"/);
    const lines = listener.lines.map((line): Record<string, unknown> => JSON.parse(line) as Record<string, unknown>);
    const line = lines.find(({ method }) => method === "clodei.v1.InstanceService/CreateInstance");
    assert.match(String(line?.["requestId"]), /^[0-9a-f-]{36}$/);
    assert.equal(line?.["code"], "invalid_argument");
    assert.ok(!listener.lines.join("").includes(secret));
    assert.ok(!listener.lines.join("").includes("private/name"));
    assert.ok(!listener.lines.join("").includes("127.0.0.1"), "a network address is personal data");
  });

  test("refuses wrong credentials before it reads the body", async () => {
    await using listener = await startTestListener(showingRoutes);
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

  test("accepts gzip and no other compression", async () => {
    await using listener = await startTestListener(showingRoutes);
    const send = (encoding: string) =>
      sendPlain(listener, {
        path: "/clodei.v1.IdentityService/WhoAmI",
        headers: { "content-type": "application/json", authorization: adminCredential, "content-encoding": encoding },
        body: "{}",
      });
    assert.match((await send("br")).body, /unknown compression.*gzip/);
    assert.equal((await send("identity")).status, 200);
  });

  test("limits how often one address and one caller may ask, and says how long to wait", async () => {
    await using byAddress = await startTestListener(showingRoutes, {
      addressLimiter: new RateLimiter({ perSecond: 0.01, burst: 2 }),
    });
    await using byCaller = await startTestListener(showingRoutes, {
      callerLimiter: new RateLimiter({ perSecond: 0.01, burst: 2 }),
    });
    for (const listener of [byAddress, byCaller]) {
      const client = createClient(IdentityService, listener.transport("grpc", adminCredential));
      await client.whoAmI({});
      await client.whoAmI({});
      const error = await rejection(client.whoAmI({}));
      assert.equal(error.code, Code.ResourceExhausted);
      assert.equal(reasonOf(error), "RATE_LIMITED");
      const seconds = Number(error.findDetails(RetryInfoSchema)[0]?.retryDelay?.seconds);
      assert.ok(seconds >= 1 && seconds <= 100, `${seconds} s`);
    }
    // Another caller has a bucket of its own.
    await createClient(IdentityService, byCaller.transport("grpc", "Bearer platform")).whoAmI({});
  });

  test("cuts a connection beyond those that its address may have, and serves other addresses", async () => {
    await using listener = await startTestListener(showingRoutes, { maxConnectionsPerAddress: 2 });
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
    await using listener = await startTestListener(showingRoutes);
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
      headers: {
        origin: "https://console.example",
        "content-type": "application/json",
        authorization: adminCredential,
      },
      body: "{}",
    });
    assert.equal(answer.status, 200);
    assert.equal(answer.headers["access-control-allow-origin"], "https://console.example");
    assert.match(String(answer.headers["access-control-expose-headers"]), /Clodei-Request-Id/);
  });

  test("refuses an API key from a browser, also from an allowed origin, and never asks who it is", async () => {
    let asked = 0;
    await using listener = await startTestListener(showingRoutes, {
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
    await using listener = await startTestListener(showingRoutes);
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
    await createClient(IdentityService, listener.transport("grpc", adminCredential)).whoAmI({});
  });

  test("speaks TLS 1.2 and 1.3 and nothing older, and takes a new certificate without a restart", async () => {
    await using listener = await startTestListener(showingRoutes);
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

  test("ends an open stream with its caller's access, and keeps it while the database cannot be asked", async () => {
    let holds = true;
    let broken = true;
    await using listener = await startTestListener(showingRoutes, {
      stillHolds: () => (broken ? Promise.reject(new Error("no database")) : Promise.resolve(holds)),
    });
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
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
    assert.equal(reasonOf(await ended), "PERMISSION_DENIED");
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
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
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
    await using listener = await startTestListener(showingRoutes, {
      authenticate: (headers) =>
        Promise.resolve({
          ...adminCallerOf(),
          tokenExpireTime: expireTimes[Number(headers.get("x-token"))] ?? new Date(),
        }),
      stillHolds: (caller) =>
        Promise.resolve("tokenExpireTime" in caller && (caller.tokenExpireTime ?? new Date(0)) > new Date()),
    });
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
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
      showingRoutes(router);
      router.rpc(InstanceService.method.deleteInstance, async () => {
        entered.resolve();
        await release.promise;
        return {};
      });
    });
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
    const http1 = createClient(IdentityService, listener.transport("connect-http1", adminCredential));
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
        return await new Promise<never>(() => {});
      });
    });
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
    const endless = rejection(client.deleteInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" }));
    await entered.promise;
    await listener.listener.close(100);
    await endless;
  });
});
