// A connection to another replica: HTTP/2 over TLS 1.3 with both sides' certificates. Who answers is known by its
// certificate alone, which must be of the very replica that the database names: an address may be another's by now.
//
// The connection is made by hand, as the agent makes its own: once it is gone it stays gone, and the next stream has a new
// one with the certificate as it is then.
import { connect, constants } from "node:http2";
import type {
  ClientHttp2Session,
  ClientHttp2Stream,
  ClientSessionRequestOptions,
  OutgoingHttpHeaders,
} from "node:http2";
import type { PeerCertificate } from "node:tls";
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { ReplicaService } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import type { Authority } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import { tlsProtocol } from "./credentials.ts";
import type { DispatchLimits } from "./limits.ts";

/** Where another replica is, as it told the database. */
export type ReplicaAddress = {
  readonly replicaId: string;
  /** "host:port". */
  readonly endpoint: string;
};

/** The certificate that this process shows. */
export type ReplicaTlsMaterial = { readonly certificateChainPem: string; readonly privateKeyPem: string };

export type ReplicaConnectionOptions = ReplicaAddress & {
  readonly tls: ReplicaTlsMaterial;
  readonly authority: Pick<Authority, "issuedReplica" | "certificatePem">;
  readonly limits: DispatchLimits;
  readonly clock: Clock;
  /** Called once. The error is what kept the connection from opening. */
  readonly onClosed: (failure: Error | undefined) => void;
};

/** A peer that vanished without a word is noticed within 15 seconds. */
const pingIntervalMs = 10_000;
const pingTimeoutMs = 5_000;
/** What waits for readers is bounded by streams and their windows, 64 KiB each; Node's own bound would refuse streams. */
const maxSessionMemoryMb = 256;

/** An open or opening connection, and how many streams are on it. */
export class ReplicaConnection {
  readonly client: Client<typeof ReplicaService>;
  readonly #channel: Channel;
  readonly #limits: DispatchLimits;
  #streams = 0;
  #retired = false;
  #idle: NodeJS.Timeout | undefined;

  constructor(options: ReplicaConnectionOptions) {
    this.#limits = options.limits;
    const baseUrl = `https://${options.endpoint}`;
    this.#channel = new Channel(baseUrl, options);
    const transport = createGrpcTransport({
      baseUrl,
      sessionManager: this.#channel,
      readMaxBytes: options.limits.maxMessageBytes,
      acceptCompression: [],
    });
    this.client = createClient(ReplicaService, transport);
  }

  /** Takes a place for one stream, or returns undefined where there is none. The last one to leave lets it close. */
  takeStream(): Disposable | undefined {
    if (this.#streams >= this.#limits.maxStreamsPerReplica) return undefined;
    this.#streams += 1;
    clearTimeout(this.#idle);
    return {
      [Symbol.dispose]: (): void => {
        this.#streams -= 1;
        if (this.#streams > 0) return;
        if (this.#retired) this.close();
        else this.#idle = setTimeout(() => this.close(), this.#limits.replicaIdleMs).unref();
      },
    };
  }

  /** Whether the certificate that the replica showed has ended since. */
  hasExpired(now: Date): boolean {
    const { peerExpireTime } = this.#channel;
    return peerExpireTime !== undefined && peerExpireTime <= now;
  }

  /** Closes once no stream is left: new ones go elsewhere. */
  retire(): void {
    this.#retired = true;
    if (this.#streams === 0) this.close();
  }

  /** Closes now. */
  close(): void {
    clearTimeout(this.#idle);
    this.#channel.close();
  }
}

/** What the transport of Connect asks for streams. */
class Channel {
  readonly authority: string;
  peerExpireTime: Date | undefined;
  readonly #session: ClientHttp2Session;
  readonly #opened: Promise<void>;
  #failure: Error | undefined;
  #pinger: NodeJS.Timeout | undefined;

  constructor(baseUrl: string, options: ReplicaConnectionOptions) {
    this.authority = new URL(baseUrl).origin;
    const session = connect(this.authority, {
      ...tlsProtocol,
      rejectUnauthorized: true,
      key: options.tls.privateKeyPem,
      cert: options.tls.certificateChainPem,
      ca: options.authority.certificatePem,
      checkServerIdentity: (_host: string, certificate: PeerCertificate) => this.#judge(certificate, options),
      maxSessionMemory: maxSessionMemoryMb,
    });
    this.#session = session;
    const opened = Promise.withResolvers<void>();
    this.#opened = opened.promise;
    // Heard by whoever requests first.
    this.#opened.catch(() => undefined);
    const { replicaConnectTimeoutMs } = options.limits;
    const late = setTimeout(
      () => session.destroy(new Error(`no connection within ${replicaConnectTimeoutMs} ms`)),
      replicaConnectTimeoutMs,
    );
    let isOpen = false;
    session.once("connect", () => {
      isOpen = true;
      clearTimeout(late);
      this.#pinger = setInterval(() => this.#ping(), pingIntervalMs).unref();
      opened.resolve();
    });
    session.on("error", (error: Error) => (this.#failure ??= error));
    session.once("close", () => {
      clearTimeout(late);
      clearInterval(this.#pinger);
      opened.reject(this.#gone());
      options.onClosed(isOpen ? undefined : this.#failure);
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
    if (this.#session.destroyed || this.#session.closed) throw this.#gone();
    return this.#session.request({ ...headers, ":method": method, ":path": path }, options);
  }

  /** Told by the transport; the pings need no help. */
  notifyResponseByteRead(): void {}

  close(): void {
    clearInterval(this.#pinger);
    if (!this.#session.destroyed) this.#session.destroy(undefined, constants.NGHTTP2_CANCEL);
  }

  /** Says what is wrong with who answers. TLS has verified that the chain leads to the CA. */
  #judge(certificate: PeerCertificate, options: ReplicaConnectionOptions): Error | undefined {
    const found = options.authority.issuedReplica(certificate.raw);
    if (found?.replicaId !== options.replicaId) {
      const who = found === undefined ? "something that is no control plane" : `the control plane ${found.replicaId}`;
      return new Error(`${who} answers there, and not ${options.replicaId}`);
    }
    this.peerExpireTime = found.notAfter;
    return found.notAfter <= options.clock() ? new Error("the control plane's certificate has expired") : undefined;
  }

  #gone(): ConnectError {
    const message = this.#failure?.message ?? "the connection was closed";
    return new ConnectError(message, Code.Unavailable, undefined, undefined, this.#failure);
  }

  #ping(): void {
    const session = this.#session;
    if (session.destroyed || session.closed) return;
    const late = setTimeout(() => session.destroy(new Error("the replica does not answer pings")), pingTimeoutMs);
    const sent = session.ping(() => clearTimeout(late));
    if (!sent) clearTimeout(late);
  }
}
