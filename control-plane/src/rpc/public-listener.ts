// The public listener: Connect, gRPC, gRPC-Web and JSON over HTTP/1.1 and HTTP/2, on one port. The limits here were
// measured: the defaults of the libraries are about 4 GiB a message and no bound on streams.
import { randomUUID } from "node:crypto";
import type { ConnectRouter } from "@connectrpc/connect";
import { errorToJson } from "@connectrpc/connect/protocol-connect";
import { setTrailerStatus } from "@connectrpc/connect/protocol-grpc";
import { compressionGzip, connectNodeAdapter } from "@connectrpc/connect-node";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import { AddressSlots } from "./address-slots.ts";
import { anonymousCaller } from "./caller.ts";
import { createRequestValues, type RequestRecord } from "./context.ts";
import { corsHeaders, isPreflight } from "./cors.ts";
import { codeName, readMaxBytes, toConnectError } from "./errors.ts";
import { createGate, createInterceptors, drainError, type PipelineOptions } from "./interceptors.ts";
import type { Metrics } from "./metrics.ts";
import {
  onceOf,
  type PublicServer,
  type PublicServerOptions,
  type Request,
  type Response,
  startPublicServer,
} from "./public-server.ts";
import { limitBodyTime } from "./request-body.ts";

/** A method as the library serves it, in all of its protocols. */
type ServedMethod = ConnectRouter["handlers"][number];

/** What the public listener needs. */
export type PublicListenerOptions = Omit<PipelineOptions, "shutdownSignal"> &
  PublicServerOptions & {
    /** Origins of browsers that may read answers: "https://console.example". */
    readonly corsOrigins: readonly string[];
    readonly routes: (router: ConnectRouter) => void;
    readonly metrics: Metrics;
    /** Time for a request's headers and body, in milliseconds; 30 s where absent. */
    readonly requestTimeoutMs?: number;
  };

/** A public listener that listens. Its end ends streams, too. */
export type PublicListener = PublicServer;

const defaultRequestTimeoutMs = 30_000;
/** Reflection is the client's own stream, for which nobody needs credentials: a tool that explores comes back. */
const reflectionTimeoutMs = 5 * 60_000;
/** Two years, as browsers' preload lists ask. */
const strictTransportSecurity = "max-age=63072000; includeSubDomains";

/** Opens the public listener. */
export async function startPublicListener(options: PublicListenerOptions): Promise<PublicListener> {
  const shutdown = new AbortController();
  const server = await startPublicServer(options, createRequestHandler(options, shutdown.signal));
  return {
    ...server,
    async close(drainMs) {
      shutdown.abort(toConnectError(drainError(), ""));
      await server.close(drainMs);
    },
  };
}

// --- requests

function createRequestHandler(options: PublicListenerOptions, shutdownSignal: AbortSignal) {
  const pipeline: PipelineOptions = { ...options, shutdownSignal };
  const records = new WeakMap<Request, RequestRecord>();
  const newRecord = createRecorder(options);
  const recordFor = (request: Request): RequestRecord => {
    const record = records.get(request);
    if (record === undefined) throw new Error("a request came past the listener");
    return record;
  };
  const served = new Map<string, ServedMethod>();
  const serve = connectNodeAdapter({
    routes: (router) => {
      options.routes(router);
      for (const handler of router.handlers) served.set(handler.requestPath, handler);
    },
    acceptCompression: [compressionGzip],
    readMaxBytes,
    // A mistyped field in JSON is an error: a location constraint that is dropped in silence runs work elsewhere.
    jsonOptions: { ignoreUnknownFields: false },
    shutdownSignal,
    requestGate: createGate(pipeline),
    interceptors: createInterceptors(pipeline),
    contextValues: (request) => createRequestValues(recordFor(request)),
  });
  const allowedOrigins = new Set(options.corsOrigins);
  return (request: Request, response: Response): void => {
    const record = newRecord(request, response);
    records.set(request, record);
    logAccess(request, response, record, options);
    setHeaders(response, { "strict-transport-security": strictTransportSecurity });
    limitTime(request, response, record, options.requestTimeoutMs ?? defaultRequestTimeoutMs);
    const cors = {
      method: request.method,
      origin: request.headers.origin,
      requestedMethod: headerOf(request, "access-control-request-method"),
    };
    setHeaders(response, corsHeaders(cors, allowedOrigins));
    if (isPreflight(cors)) {
      response.statusCode = 204;
      response.end();
      return;
    }
    const method = served.get(request.url?.split("?", 1)[0] ?? "");
    const refusal = method === undefined ? unknownPath : refusalOf(request, method);
    if (refusal !== undefined) {
      if (method !== undefined) record.method = `${method.service.typeName}/${method.method.name}`;
      refuse(request, response, record, refusal);
      return;
    }
    try {
      serve(request, response);
    } catch {
      // The adapter throws where a request names no host, or one that is none.
      response.statusCode = 400;
      response.end();
    }
  };
}

/**
 * Begins the records of requests. Callers who share a proxy's connections cannot be told apart by connections: each
 * address has as many requests open as it would have connections.
 */
function createRecorder(options: PublicListenerOptions): (request: Request, response: Response) => RequestRecord {
  const { trustedProxies } = options;
  const slots = new AddressSlots(options.maxConnectionsPerAddress);
  return (request, response) => {
    const peer = request.socket.remoteAddress ?? "";
    const address = trustedProxies.origin(peer, headerOf(request, "x-forwarded-for"));
    const giveBack = trustedProxies.has(peer) ? slots.take(address) : () => undefined;
    if (giveBack !== undefined) onceOf(response, "close", giveBack);
    return {
      requestId: randomUUID(),
      address,
      hasTooManyOpen: giveBack === undefined,
      caller: anonymousCaller,
      method: undefined,
      isStream: false,
      code: undefined,
    };
  };
}

function limitTime(request: Request, response: Response, record: RequestRecord, timeoutMs: number): void {
  const isReflection = request.url?.startsWith("/grpc.reflection.") === true;
  const limitMs = isReflection ? reflectionTimeoutMs : timeoutMs;
  limitBodyTime(request, response, limitMs, () => {
    const text = `the request did not come whole within ${limitMs / 1_000} s: send it again`;
    const error = toConnectError(new DomainError(ErrorReason.DEADLINE_EXCEEDED, text), record.requestId);
    record.code ??= codeName(error.code);
    return error;
  });
}

function logAccess(request: Request, response: Response, record: RequestRecord, options: PublicListenerOptions): void {
  const startMs = performance.now();
  onceOf(response, "close", () => {
    const durationMs = Math.round(performance.now() - startMs);
    const [service = "", method = ""] = record.method?.split("/") ?? [];
    // What is not ours to serve (a preflight, a path that names no method's protocol) has only an HTTP status.
    const code = record.code ?? (response.statusCode === 200 ? "canceled" : `http_${response.statusCode}`);
    if (record.method !== undefined) {
      options.metrics.requests.inc({ service, method, code });
      if (!record.isStream) options.metrics.durationSeconds.observe({ service, method }, durationMs / 1_000);
    }
    options.log.info(
      {
        requestId: record.requestId,
        // Of a path that is none of ours nothing is logged: it can hold anything.
        method: record.method ?? "unknown",
        code,
        durationMs,
        http: request.httpVersion,
        caller: record.caller.kind,
        ...("callerId" in record.caller ? { callerId: record.caller.callerId } : {}),
      },
      "request",
    );
  });
}

// --- what no protocol can serve: a client that nobody wrote for us, such as plain curl, learns here what to send

const noSuchMethod =
  "there is no such method: POST to /clodei.v1.SERVICE/METHOD; reflection lists those that there are " +
  "(buf curl --list-methods https://HOST:PORT, grpcurl HOST:PORT list)";
const needsContentType =
  "the request must be a POST with the header Content-Type: application/json and a body of JSON, {} at least " +
  "(curl -H 'Content-Type: application/json' -d '{}' …); gRPC, gRPC-Web and Connect have types of their own";
const needsStreamProtocol =
  "this method streams, which plain JSON cannot: call it by gRPC, gRPC-Web or Connect (buf curl, grpcurl, an SDK)";

type Refusal = { readonly status: number; readonly error: DomainError; readonly headers?: Record<string, string> };

const unknownPath: Refusal = { status: 404, error: new DomainError(ErrorReason.UNIMPLEMENTED, noSuchMethod) };

/** Why the method cannot be called like this; the library would answer with a status and no word. */
function refusalOf(request: Request, served: ServedMethod): Refusal | undefined {
  if (!served.allowedMethods.includes(request.method ?? "")) {
    const text = `${request.method} cannot call this method: ${served.allowedMethods.join(" and ")} can`;
    const headers = { allow: served.allowedMethods.join(", ") };
    return { status: 405, error: new DomainError(ErrorReason.INVALID_ARGUMENT, text), headers };
  }
  if (isReadable(request, served)) return undefined;
  const text = served.method.methodKind === "unary" ? needsContentType : needsStreamProtocol;
  return { status: 415, error: new DomainError(ErrorReason.INVALID_ARGUMENT, text) };
}

/** Whether the request says how its message is written: a GET in its query, any other in its type. */
function isReadable(request: Request, served: ServedMethod): boolean {
  if (request.method !== "GET") return served.supportedContentType(headerOf(request, "content-type") ?? "");
  const query = new URLSearchParams(request.url?.split("?", 2)[1]);
  return ["json", "proto"].includes(query.get("encoding") ?? "");
}

/** Told in the protocol of the request. */
function refuse(request: Request, response: Response, record: RequestRecord, refusal: Refusal): void {
  const type = headerOf(request, "content-type") ?? "";
  const error = toConnectError(refusal.error, record.requestId);
  record.code = codeName(error.code);
  response.setHeader("clodei-request-id", record.requestId);
  if (type.startsWith("application/grpc")) {
    setHeaders(response, { "content-type": type, ...Object.fromEntries(setTrailerStatus(new Headers(), error)) });
    response.statusCode = 200;
    response.end();
    return;
  }
  setHeaders(response, { "content-type": "application/json", ...refusal.headers });
  response.statusCode = refusal.status;
  response.end(JSON.stringify(errorToJson(error, undefined)));
}

function setHeaders(response: Response, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
}

function headerOf(request: Request, name: string): string | undefined {
  const value = request.headers[name];
  return Array.isArray(value) ? value[0] : value;
}
