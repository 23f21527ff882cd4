// The TCP connections of the node listener. They are accepted here and handed to grpc-js, because grpc-js gives no
// hold on a connection: an agent that does not read, or whose node was revoked, is cut off for certain only here.
import { createServer, type AddressInfo, type Server as NetServer, type Socket } from "node:net";
import type { ConnectionInjector } from "@grpc/grpc-js";
import { AddressConnections } from "../rpc/address-connections.ts";

/** Accepts connections. */
export class Connections {
  readonly #server: NetServer;
  readonly #sockets = new Map<string, Socket>();

  constructor(options: {
    readonly injector: ConnectionInjector;
    readonly maxConnections: number;
    readonly maxConnectionsPerAddress: number;
    /** An address had too many, and one more of its connections was cut. */
    readonly onRefused: () => void;
  }) {
    const byAddress = new AddressConnections(options.maxConnectionsPerAddress);
    this.#server = createServer({ noDelay: true }, (socket) => {
      if (!byAddress.admit(socket)) {
        options.onRefused();
        return;
      }
      const address = `${socket.remoteAddress}:${socket.remotePort}`;
      this.#sockets.set(address, socket);
      socket.once("close", () => this.#sockets.delete(address));
      options.injector.injectConnection(socket);
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
