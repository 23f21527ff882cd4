// The TCP connections of the node listener. They are accepted here and handed to grpc-js, because grpc-js gives no
// hold on a connection: an agent that does not read, or whose node was revoked, is cut off for certain only here.
import { createServer, type AddressInfo, type Server as NetServer, type Socket } from "node:net";
import type { ConnectionInjector } from "@grpc/grpc-js";
import { readFirstBytes } from "../platform/first-bytes.ts";
import { AddressSlots } from "../rpc/address-slots.ts";
import type { TrustedProxies } from "../rpc/trusted-proxies.ts";
import { ProxyHeaderError, readProxyHeader } from "./proxy-protocol.ts";

/** Why a connection was cut before anything was said on it. */
export type ConnectionRefusal = "too_many" | "no_trusted_proxy" | "malformed_proxy_header" | "no_proxy_header";

/** What connections begin with: their own bytes, or a PROXY header, which only these proxies may send. */
export type ProxyProtocol = "off" | { readonly from: TrustedProxies; readonly timeoutMs: number };

type ConnectionsOptions = {
  readonly injector: ConnectionInjector;
  readonly maxConnections: number;
  readonly maxConnectionsPerAddress: number;
  readonly proxyProtocol: ProxyProtocol;
  readonly onRefused: (why: ConnectionRefusal) => void;
};

/** A connection that is silent for so long is probed. */
const keepAliveMs = 30_000;

/** Accepts connections. */
export class Connections {
  readonly #server: NetServer;
  readonly #sockets = new Map<string, Socket>();

  constructor(options: ConnectionsOptions) {
    const slots = new AddressSlots(options.maxConnectionsPerAddress);
    // The kernel's own probes, for a peer that died before it began a session, or while it uploads output.
    this.#server = createServer({ noDelay: true, keepAlive: true, keepAliveInitialDelay: keepAliveMs }, (socket) => {
      const address = `${socket.remoteAddress}:${socket.remotePort}`;
      this.#sockets.set(address, socket);
      socket.once("close", () => this.#sockets.delete(address));
      // Until somebody serves it, nobody else listens.
      socket.on("error", () => undefined);
      const refuse = (why: ConnectionRefusal): void => {
        options.onRefused(why);
        socket.destroy();
      };
      const serve = (client: string): void => {
        const giveBack = slots.take(client);
        if (giveBack === undefined) return refuse("too_many");
        socket.once("close", giveBack);
        options.injector.injectConnection(socket);
      };
      const peer = socket.remoteAddress ?? "";
      const { proxyProtocol } = options;
      if (proxyProtocol === "off") return serve(peer);
      // A header that anybody may send says nothing.
      if (!proxyProtocol.from.has(peer)) return refuse("no_trusted_proxy");
      // The proxy's own connection, such as to see whether we live, is its own.
      void readFirstBytes(socket, proxyProtocol.timeoutMs, readProxyHeader).then(
        (client) => serve(client ?? peer),
        (error: unknown) => refuse(error instanceof ProxyHeaderError ? "malformed_proxy_header" : "no_proxy_header"),
      );
    });
    this.#server.maxConnections = options.maxConnections;
  }

  /** Listens. Resolves with the port, which is chosen where 0 is given. */
  listen(host: string, port: number): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#server.once("error", reject);
      this.#server.listen({ host, port }, () => {
        this.#server.off("error", reject);
        this.#server.on("error", () => undefined);
        // A TCP server that listens has an address with a port.
        resolve((this.#server.address() as AddressInfo).port);
      });
    });
  }

  /** Cuts the connection with this "address:port". */
  cut(address: string): void {
    this.#sockets.get(address)?.destroy();
  }

  /** Takes no new connections. */
  stopAccepting(): Promise<void> {
    return new Promise((resolve) => this.#server.close(() => resolve()));
  }

  /** Cuts all that are left. */
  cutAll(): void {
    for (const socket of this.#sockets.values()) socket.destroy();
  }

  get count(): number {
    return this.#sockets.size;
  }
}
