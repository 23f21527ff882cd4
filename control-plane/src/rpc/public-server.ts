// The connections of the public listener: over TLS, or, behind proxies that end TLS, in plain text from these alone.
// Either way one port speaks HTTP/1.1 and HTTP/2.
import { once, type EventEmitter } from "node:events";
import { createServer as createHttp1Server } from "node:http";
import { createSecureServer, createServer as createHttp2Server, type ServerHttp2Session } from "node:http2";
import { type AddressInfo, createServer as createTcpServer, type Server, type Socket } from "node:net";
import type { TLSSocket } from "node:tls";
import type { connectNodeAdapter } from "@connectrpc/connect-node";
import { readFirstBytes, type Verdict } from "../platform/first-bytes.ts";
import type { Log } from "../platform/log.ts";
import { AddressSlots } from "./address-slots.ts";
import type { Metrics } from "./metrics.ts";
import type { TrustedProxies } from "./trusted-proxies.ts";

/** Serves a request of either version of HTTP. */
export type RequestHandler = ReturnType<typeof connectNodeAdapter>;
export type Request = Parameters<RequestHandler>[0];
export type Response = Parameters<RequestHandler>[1];

/** Requests of HTTP/1.1 and of HTTP/2 have the same events, in types that TypeScript cannot unite. */
export function onceOf(emitter: EventEmitter, event: string, listener: () => void): void {
  emitter.once(event, listener);
}

/** A certificate and its key, as PEM. */
export type ListenerTls = { readonly certificateChainPem: string; readonly privateKeyPem: string };

/** Where it listens, and whom it serves. */
export type PublicServerOptions = {
  readonly host: string;
  /** 0: any free one. */
  readonly port: number;
  /** Undefined: plain text, to trusted proxies alone. */
  readonly tls: ListenerTls | undefined;
  readonly trustedProxies: TrustedProxies;
  /** Of a trusted proxy there may be more: its callers' requests are counted one by one. */
  readonly maxConnectionsPerAddress: number;
  readonly metrics: Pick<Metrics, "publicConnections" | "refusedConnections">;
  readonly log: Log;
};

/** A server that listens. */
export type PublicServer = {
  readonly port: number;
  /** Takes a new certificate for the connections to come. Without TLS there is none. */
  setCertificate(tls: ListenerTls): void;
  /** Takes no more connections, and gives requests the time given to finish. */
  close(drainMs: number): Promise<void>;
};

const maxConcurrentStreams = 100;
/** With the default of 10 MB, 400 stalled answers of 64 KiB on one connection killed the session. */
const maxSessionMemoryMb = 64;
const maxConnections = 10_000;
/** For the handshake of TLS, or for the first bytes of plain text. */
const handshakeTimeoutMs = 10_000;
const idleConnectionMs = 10 * 60_000;
const maxHeaderBytes = 32 * 1024;

const http2Options = {
  settings: { maxConcurrentStreams, maxHeaderListSize: maxHeaderBytes },
  maxSessionMemory: maxSessionMemoryMb,
} as const;

/** A proxy asks again on a connection that it has: one that we end at that moment costs a caller its request. */
const http1Options = { keepAliveTimeout: idleConnectionMs } as const;

/** Opens the server. */
export async function startPublicServer(options: PublicServerOptions, handler: RequestHandler): Promise<PublicServer> {
  const connections = new Connections(options);
  const secure = options.tls === undefined ? undefined : createTlsServer(options.tls, options, connections, handler);
  const server: Server = secure ?? createPlainServer(options, connections, handler);
  server.maxConnections = maxConnections;
  server.listen(options.port, options.host);
  await once(server, "listening");
  server.on("error", (error) => options.log.error({ err: error }, "the public listener failed"));
  return {
    // A TCP server that listens has an address with a port.
    port: (server.address() as AddressInfo).port,
    setCertificate: (tls) => secure?.setSecureContext({ ...tlsOf(tls), minVersion: "TLSv1.2" }),
    async close(drainMs) {
      const closed = new Promise<void>((resolve) => {
        server.close(() => resolve());
      });
      const timer = setTimeout(() => connections.destroyAll(), drainMs);
      connections.drain();
      await closed;
      clearTimeout(timer);
    },
  };
}

function tlsOf(tls: ListenerTls): { cert: string; key: string } {
  return { cert: tls.certificateChainPem, key: tls.privateKeyPem };
}

// --- TLS

function createTlsServer(
  tls: ListenerTls,
  options: PublicServerOptions,
  connections: Connections,
  handler: RequestHandler,
) {
  const server = createSecureServer(
    {
      ...tlsOf(tls),
      ...http2Options,
      allowHTTP1: true,
      http1Options,
      minVersion: "TLSv1.2",
      handshakeTimeout: handshakeTimeoutMs,
    },
    handler,
  );
  server.on("connection", (socket: Socket) => connections.admit(socket));
  server.on("session", (session) => connections.addSession(session));
  server.on("secureConnection", (socket: TLSSocket) => {
    if (socket.alpnProtocol !== "h2") connections.addHttp1(socket);
  });
  server.on("request", (request, response) => connections.countRequest(request, response));
  server.on("tlsClientError", (error) => options.log.debug({ err: error }, "a TLS handshake failed"));
  return server;
}

// --- plain text

function createPlainServer(options: PublicServerOptions, connections: Connections, handler: RequestHandler): Server {
  const { trustedProxies, metrics, log } = options;
  const http2Server = createHttp2Server(http2Options, handler);
  const http1Server = createHttp1Server(http1Options, handler);
  http2Server.on("session", (session) => connections.addSession(session));
  for (const server of [http2Server, http1Server]) {
    server.on("request", (request: Request, response: Response) => connections.countRequest(request, response));
  }
  const serve = (socket: Socket, protocol: "http1" | "http2"): void => {
    if (protocol === "http2") {
      http2Server.emit("connection", socket);
      return;
    }
    connections.addHttp1(socket);
    http1Server.emit("connection", socket);
    socket.resume();
  };
  return createTcpServer({ noDelay: true }, (socket) => {
    if (!trustedProxies.has(socket.remoteAddress ?? "")) {
      metrics.refusedConnections.inc();
      socket.destroy();
      return;
    }
    if (!connections.admit(socket)) return;
    readFirstBytes(socket, handshakeTimeoutMs, protocolOf).then(
      (protocol) => serve(socket, protocol),
      (error: unknown) => {
        log.debug({ err: error }, "a connection said nothing");
        socket.destroy();
      },
    );
  });
}

/** How HTTP/2 begins where TLS did not agree on it. No method of HTTP/1.1 has this name. */
const prefaceStart = "PRI ";

function protocolOf(bytes: Buffer): Verdict<"http1" | "http2"> | undefined {
  const start = bytes.toString("latin1", 0, prefaceStart.length);
  if (start.length < prefaceStart.length && prefaceStart.startsWith(start)) return undefined;
  return { value: start === prefaceStart ? "http2" : "http1", takenBytes: 0 };
}

// --- connections

/** The open connections, and how they end. */
class Connections {
  readonly #options: PublicServerOptions;
  readonly #slots: AddressSlots;
  readonly #sockets = new Set<Socket>();
  readonly #sessions = new Set<ServerHttp2Session>();
  /** Sockets of HTTP/1.1 and how many requests are open on them. */
  readonly #http1 = new Map<Socket, number>();
  #isDraining = false;

  constructor(options: PublicServerOptions) {
    this.#options = options;
    this.#slots = new AddressSlots(options.maxConnectionsPerAddress);
  }

  /** Counts a connection until it closes. @returns false where its address has as many as it may: it was cut. */
  admit(socket: Socket): boolean {
    const { metrics, trustedProxies } = this.#options;
    const address = socket.remoteAddress ?? "";
    if (!trustedProxies.has(address)) {
      const giveBack = this.#slots.take(address);
      if (giveBack === undefined) {
        metrics.refusedConnections.inc();
        socket.destroy();
        return false;
      }
      socket.once("close", giveBack);
    }
    this.#sockets.add(socket);
    metrics.publicConnections.set(this.#sockets.size);
    socket.once("close", () => {
      this.#sockets.delete(socket);
      metrics.publicConnections.set(this.#sockets.size);
    });
    return true;
  }

  addSession(session: ServerHttp2Session): void {
    this.#sessions.add(session);
    session.setTimeout(idleConnectionMs, () => session.close());
    session.once("close", () => this.#sessions.delete(session));
    session.on("error", (error) => this.#options.log.debug({ err: error }, "a connection failed"));
    if (this.#isDraining) session.close();
  }

  addHttp1(socket: Socket): void {
    this.#http1.set(socket, 0);
    socket.setTimeout(idleConnectionMs, () => socket.destroy());
    socket.once("close", () => this.#http1.delete(socket));
  }

  /** Notes that a connection of HTTP/1.1 is busy until the response has ended. */
  countRequest({ socket }: Request, response: EventEmitter): void {
    if (!this.#http1.has(socket)) return;
    this.#http1.set(socket, (this.#http1.get(socket) ?? 0) + 1);
    // A stream may have nothing to say for long. After the response Node waits for the next request, for its own time.
    socket.setTimeout(0);
    response.once("close", () => {
      if (this.#http1.has(socket)) this.#http1.set(socket, (this.#http1.get(socket) ?? 1) - 1);
      if (this.#isDraining && this.#http1.get(socket) === 0) socket.end();
    });
  }

  /** Ends what waits for its next request, at once, and what is busy as soon as it is not. */
  drain(): void {
    this.#isDraining = true;
    for (const session of this.#sessions) session.close();
    for (const [socket, requests] of this.#http1) if (requests === 0) socket.end();
  }

  destroyAll(): void {
    for (const session of this.#sessions) session.destroy();
    for (const socket of this.#sockets) socket.destroy();
  }
}
