// The node listener of a control plane in wrong hands: real mutual TLS, and in each session whatever bytes a test wants.
import {
  createSecureServer,
  type Http2SecureServer,
  type ServerHttp2Session,
  type ServerHttp2Stream,
} from "node:http2";
import { once } from "node:events";
import type { AddressInfo } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import type { TestAuthority } from "../../agent/src/testing/authority.ts";

const sessionPath = "/clodei.node.v1.NodeLinkService/Session";

/** Says in the next session what it was given, leaves the agent some time to act on it, and ends the session. */
export class HostileControlPlane implements AsyncDisposable {
  readonly #server: Http2SecureServer;
  readonly #sessions = new Set<ServerHttp2Session>();
  /** What the next sessions say. */
  script: readonly Uint8Array[] = [];
  lingerMs = 100;

  private constructor(server: Http2SecureServer) {
    this.#server = server;
    server.on("session", (session) => {
      this.#sessions.add(session);
      session.on("error", () => undefined);
      session.once("close", () => this.#sessions.delete(session));
    });
    server.on("stream", (stream, headers) => {
      stream.on("error", () => undefined);
      stream.resume();
      void this.#answer(stream, String(headers[":path"]));
    });
  }

  static async start(authority: TestAuthority): Promise<HostileControlPlane> {
    const issued = await authority.issueServer([{ type: "dns", value: "localhost" }]);
    const server = createSecureServer({
      key: issued.keyPem,
      cert: issued.certificatePem,
      ca: authority.rootPem,
      requestCert: true,
      rejectUnauthorized: true,
      minVersion: "TLSv1.3",
    });
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    return new HostileControlPlane(server);
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  async #answer(stream: ServerHttp2Stream, path: string): Promise<void> {
    stream.respond({ ":status": 200, "content-type": "application/grpc+proto" }, { waitForTrailers: true });
    stream.once("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
    if (path === sessionPath) for (const bytes of this.script) stream.write(bytes);
    await sleep(this.lingerMs);
    if (!stream.destroyed) stream.end();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const session of this.#sessions) session.destroy();
    this.#server.close();
    await once(this.#server, "close");
  }
}
