/**
 * A server for tests of the client: real HTTP/2 over real TLS, with whatever methods a test writes. It is no
 * control plane; the client's work with the real one is tested by the whole-system tests.
 */
import "reflect-metadata";
import { type Http2SecureServer, createSecureServer, type ServerHttp2Session } from "node:http2";
import type { AddressInfo, Socket } from "node:net";
import { BasicConstraintsExtension, SubjectAlternativeNameExtension, X509CertificateGenerator } from "@peculiar/x509";
import { type Code, ConnectError, type ConnectRouter, type Interceptor, type ServiceImpl } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { formatApiKey } from "@clodei/proto/api-key";
import { newSecret } from "@clodei/proto/secret";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { type ClientOptions, type ClodeiClient, createClient } from "./client.ts";
import type { Reason } from "./errors.ts";

/** A request as it arrived. */
export type ArrivedRequest = { readonly method: string; readonly message: unknown; readonly header: Headers };

/** The server, and a client that trusts it. */
export type ServerForClientTests = AsyncDisposable & {
  readonly endpoint: string;
  readonly ca: string;
  readonly apiKey: string;
  /** Unary requests, in order of arrival. */
  readonly requests: readonly ArrivedRequest[];
  client(options?: Partial<ClientOptions>): ClodeiClient;
  /** Destroys every connection without a word, as a cut cable or a killed process does. */
  cutConnections(): void;
  /** Ends every connection in order (GOAWAY), as a draining process does. */
  drainConnections(): void;
};

/** Starts a server on a free port of loopback. */
export async function startServerForClientTests(
  routes: (router: ConnectRouter) => void,
): Promise<ServerForClientTests> {
  const { certificate, key } = await makeCertificate();
  const requests: ArrivedRequest[] = [];
  const record: Interceptor = (next) => async (request) => {
    const message = request.stream ? undefined : request.message;
    requests.push({ method: request.method.name, message, header: new Headers(request.header) });
    return await next(request);
  };
  const server = createSecureServer(
    // The control plane's own limit.
    { cert: certificate, key, settings: { maxConcurrentStreams: 100 } },
    connectNodeAdapter({ routes, interceptors: [record] }),
  );
  const { sessions, sockets } = trackConnections(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const endpoint = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const apiKey = formatApiKey({ id: newId("key"), secret: newSecret() });
  const clients: ClodeiClient[] = [];
  const cutConnections = () => sockets.forEach((socket) => socket.destroy());
  return {
    endpoint,
    ca: certificate,
    apiKey,
    requests,
    client(options = {}) {
      const credentials = options.token === undefined ? { apiKey } : {};
      const retry = { baseDelayMs: 1, maxDelayMs: 10 };
      const client = createClient({ endpoint, ca: certificate, retry, ...credentials, ...options });
      clients.push(client);
      return client;
    },
    cutConnections,
    drainConnections: () => sessions.forEach((session) => session.close()),
    async [Symbol.asyncDispose]() {
      for (const client of clients) client.close();
      cutConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** Routes for the service that most tests are about. */
export function instances(
  implementation: Partial<ServiceImpl<typeof InstanceService>>,
): (router: ConnectRouter) => void {
  return (router) => void router.service(InstanceService, implementation);
}

/** Waits for the end of a request. */
export async function ended(signal: AbortSignal): Promise<void> {
  await new Promise<void>((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener("abort", () => resolve());
  });
}

/** The first items, and then the loop is left. */
export async function take<T>(count: number, iterable: AsyncIterable<T>): Promise<T[]> {
  const items: T[] = [];
  for await (const item of iterable) if (items.push(item) === count) break;
  return items;
}

/** An error as the control plane sends it. */
export function errorWith(
  code: Code,
  reason: Reason,
  details: {
    retryAfterMs?: number;
    fields?: Record<string, string>;
    message?: string;
    metadata?: Record<string, string>;
  } = {},
): ConnectError {
  const { retryAfterMs, fields, message = "no", metadata = {} } = details;
  const error = new ConnectError(message, code);
  error.details.push({
    desc: ErrorInfoSchema,
    value: { reason, domain: "clodei.com", metadata: { requestId: "r-1", ...metadata } },
  });
  if (retryAfterMs !== undefined) {
    error.details.push({ desc: RetryInfoSchema, value: { retryDelay: durationFromMs(retryAfterMs) } });
  }
  if (fields !== undefined) {
    const fieldViolations = Object.entries(fields).map(([field, description]) => ({
      field,
      description,
      reason: "string.pattern",
    }));
    error.details.push({ desc: BadRequestSchema, value: { fieldViolations } });
  }
  return error;
}

function trackConnections(server: Http2SecureServer): { sessions: Set<ServerHttp2Session>; sockets: Set<Socket> } {
  const sessions = new Set<ServerHttp2Session>();
  const sockets = new Set<Socket>();
  server.on("session", (session) => {
    sessions.add(session);
    session.on("close", () => sessions.delete(session));
    // A cut connection is what some tests are about.
    session.on("error", () => undefined);
  });
  server.on("secureConnection", (socket: Socket) => {
    sockets.add(socket);
    socket.on("close", () => sockets.delete(socket));
    socket.on("error", () => undefined);
  });
  return { sessions, sockets };
}

async function makeCertificate(): Promise<{ certificate: string; key: string }> {
  const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
  const keys = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  const certificate = await X509CertificateGenerator.createSelfSigned({
    name: "CN=server for client tests",
    keys,
    signingAlgorithm: algorithm,
    notAfter: new Date(Date.now() + 60 * 60 * 1000),
    extensions: [
      new BasicConstraintsExtension(true, undefined, true),
      new SubjectAlternativeNameExtension([{ type: "ip", value: "127.0.0.1" }]),
    ],
  });
  const pkcs8 = Buffer.from(await crypto.subtle.exportKey("pkcs8", keys.privateKey)).toString("base64");
  return {
    certificate: certificate.toString("pem"),
    key: `-----BEGIN PRIVATE KEY-----\n${pkcs8}\n-----END PRIVATE KEY-----\n`,
  };
}
