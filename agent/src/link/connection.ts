// The connection to the node listener: gRPC over HTTP/2 with mutual TLS 1.3. The listener is verified against the trust
// bundle alone, host name included; the system's roots have no say here.
//
// The connection is made by hand instead of by connect-node's Http2SessionManager: that one pings a session that was
// destroyed a moment before, which throws out of a timer and ends the process, and it reconnects by itself, where we
// want each session to have a connection of its own, with the certificate as it is then.

import { connect, constants } from "node:http2";
import type {
  ClientHttp2Session,
  ClientHttp2Stream,
  ClientSessionRequestOptions,
  OutgoingHttpHeaders,
} from "node:http2";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import type { Client } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { NodeLinkService } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { dial } from "../dial.ts";
import type { Identity } from "../identity/identity-store.ts";

/**
 * The largest message is a desired set: 64 instances, each with 128 variables of 4 KiB, are 33 MB. Everything else is
 * far below.
 */
const maxReadBytes = 40 * 1024 * 1024;
/** The contract's limit on a message of ours. */
const maxWriteBytes = 4 * 1024 * 1024;
/** A peer that vanished without a word is noticed within 15 seconds. */
const pingIntervalMs = 10_000;
const pingTimeoutMs = 5_000;
/** A control plane that takes connections may be busy with a whole fleet's: leaving it would make it busier. */
const connectTimeoutMs = 10_000;

/** An open or opening connection. */
export interface LinkConnection extends Disposable {
  readonly client: Client<typeof NodeLinkService>;
}

/** Connects as this node. */
export function connectLink(identity: Identity): LinkConnection {
  const baseUrl = `https://${identity.nodeEndpoint}`;
  const channel = new Channel(baseUrl, identity);
  const transport = createGrpcTransport({
    baseUrl,
    sessionManager: channel,
    readMaxBytes: maxReadBytes,
    writeMaxBytes: maxWriteBytes,
    acceptCompression: [],
  });
  return { client: createClient(NodeLinkService, transport), [Symbol.dispose]: () => channel.close() };
}

/** One HTTP/2 connection. Once it is gone it stays gone. */
class Channel {
  readonly authority: string;
  readonly #session: ClientHttp2Session;
  readonly #opened: Promise<void>;
  #failure: ConnectError | undefined;
  #pinger: NodeJS.Timeout | undefined;

  constructor(baseUrl: string, identity: Identity) {
    this.authority = new URL(baseUrl).origin;
    const session = connect(this.authority, {
      createConnection: (url) =>
        dial(url, {
          minVersion: "TLSv1.3",
          rejectUnauthorized: true,
          key: identity.key.pem,
          cert: identity.certificate.toString(),
          ca: identity.roots.map((root) => root.toString()),
        }),
    });
    this.#session = session;
    const opened = Promise.withResolvers<void>();
    this.#opened = opened.promise;
    // Heard by whoever requests first; a connection that nobody uses may fail in peace.
    this.#opened.catch(() => undefined);
    const timer = setTimeout(
      () => session.destroy(new Error(`no connection within ${connectTimeoutMs} ms`)),
      connectTimeoutMs,
    );
    session.once("connect", () => {
      clearTimeout(timer);
      this.#pinger = setInterval(() => this.#ping(), pingIntervalMs).unref();
      opened.resolve();
    });
    session.on("error", (error: Error) => {
      this.#failure ??= new ConnectError(error.message, Code.Unavailable, undefined, undefined, error);
    });
    session.once("close", () => {
      clearTimeout(timer);
      clearInterval(this.#pinger);
      opened.reject(this.#failure ?? new ConnectError("the connection was closed", Code.Unavailable));
    });
  }

  /** Opens a stream. Called by the transport. */
  async request(
    method: string,
    path: string,
    headers: OutgoingHttpHeaders,
    options: Omit<ClientSessionRequestOptions, "signal">,
  ): Promise<ClientHttp2Stream> {
    await this.#opened;
    if (this.#session.destroyed || this.#session.closed) {
      throw this.#failure ?? new ConnectError("the connection was closed", Code.Unavailable);
    }
    return this.#session.request({ ...headers, ":method": method, ":path": path }, options);
  }

  /** Told by the transport; the pings need no help. */
  notifyResponseByteRead(): void {}

  close(): void {
    clearInterval(this.#pinger);
    if (!this.#session.destroyed) this.#session.destroy(undefined, constants.NGHTTP2_CANCEL);
  }

  #ping(): void {
    const session = this.#session;
    if (session.destroyed || session.closed) return;
    const deadline = setTimeout(() => session.destroy(new Error("the peer does not answer pings")), pingTimeoutMs);
    const sent = session.ping(() => clearTimeout(deadline));
    if (!sent) clearTimeout(deadline);
  }
}
