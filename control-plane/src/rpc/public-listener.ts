// The public listener: Connect, gRPC, gRPC-Web and JSON over HTTP/1.1 and HTTP/2, on one TLS port. The limits here
// were measured: the defaults of the libraries are about 4 GiB a message and no bound on streams.
import { randomUUID } from "node:crypto";
import { once, type EventEmitter } from "node:events";
import { createSecureServer, type Http2SecureServer, type ServerHttp2Session } from "node:http2";
import type { AddressInfo, Socket } from "node:net";
import type { TLSSocket } from "node:tls";
import type { ConnectRouter } from "@connectrpc/connect";
import { errorToJson } from "@connectrpc/connect/protocol-connect";
import { setTrailerStatus } from "@connectrpc/connect/protocol-grpc";
import { compressionGzip, connectNodeAdapter } from "@connectrpc/connect-node";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import { AddressConnections } from "./address-connections.ts";
import { anonymousCaller } from "./caller.ts";
import { createRequestValues, type RequestRecord } from "./context.ts";
import { corsHeaders, isPreflight } from "./cors.ts";
import { codeName, readMaxBytes, toConnectError } from "./errors.ts";
import { createGate, createInterceptors, drainError, type PipelineOptions } from "./interceptors.ts";
import type { Metrics } from "./metrics.ts";

type Handler = ReturnType<typeof connectNodeAdapter>;
type Request = Parameters<Handler>[0];
type Response = Parameters<Handler>[1];
/** A method as the library serves it, in all of its protocols. */
type ServedMethod = ConnectRouter["handlers"][number];

/** A certificate and its key, as PEM. */
export type ListenerTls = { readonly certificateChainPem: string; readonly privateKeyPem: string };

/** What the public listener needs. */
export type PublicListenerOptions = Omit<PipelineOptions, "shutdownSignal"> & {
  readonly host: string;
  /** 0: any free one. */
  readonly port: number;
  readonly maxConnectionsPerAddress: number;
  readonly tls: ListenerTls;
  /** Origins of browsers that may read answers: "https://console.example". */
  readonly corsOrigins: readonly string[];
  readonly routes: (router: ConnectRouter) => void;
  readonly metrics: Metrics;
};

/** A public listener that listens. */
export type PublicListener = {
  readonly port: number;
  /** Takes a new certificate for the connections to come. */
  setCertificate(tls: ListenerTls): void;
  /** Ends streams, takes no more connections, and gives requests the time given to finish. */
  close(drainMs: number): Promise<void>;
};

const maxConcurrentStreams = 100;
/** With the default of 10 MB, 400 stalled answers of 64 KiB on one connection killed the session. */
const maxSessionMemoryMb = 64;
const maxConnections = 10_000;
const handshakeTimeoutMs = 10_000;
/** Time for a request's headers and body. */
const requestTimeoutMs = 30_000;
/** Reflection is the client's own stream, for which nobody needs credentials: a tool that explores comes back. */
const reflectionTimeoutMs = 5 * 60_000;
const idleConnectionMs = 10 * 60_000;
const maxHeaderBytes = 32 * 1024;
/** Two years, as browsers' preload lists ask. */
const strictTransportSecurity = "max-age=63072000; includeSubDomains";

/** Opens the public listener. */
export async function startPublicListener(options: PublicListenerOptions): Promise<PublicListener> {
  const shutdown = new AbortController();
  const server = createSecureServer(
    {
      ...tlsOf(options.tls),
      allowHTTP1: true,
      minVersion: "TLSv1.2",
      handshakeTimeout: handshakeTimeoutMs,
      settings: { maxConcurrentStreams, maxHeaderListSize: maxHeaderBytes },
      maxSessionMemory: maxSessionMemoryMb,
    },
    createRequestHandler(options, shutdown.signal),
  );
  server.maxConnections = maxConnections;
  const connections = trackConnections(server, options);
  server.listen(options.port, options.host);
  await once(server, "listening");
  server.on("error", (error) => options.log.error({ err: error }, "the public listener failed"));
  const { port } = server.address() as AddressInfo;
  return {
    port,
    setCertificate: (tls) => server.setSecureContext({ ...tlsOf(tls), minVersion: "TLSv1.2" }),
    async close(drainMs) {
      shutdown.abort(toConnectError(drainError(), ""));
      const closed = new Promise<void>((resolve) => {
        server.close(() => resolve());
      });
      for (const session of connections.sessions) session.close();
      const timer = setTimeout(() => connections.destroyAll(), drainMs);
      connections.endIdle();
      await closed;
      clearTimeout(timer);
    },
  };
}

function tlsOf(tls: ListenerTls): { cert: string; key: string } {
  return { cert: tls.certificateChainPem, key: tls.privateKeyPem };
}

// --- requests

function createRequestHandler(options: PublicListenerOptions, shutdownSignal: AbortSignal) {
  const pipeline: PipelineOptions = { ...options, shutdownSignal };
  const records = new WeakMap<Request, RequestRecord>();
  const newRecord = (request: Request): RequestRecord => ({
    requestId: randomUUID(),
    address: request.socket.remoteAddress ?? "",
    caller: anonymousCaller,
    method: undefined,
    isStream: false,
    code: undefined,
  });
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
    contextValues: (request) => createRequestValues(records.get(request) ?? newRecord(request)),
  });
  const allowedOrigins = new Set(options.corsOrigins);
  return (request: Request, response: Response): void => {
    const record = newRecord(request);
    records.set(request, record);
    logAccess(request, response, record, options);
    setHeaders(response, { "strict-transport-security": strictTransportSecurity });
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
    limitBodyTime(request, response);
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

/** A body that trickles in holds memory and a stream. Only gRPC's own content type can carry a client's stream. */
function limitBodyTime(request: Request, response: Response): void {
  const isReflection = request.url?.startsWith("/grpc.reflection.") === true;
  const timer = setTimeout(() => request.destroy(), isReflection ? reflectionTimeoutMs : requestTimeoutMs);
  const stop = (): void => clearTimeout(timer);
  onceOf(request, "end", stop);
  onceOf(response, "close", stop);
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

/** Requests of HTTP/1.1 and of HTTP/2 have the same events, in types that TypeScript cannot unite. */
function onceOf(emitter: EventEmitter, event: string, listener: () => void): void {
  emitter.once(event, listener);
}

// --- connections

type Connections = {
  readonly sessions: ReadonlySet<ServerHttp2Session>;
  /** Ends connections of HTTP/1.1 that wait for their next request. */
  endIdle(): void;
  destroyAll(): void;
};

function trackConnections(server: Http2SecureServer, options: PublicListenerOptions): Connections {
  const sockets = new Set<Socket>();
  const sessions = new Set<ServerHttp2Session>();
  /** Sockets of HTTP/1.1 and how many requests are open on them. */
  const http1 = new Map<Socket, number>();
  const byAddress = new AddressConnections(options.maxConnectionsPerAddress);
  server.on("connection", (socket: Socket) => {
    if (!byAddress.admit(socket)) {
      options.metrics.refusedConnections.inc();
      return;
    }
    sockets.add(socket);
    options.metrics.publicConnections.set(sockets.size);
    socket.once("close", () => {
      sockets.delete(socket);
      options.metrics.publicConnections.set(sockets.size);
    });
  });
  server.on("session", (session) => {
    sessions.add(session);
    session.setTimeout(idleConnectionMs, () => session.close());
    session.once("close", () => sessions.delete(session));
    session.on("error", (error) => options.log.debug({ err: error }, "a connection failed"));
  });
  server.on("secureConnection", (socket: TLSSocket) => {
    if (socket.alpnProtocol === "h2") return;
    http1.set(socket, 0);
    socket.setTimeout(idleConnectionMs, () => socket.destroy());
    socket.once("close", () => http1.delete(socket));
  });
  server.on("request", (request, response) => {
    const { socket } = request;
    if (!http1.has(socket)) return;
    http1.set(socket, (http1.get(socket) ?? 0) + 1);
    onceOf(response, "close", () => {
      if (http1.has(socket)) http1.set(socket, (http1.get(socket) ?? 1) - 1);
      if (!server.listening && http1.get(socket) === 0) socket.end();
    });
  });
  server.on("tlsClientError", (error) => options.log.debug({ err: error }, "a TLS handshake failed"));
  return {
    sessions,
    endIdle() {
      for (const [socket, requests] of http1) if (requests === 0) socket.end();
    },
    destroyAll() {
      for (const session of sessions) session.destroy();
      for (const socket of sockets) socket.destroy();
    },
  };
}
