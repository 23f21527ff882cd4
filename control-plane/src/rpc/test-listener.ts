// A real public listener for tests: TLS, gate and interceptors as in production, with handlers of the test's choice
// and callers that the credential itself describes.
import assert from "node:assert/strict";
import { Agent as HttpsAgent, request as httpsRequest } from "node:https";
import { setTimeout as sleep } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { ConnectError, type ConnectRouter, type Transport } from "@connectrpc/connect";
import { createConnectTransport, createGrpcTransport, createGrpcWebTransport } from "@connectrpc/connect-node";
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService, WatchInstancesResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { newId } from "@clodei/proto/ids";
import { Authority } from "../nodes/authority.ts";
import { DomainError } from "../platform/errors.ts";
import { createLog } from "../platform/log.ts";
import { anonymousCaller, type Caller } from "./caller.ts";
import { callerOf, requestIdOf } from "./context.ts";
import { createMetrics, type Metrics } from "./metrics.ts";
import { type PublicListener, type PublicListenerOptions, startPublicListener } from "./public-listener.ts";
import { RateLimiter } from "./rate-limit.ts";
import { TrustedProxies } from "./trusted-proxies.ts";
import { RequestValidator } from "./validation.ts";

const logTimeoutMs = 10_000;

export type TestListener = AsyncDisposable & {
  readonly listener: PublicListener;
  readonly url: string;
  readonly caPem: string;
  /** The lines of the log. */
  readonly lines: readonly string[];
  /** Waits until the log has at least so many lines of a kind (one): a request is logged after its answer. */
  untilLogged(pattern: RegExp, count?: number): Promise<void>;
  readonly authority: Authority;
  readonly metrics: Metrics;
  transport(kind: TransportKind, authorization?: string): Transport;
};

export const transportKinds = ["connect-json", "connect-http1", "grpc", "grpc-web", "grpc-web-http1"] as const;
export type TransportKind = (typeof transportKinds)[number];

/** The credential of the caller that may do all that a customer may. */
export const adminCredential = "Bearer role-ADMIN";

/** The callers that tests can be, each by the credential "Bearer NAME". */
export const testCallers: Readonly<Record<string, Caller>> = {
  ...Object.fromEntries(
    Object.entries(Role)
      .filter(([name]) => name !== "UNSPECIFIED")
      .map(([name, role]) => [`role-${name}`, customerWith([role])]),
  ),
  "no-role": customerWith([]),
  unverified: { ...customerWith([Role.ADMIN]), emailVerified: false },
  user: { kind: "user", callerId: newId("usr"), emailVerified: true },
  platform: { kind: "platform", callerId: newId("opr"), credential: "token" },
  node: { kind: "node", nodeId: newId("nod"), certificateSerial: "01" },
  replica: { kind: "replica", replicaId: "other" },
};

function customerWith(roles: readonly Role[]): Extract<Caller, { kind: "customer" }> {
  return {
    kind: "customer",
    organizationId: newId("org"),
    organizationName: "test",
    callerId: newId("usr"),
    credential: "token",
    roles: new Set(roles),
    emailVerified: true,
  };
}

/** Starts a public listener on a free port of loopback. */
export async function startTestListener(
  routes: (router: ConnectRouter) => void,
  options: Partial<PublicListenerOptions> = {},
): Promise<TestListener> {
  const now = new Date();
  const { certificatePem, privateKeyPem } = await Authority.generate(now);
  const authority = await Authority.fromPem(certificatePem, privateKeyPem, "test.clodei.com", now);
  const lines: string[] = [];
  const metrics = createMetrics();
  const listener = await startPublicListener({
    host: "127.0.0.1",
    port: 0,
    maxConnectionsPerAddress: 256,
    trustedProxies: new TrustedProxies([]),
    tls: await authority.issueListenerCertificate(["localhost", "127.0.0.1"], now),
    corsOrigins: ["https://console.example"],
    routes,
    authenticate: (headers) => Promise.resolve(callerBy(headers.get("authorization") ?? "")),
    stillHolds: () => Promise.resolve(true),
    addressLimiter: new RateLimiter({ perSecond: 1e6, burst: 1e6 }),
    callerLimiter: new RateLimiter({ perSecond: 1e6, burst: 1e6 }),
    validator: new RequestValidator(),
    recheckMs: 100,
    metrics,
    log: createLog("info", { write: (line) => lines.push(line) }),
    ...options,
  });
  const isPlain = "tls" in options && options.tls === undefined;
  const url = `${isPlain ? "http" : "https"}://127.0.0.1:${listener.port}`;
  return {
    listener,
    url,
    caPem: certificatePem,
    lines,
    untilLogged: async (pattern, count = 1) => {
      const logged = (): number => lines.filter((line) => pattern.test(line)).length;
      const deadlineMs = performance.now() + logTimeoutMs;
      while (logged() < count && performance.now() < deadlineMs) await sleep(10);
      assert.ok(logged() >= count, `${logged()} lines like ${pattern}`);
    },
    authority,
    metrics,
    transport: (kind, authorization) => createTransport(kind, url, certificatePem, authorization),
    [Symbol.asyncDispose]: () => listener.close(0),
  };
}

/** Stands in an error of ours, which nobody may be told, and in what customers send, which no log may hold. */
export const secret = "a-secret-that-nobody-may-read";

/** Handlers that show what the listener does around them: one answers, two fail, one streams. */
export function showingRoutes(router: ConnectRouter): void {
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

/** The error that a call ended with. */
export async function rejection(promise: Promise<unknown>): Promise<ConnectError> {
  try {
    await promise;
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new Error("it did not fail");
}

/** The reason that the details of an error give. */
export function reasonOf(error: unknown): string | undefined {
  return ConnectError.from(error).findDetails(ErrorInfoSchema)[0]?.reason;
}

function callerBy(authorization: string): Caller {
  if (authorization === "") return anonymousCaller;
  const caller = testCallers[authorization.replace(/^Bearer /, "")];
  if (caller === undefined) throw new DomainError(ErrorReason.TOKEN_INVALID, "no such test caller");
  return caller;
}

function createTransport(
  kind: TransportKind,
  baseUrl: string,
  ca: string,
  authorization: string | undefined,
): Transport {
  const common = {
    baseUrl,
    nodeOptions: { ca },
    interceptors: [
      (next: Parameters<NonNullable<Parameters<typeof createGrpcTransport>[0]["interceptors"]>[number]>[0]) =>
        (request: Parameters<typeof next>[0]) => {
          if (authorization !== undefined) request.header.set("authorization", authorization);
          return next(request);
        },
    ],
  };
  switch (kind) {
    case "connect-json":
      return createConnectTransport({ ...common, httpVersion: "2", useBinaryFormat: false });
    case "connect-http1":
      return createConnectTransport({ ...common, httpVersion: "1.1", useBinaryFormat: true });
    case "grpc":
      return createGrpcTransport(common);
    case "grpc-web":
      return createGrpcWebTransport({ ...common, httpVersion: "2" });
    case "grpc-web-http1":
      return createGrpcWebTransport({ ...common, httpVersion: "1.1" });
  }
}

/** What came back on a plain HTTP/1.1 request. */
export type PlainResponse = {
  readonly status: number;
  readonly headers: Readonly<Record<string, string | readonly string[] | undefined>>;
  readonly body: string;
};

/** A plain HTTP/1.1 request, with a body or without an end. */
export function sendPlain(
  test: Pick<TestListener, "url" | "caPem">,
  request: {
    readonly method?: string;
    readonly path: string;
    readonly headers?: Record<string, string>;
    readonly body?: string;
    /** Promise a body and never send it. */
    readonly endless?: boolean;
  },
): Promise<PlainResponse> {
  const { promise, resolve, reject } = Promise.withResolvers<PlainResponse>();
  const agent = new HttpsAgent({ keepAlive: false });
  const outgoing = httpsRequest(
    `${test.url}${request.path}`,
    { method: request.method ?? "POST", ca: test.caPem, agent, headers: request.headers ?? {} },
    (response) => {
      let body = "";
      response.setEncoding("utf8");
      response.on("data", (text: string) => (body += text));
      response.once("end", () => {
        resolve({ status: response.statusCode ?? 0, headers: response.headers, body });
        outgoing.destroy();
      });
    },
  );
  outgoing.once("error", reject);
  if (request.endless === true) outgoing.write("{");
  else outgoing.end(request.body ?? "");
  return promise;
}
