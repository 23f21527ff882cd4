// Calls on bare HTTP/2, with whatever bytes a test wants, and what came back: a client that keeps no rule by itself.
import { connect, type ClientHttp2Session, constants, type IncomingHttpHeaders } from "node:http2";
import type { SecureClientSessionOptions } from "node:http2";
import { type DescMethod, fromBinary } from "@bufbuild/protobuf";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";

/** The protocols of the public listener. "connect-get" puts a request that changes nothing into the URL. */
export const protocols = ["grpc", "grpc-web", "connect", "connect-get"] as const;
export type Protocol = (typeof protocols)[number];
export type Codec = "proto" | "json";

/** What is sent. */
export type RawRequest = {
  readonly method?: string;
  readonly path: string;
  readonly headers: Readonly<Record<string, string>>;
  /** Sent one after the other. */
  readonly body: readonly Uint8Array[];
  /** What follows the body. */
  readonly end?: "end" | "reset" | "nothing";
  /** An answer that goes on for longer is left. */
  readonly leaveAfterMs: number;
};

/** What came back. */
export type RawAnswer = {
  /**
   * "ok", the name of an error's code ("invalid_argument"), "http_404", "left" (it went on, or never began), "reset"
   * (there was none, or its end is missing).
   */
  readonly code: string;
  /** The reason in google.rpc.ErrorInfo. */
  readonly reason: string | undefined;
  /** Everything that came, also what was packed: to look for what must not be in it. */
  readonly text: string;
  /** What its envelopes held. */
  readonly envelopes: readonly Buffer[];
};

/** A connection that is made again when it breaks. */
export class RawClient implements Disposable {
  readonly #url: string;
  readonly #options: SecureClientSessionOptions;
  #session: ClientHttp2Session | undefined;

  constructor(url: string, options: SecureClientSessionOptions) {
    this.#url = url;
    this.#options = options;
  }

  get session(): ClientHttp2Session {
    if (this.#session === undefined || this.#session.closed || this.#session.destroyed) {
      // Else what waits here, because the other side takes no more, would make this side refuse streams.
      this.#session = connect(this.#url, { ...this.#options, maxSessionMemory: 1_000 });
      this.#session.on("error", () => undefined);
    }
    return this.#session;
  }

  /** Sends one request. Never rejects: whatever happens is an answer. */
  send(request: RawRequest): Promise<RawAnswer> {
    const answer = new Answer();
    return new Promise((resolve) => {
      const stream = this.session.request({
        ":method": request.method ?? "POST",
        ":path": request.path,
        te: "trailers",
        ...request.headers,
      });
      const timer = setTimeout(() => {
        answer.left = true;
        stream.close(constants.NGHTTP2_CANCEL);
      }, request.leaveAfterMs);
      stream.on("response", (headers) => (answer.headers = headers));
      stream.on("trailers", (trailers: IncomingHttpHeaders) => (answer.trailers = trailers));
      stream.on("data", (chunk: Buffer) => answer.chunks.push(chunk));
      stream.on("error", () => undefined);
      stream.once("close", () => {
        clearTimeout(timer);
        resolve(answer.read(request.headers["content-type"] ?? ""));
      });
      for (const part of request.body) stream.write(part);
      if (request.end === "reset") stream.close(constants.NGHTTP2_CANCEL);
      else if (request.end !== "nothing") stream.end();
    });
  }

  [Symbol.dispose](): void {
    this.#session?.destroy();
  }
}

/** A message in its envelope. */
export function framed(message: Uint8Array, flags = 0, length = message.length): Buffer {
  const frame = Buffer.alloc(5 + message.length);
  frame.writeUInt8(flags);
  frame.writeUInt32BE(length, 1);
  frame.set(message, 5);
  return frame;
}

/** How a method is called in a protocol. */
export function requestOf(
  method: DescMethod,
  { protocol, codec }: { readonly protocol: Protocol; readonly codec: Codec },
  message: Uint8Array,
): Pick<RawRequest, "method" | "path" | "headers" | "body"> {
  const path = `/${method.parent.typeName}/${method.name}`;
  const streams = method.methodKind !== "unary";
  switch (protocol) {
    case "grpc":
    case "grpc-web":
      return { path, headers: { "content-type": `application/${protocol}+${codec}` }, body: [framed(message)] };
    case "connect":
      if (streams)
        return { path, headers: { "content-type": `application/connect+${codec}` }, body: [framed(message)] };
      return { path, headers: { "content-type": `application/${codec}` }, body: [message] };
    case "connect-get": {
      const query = new URLSearchParams({
        connect: "v1",
        encoding: codec,
        base64: "1",
        message: Buffer.from(message).toString("base64url"),
      });
      return { method: "GET", path: `${path}?${query}`, headers: {}, body: [] };
    }
  }
}

const grpcCodes = [
  "ok",
  "canceled",
  "unknown",
  "invalid_argument",
  "deadline_exceeded",
  "not_found",
  "already_exists",
  "permission_denied",
  "resource_exhausted",
  "failed_precondition",
  "aborted",
  "out_of_range",
  "unimplemented",
  "internal",
  "unavailable",
  "data_loss",
  "unauthenticated",
];

type ConnectFailure = { code?: string; details?: { type?: string; value?: string }[] };

class Answer {
  headers: IncomingHttpHeaders | undefined;
  trailers: IncomingHttpHeaders = {};
  readonly chunks: Buffer[] = [];
  left = false;

  read(contentType: string): RawAnswer {
    const body = Buffer.concat(this.chunks);
    const { headers } = this;
    const packed: string[] = [];
    const envelopes = envelopesOf(body);
    const answer = (code: string, reason?: string): RawAnswer => ({
      code,
      reason,
      text: [JSON.stringify(headers ?? {}), JSON.stringify(this.trailers), body.toString("latin1"), ...packed].join(
        "\n",
      ),
      envelopes: envelopes.map(({ payload }) => payload),
    });
    if (headers === undefined) return answer(this.left ? "left" : "reset");
    const last = envelopes.at(-1);
    const web = (last?.flags ?? 0) & 0x80 ? fieldsOf(last?.payload ?? Buffer.alloc(0)) : {};
    const status = this.trailers["grpc-status"] ?? headers["grpc-status"] ?? web["grpc-status"];
    if (status !== undefined) {
      const details =
        this.trailers["grpc-status-details-bin"] ??
        headers["grpc-status-details-bin"] ??
        web["grpc-status-details-bin"];
      const bytes = Buffer.from(String(details ?? ""), "base64");
      packed.push(bytes.toString("latin1"));
      return answer(
        grpcCodes[Number(status)] ?? `grpc_${String(status)}`,
        /\b[A-Z][A-Z_]{4,}\b/.exec(bytes.toString("latin1"))?.[0],
      );
    }
    const failure = failureOf(
      contentType.startsWith("application/connect+") ? last?.payload : body,
      Number(headers[":status"]),
    );
    if (failure?.code !== undefined) {
      for (const { value = "" } of failure.details ?? []) packed.push(Buffer.from(value, "base64").toString("latin1"));
      const info = failure.details?.find(({ type }) => type === ErrorInfoSchema.typeName);
      const reason =
        info?.value === undefined ? undefined : fromBinary(ErrorInfoSchema, Buffer.from(info.value, "base64")).reason;
      return answer(failure.code, reason);
    }
    if (this.left) return answer("left");
    const type = String(headers["content-type"]);
    // gRPC's end is its status, and that of Connect's streams an envelope of its own.
    const endsByItself = type.startsWith("application/grpc") || type.startsWith("application/connect+");
    if (endsByItself && ((last?.flags ?? 0) & 0x02) === 0) return answer("reset");
    return answer(Number(headers[":status"]) === 200 ? "ok" : `http_${Number(headers[":status"])}`);
  }
}

function envelopesOf(body: Buffer): { flags: number; payload: Buffer }[] {
  const found: { flags: number; payload: Buffer }[] = [];
  for (let at = 0; at + 5 <= body.length;) {
    const end = at + 5 + body.readUInt32BE(at + 1);
    if (end > body.length) break;
    found.push({ flags: body.readUInt8(at), payload: body.subarray(at + 5, end) });
    at = end;
  }
  return found;
}

function fieldsOf(trailer: Buffer): Record<string, string> {
  const lines = trailer.toString("latin1").split("\r\n");
  return Object.fromEntries(
    lines.map((line) => [line.split(":")[0]?.trim().toLowerCase() ?? "", line.slice(line.indexOf(":") + 1).trim()]),
  );
}

/** Connect's error: the whole body of a unary answer, or the `error` of a stream's last envelope. */
function failureOf(payload: Buffer | undefined, status: number): ConnectFailure | undefined {
  try {
    const told = JSON.parse(payload?.toString() ?? "") as ConnectFailure & { error?: ConnectFailure };
    return status === 200 ? told.error : told;
  } catch {
    return undefined;
  }
}
