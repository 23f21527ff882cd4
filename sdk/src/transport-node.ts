/**
 * The Node side of the SDK, and the only file that imports from Node: Connect over HTTP/2 and TLS. In a browser,
 * transport-browser.ts stands in its place: package.json chooses by the name #transport.
 */
import { AsyncLocalStorage } from "node:async_hooks";
import type { ClientHttp2Stream, Http2Session } from "node:http2";
import { Code, ConnectError } from "@connectrpc/connect";
import { createConnectTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { type ConnectionAttempt, explainConnectionError } from "./connection-errors.ts";
import { parseEndpoint } from "./endpoint.ts";
import { ClodeiError } from "./errors.ts";
import { isCutShort, type Wire, type WireOptions } from "./wire.ts";

/** A peer that went away without a word is found out within this time plus the next, also on a silent stream. */
const pingIntervalMs = 10_000;
const pingTimeoutMs = 5_000;
/** Messages are at most 4 MiB by the API's own limit. */
const maxMessageBytes = 4 * 1024 * 1024;

/** What the control plane, and most proxies, allow at once on a connection. One more would wait without a word. */
const maxStreamsPerConnection = 100;
/** Calls past all of them wait for others: a client is not to use up what its address may have. */
const maxConnections = 8;

/** Node's codes for a connection that was lost or could not be made, and may be made at the next try. */
const lostConnectionCodes: ReadonlySet<string> = new Set([
  "ECONNREFUSED",
  "ECONNRESET",
  "ECONNABORTED",
  "EPIPE",
  "ETIMEDOUT",
  "EHOSTUNREACH",
  "ENETUNREACH",
  "EAI_AGAIN",
  "ERR_STREAM_PREMATURE_CLOSE",
  "ERR_STREAM_DESTROYED",
  "ERR_HTTP2_ERROR",
  "ERR_HTTP2_GOAWAY_SESSION",
  "ERR_HTTP2_INVALID_SESSION",
  "ERR_HTTP2_INVALID_STREAM",
  "ERR_HTTP2_SESSION_ERROR",
  "ERR_HTTP2_STREAM_CANCEL",
  "ERR_HTTP2_STREAM_ERROR",
  "ERR_HTTP2_PING_CANCEL",
]);

/** Opens a wire. Nothing is sent before the first call. */
export function openWire(options: WireOptions): Wire {
  const url = parseEndpoint(options.endpoint);
  if (options.ca !== undefined && !options.ca.includes("-----BEGIN CERTIFICATE-----")) {
    throw new ClodeiError(
      "invalid_argument",
      "INVALID_ARGUMENT",
      `ca must be PEM text and not the name of a file: readFileSync(FILE, "utf8")`,
    );
  }
  const connections = new Connections(() => {
    const tls = options.ca === undefined ? {} : { ca: options.ca };
    const manager = new Http2SessionManager(url.origin, { pingIntervalMs, pingTimeoutMs }, tls);
    return { manager, guard: guardOf(manager, options.connectTimeoutMs), calls: 0 };
  });
  /** The signal of the call for which a request is made: connect-node does not hand it down. */
  const signals = new AsyncLocalStorage<AbortSignal | undefined>();
  const transport = createConnectTransport({
    baseUrl: url.href,
    httpVersion: "2",
    sessionManager: {
      authority: url.origin,
      async request(...request) {
        const stream = await connections.request(...request);
        keepErrorsHandled(stream.session);
        const signal = signals.getStore();
        if (signal !== undefined) discardAfterAbort(stream, signal);
        return stream;
      },
      notifyResponseByteRead: (stream) => connections.notifyResponseByteRead(stream),
    },
    readMaxBytes: maxMessageBytes,
    writeMaxBytes: maxMessageBytes,
    // Our answers are small; decompression would cost more than the bytes.
    acceptCompression: [],
  });
  return {
    transport: {
      async unary(...call) {
        return await signals.run(call[1], async () => await transport.unary(...call));
      },
      async stream(...call) {
        return await signals.run(call[1], async () => await transport.stream(...call));
      },
    },
    isConnectionLost,
    explain: (error) => explain(error, { origin: url.origin, hasCa: options.ca !== undefined }),
    close: () => connections.close(),
  };
}

type Connection = {
  readonly manager: Http2SessionManager;
  /** To be called before each request. */
  readonly guard: () => void;
  /** Calls that are on it, or wait for it to be made. */
  calls: number;
};

/** A client's connections: the next one is made when those before it are full. One that is idle is closed in time. */
class Connections {
  readonly #open: () => Connection;
  readonly #all: Connection[] = [];
  readonly #byStream = new WeakMap<ClientHttp2Stream, Connection>();

  constructor(open: () => Connection) {
    this.#open = open;
  }

  async request(...request: Parameters<Http2SessionManager["request"]>): Promise<ClientHttp2Stream> {
    const connection = this.#withRoom();
    connection.calls++;
    try {
      connection.guard();
      const stream = await connection.manager.request(...request);
      this.#byStream.set(stream, connection);
      stream.once("close", () => connection.calls--);
      return stream;
    } catch (error) {
      connection.calls--;
      throw error;
    }
  }

  notifyResponseByteRead(stream: ClientHttp2Stream): void {
    this.#byStream.get(stream)?.manager.notifyResponseByteRead(stream);
  }

  close(): void {
    for (const { manager } of this.#all) manager.abort();
  }

  #withRoom(): Connection {
    const free = this.#all.find(({ calls }) => calls < maxStreamsPerConnection);
    if (free !== undefined) return free;
    if (this.#all.length >= maxConnections) {
      return this.#all.reduce((emptiest, other) => (other.calls < emptiest.calls ? other : emptiest));
    }
    const connection = this.#open();
    this.#all.push(connection);
    return connection;
  }
}

/**
 * When a client is closed while its connection fails, connect-node no longer listens for the error that Node then
 * tells, which would end the process. The calls have it already.
 */
function keepErrorsHandled(session: Http2Session | undefined): void {
  if (session?.listeners("error").includes(ignore) === false) session.on("error", ignore);
}

function ignore(): void {}

/**
 * A peer that takes the connection and never completes it would hold a stream for ever: streams have no deadline,
 * and pings begin with the connection.
 */
function guardOf(sessionManager: Http2SessionManager, connectTimeoutMs: number): () => void {
  let guarding = false;
  return () => {
    if (guarding || !["closed", "error", "connecting"].includes(sessionManager.state())) return;
    guarding = true;
    const timer = setTimeout(() => {
      const message = `no connection within ${connectTimeoutMs} ms`;
      sessionManager.abort(Object.assign(new Error(message), { code: "ETIMEDOUT" }));
    }, connectTimeoutMs);
    // Never rejects: who calls gets the error.
    void sessionManager.connect().finally(() => {
      clearTimeout(timer);
      guarding = false;
    });
  };
}

/**
 * When a call is aborted after its whole answer has arrived and before it was read, connect-node leaves the rest
 * unread. Node then never closes the stream, which keeps the connection in use and the process alive for ever.
 */
function discardAfterAbort(stream: ClientHttp2Stream, signal: AbortSignal): void {
  const discard = () => {
    while (stream.read() !== null);
  };
  const onAbort = () => {
    // After connect-node, which tells the server of the abort.
    setImmediate(() => {
      stream.on("readable", discard);
      discard();
    });
  };
  signal.addEventListener("abort", onAbort, { once: true });
  stream.once("close", () => signal.removeEventListener("abort", onAbort));
}

/** Node's codes along an error's causes. */
function nodeCodes(error: unknown): string[] {
  const codes: string[] = [];
  for (let at: unknown = error, depth = 0; at instanceof Error && depth < 10; at = at.cause, depth++) {
    if ("code" in at && typeof at.code === "string") codes.push(at.code);
  }
  return codes;
}

function explain(error: unknown, attempt: ConnectionAttempt): string | undefined {
  // The server itself answered: the connection was there.
  if (error instanceof ConnectError && error.isWireError) return undefined;
  const codes = nodeCodes(error);
  for (const code of codes) {
    const explained = explainConnectionError(code, attempt);
    if (explained !== undefined) return explained;
  }
  if (!attempt.origin.startsWith("http:") || !isConnectionLost(error)) return undefined;
  return `the connection to ${attempt.origin} was lost: if what listens there speaks TLS, endpoint must begin with https:`;
}

function isConnectionLost(error: unknown): boolean {
  // The server itself answered: whatever it said, the connection was there.
  if (error instanceof ConnectError && error.isWireError) return false;
  if (isCutShort(error) || nodeCodes(error).some((code) => lostConnectionCodes.has(code))) return true;
  // The server, or a proxy, reset the stream: connect-node makes these errors without a cause.
  if (!(error instanceof ConnectError) || error.cause !== undefined || !resetCodes.has(error.code)) return false;
  // So it makes the error for a message that cannot be written or read, which is so at every try.
  return !/^(serialize|parse) binary: /u.test(error.rawMessage);
}

const resetCodes: ReadonlySet<Code> = new Set([Code.Canceled, Code.Internal, Code.Unavailable, Code.Aborted]);
