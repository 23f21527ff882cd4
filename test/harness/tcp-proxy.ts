// A network between two programs of a test, on loopback, that can be cut and that can go silent. With several targets
// it is a load balancer of the simplest kind.
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type Server, Socket } from "node:net";

type Target = { readonly host: string; readonly port: number };

/** Forwards connections to one place, or in turn to several. */
export class TcpProxy implements AsyncDisposable {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  #silent = false;
  #only: number | undefined;
  /** Connections that were made through it. */
  connections = 0;

  private constructor(targets: readonly Target[]) {
    this.#server = createServer((client) => {
      const turn = this.connections++ % targets.length;
      const target = targets[this.#only ?? turn] ?? assert.fail("a proxy has a target");
      const server = new Socket();
      for (const [from, to] of [
        [client, server],
        [server, client],
      ] as const) {
        this.#sockets.add(from);
        from.on("error", () => {});
        from.on("close", () => {
          this.#sockets.delete(from);
          to.destroy();
        });
        from.pipe(to);
        // Whoever connects meanwhile meets the silence, too.
        if (this.#silent) from.pause();
      }
      server.connect(target);
    });
  }

  /** @param targets Each "host:port" on loopback. */
  static async start(...targets: readonly string[]): Promise<TcpProxy> {
    const proxy = new TcpProxy(
      targets.map((target) => {
        const colon = target.lastIndexOf(":");
        return { host: target.slice(0, colon), port: Number(target.slice(colon + 1)) };
      }),
    );
    proxy.#server.listen(0, "127.0.0.1");
    await once(proxy.#server, "listening");
    return proxy;
  }

  /** Where it listens, under the name that a control plane's certificate has. */
  get endpoint(): string {
    const address = this.#server.address();
    if (address === null || typeof address === "string") throw new Error("the proxy does not listen");
    return `localhost:${address.port}`;
  }

  /** From now on new connections go to this target alone, of those that were given. */
  leadTo(index: number): void {
    this.#only = index;
  }

  /** Breaks every connection that is open. New ones go through. */
  cut(): void {
    for (const socket of this.#sockets) socket.resetAndDestroy();
  }

  /** Nothing passes any more, in either direction, and nobody is told. */
  hang(): void {
    this.#silent = true;
    for (const socket of this.#sockets) socket.pause();
  }

  /** What was held back passes, and all that follows. */
  resume(): void {
    this.#silent = false;
    for (const socket of this.#sockets) socket.resume();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const closed = once(this.#server, "close");
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }
}
