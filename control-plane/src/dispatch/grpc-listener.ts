// A gRPC listener that knows its clients by their certificates: what the node listener and the replica listener have in
// common. It owns connections and TLS; what is said on them is its service's.
import type { Http2SecureServer, ServerHttp2Stream } from "node:http2";
import { type ConnectionInjector, Server, ServerInterceptingCall, type ServerInterceptor } from "@grpc/grpc-js";
import type { DescService } from "@bufbuild/protobuf";
import type { FreshCertificate } from "../rpc/listener-certificate.ts";
import { type ConnectionRefusal, Connections, type ProxyProtocol } from "./connections.ts";
import { ListenerCredentials } from "./credentials.ts";
import { addGrpcService, type GrpcHandlers } from "./grpc-adapter.ts";
import { createMessageCheck } from "./incoming.ts";

/** What a listener is made of. */
export type GrpcListenerOptions<S extends DescService> = {
  readonly service: S;
  readonly handlers: GrpcHandlers<S>;
  /** The listener's own. */
  readonly certificate: FreshCertificate;
  /** PEM of the CA of its clients. */
  readonly clientCaPem: string;
  readonly maxMessageBytes: number;
  readonly maxStreamsPerConnection: number;
  readonly maxConnections: number;
  readonly maxConnectionsPerAddress: number;
  readonly proxyProtocol: ProxyProtocol;
  readonly onRefused: (why: ConnectionRefusal) => void;
};

/** Agents have their session on their connection, and replicas open theirs when they want something. */
const idleConnectionMs = 60_000;

/**
 * Lets no handler of a server stream be called for a request that was answered already, because what followed its message
 * was refused. Such a handler is told of no end, and waits for its first write for good. By itself grpc-js calls it all
 * the same; where there is any interceptor, it drops what comes after the end of a call.
 */
const dropAnswered: ServerInterceptor = (_method, call) => new ServerInterceptingCall(call);

/** "host:port", as it is written for addresses of both kinds. */
export function endpointOf(host: string, port: number): string {
  return `${host.includes(":") ? `[${host}]` : host}:${port}`;
}

/** Serves one service. */
export class GrpcListener {
  readonly #server: Server;
  readonly #credentials: ListenerCredentials;
  readonly #clientCaPem: string;
  readonly #injector: ConnectionInjector;
  readonly #connections: Connections;
  #port = 0;

  private constructor(
    server: Server,
    credentials: ListenerCredentials,
    clientCaPem: string,
    connections: (injector: ConnectionInjector) => Connections,
  ) {
    this.#server = server;
    this.#credentials = credentials;
    this.#clientCaPem = clientCaPem;
    this.#injector = server.createConnectionInjector(credentials);
    bearCanceledRequests(server);
    this.#connections = connections(this.#injector);
  }

  /** Listens. Leaves nothing behind where it cannot. */
  static async start<S extends DescService>(
    address: { readonly host: string; readonly port: number },
    options: GrpcListenerOptions<S>,
  ): Promise<GrpcListener> {
    const { service, handlers, clientCaPem } = options;
    const server = new Server({
      "grpc.max_receive_message_length": options.maxMessageBytes,
      // A whole desired set may pass 4 MiB; what an agent cannot take, it refuses itself.
      "grpc.max_send_message_length": -1,
      "grpc.max_concurrent_streams": options.maxStreamsPerConnection,
      // No pings: a session that is not heard ends with its lease, and pinging thousands of agents costs CPU.
      "grpc.max_connection_idle_ms": idleConnectionMs,
      // Its bookkeeping costs memory for every connection, and nothing reads it.
      "grpc.enable_channelz": 0,
      // Each call would pay for it: only where there is something to mend.
      ...(service.methods.some((method) => method.methodKind === "server_streaming") && {
        interceptors: [dropAnswered],
      }),
    });
    addGrpcService(server, service, handlers, createMessageCheck(service.methods.map(({ input }) => input)));
    const listener = new GrpcListener(
      server,
      new ListenerCredentials({ ...options.certificate, clientCaPem }),
      clientCaPem,
      (injector) => new Connections({ ...options, injector }),
    );
    try {
      listener.#port = await listener.#connections.listen(address.host, address.port);
    } catch (error) {
      listener.#injector.destroy();
      server.forceShutdown();
      throw error;
    }
    return listener;
  }

  /** Chosen by the system where 0 was asked for. */
  get port(): number {
    return this.#port;
  }

  /** New connections see the new certificate; those that stand go on. */
  renew(certificate: FreshCertificate): void {
    this.#credentials.renew({ ...certificate, clientCaPem: this.#clientCaPem });
  }

  /** Cuts the connection with this "address:port". */
  cut(address: string): void {
    this.#connections.cut(address);
  }

  /**
   * Takes no new connections, sends GOAWAY on every one that stands, and closes once the calls have ended. What has not
   * ended in time is cut.
   *
   * @param endCalls Tells the calls to end, once no new connection comes. Resolves when they have.
   */
  async close(drainMs: number, endCalls: () => Promise<void>): Promise<void> {
    const stopped = this.#connections.stopAccepting();
    const ended = endCalls();
    this.#injector.drain(drainMs);
    const cut = setTimeout(() => this.#connections.cutAll(), drainMs);
    await ended;
    this.#injector.destroy();
    await stopped;
    clearTimeout(cut);
    this.#server.forceShutdown();
  }
}

/**
 * Lets a request be refused that was canceled in the bytes that followed it. grpc-js answers an unknown path and a
 * content type of another protocol without asking whether the stream still stands, and what Node.js throws there would
 * end the process: any client could.
 */
function bearCanceledRequests(server: Server): void {
  // It lets nobody see its HTTP/2 server; where a version of it keeps that elsewhere, this throws when we listen.
  const servers = server["http2Servers"] as ReadonlyMap<Http2SecureServer, unknown>;
  for (const http2Server of servers.keys())
    http2Server.prependListener("stream", (stream: ServerHttp2Stream) => {
      if (stream.destroyed || stream.closed) stream.respond = () => undefined;
    });
}
