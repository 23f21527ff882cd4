// The few calls to Docker's API that starting, filling and clearing a private engine takes, over node:http. Not the
// agent's client, so that tests look at an engine past every part of ours.
import { request } from "node:http";

/** How long a call may take. Imports and removals of many containers are the slowest. */
const callTimeoutMs = 60_000;

/** Docker refused a call. */
export class EngineCallError extends Error {
  override readonly name = "EngineCallError";
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

export interface EngineCall {
  readonly method?: "GET" | "POST" | "PUT" | "DELETE";
  readonly path: string;
  readonly query?: Readonly<Record<string, string | readonly string[]>>;
  /** An object is sent as JSON, bytes as a tar archive. */
  readonly body?: object | Uint8Array;
  readonly headers?: Readonly<Record<string, string>>;
  readonly timeoutMs?: number;
}

/** Calls the engine and returns the answer's text. A status of 400 and more, and an answer that holds an error, throws. */
export async function callEngine(socketPath: string, call: EngineCall): Promise<string> {
  const query = new URLSearchParams();
  for (const [name, values] of Object.entries(call.query ?? {})) {
    for (const value of typeof values === "string" ? [values] : values) query.append(name, value);
  }
  const bytes = call.body instanceof Uint8Array;
  const body =
    call.body === undefined ? undefined : call.body instanceof Uint8Array ? call.body : JSON.stringify(call.body);
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const outgoing = request(
    {
      socketPath,
      method: call.method ?? "GET",
      path: `${call.path}?${query}`,
      headers: {
        host: "docker",
        ...(body === undefined
          ? {}
          : {
              "content-type": bytes ? "application/x-tar" : "application/json",
              "content-length": String(Buffer.byteLength(body)),
            }),
        ...call.headers,
      },
      agent: false,
      signal: AbortSignal.timeout(call.timeoutMs ?? callTimeoutMs),
    },
    (incoming) => {
      let text = "";
      incoming.setEncoding("utf8");
      incoming.on("data", (part: string) => (text += part));
      incoming.on("error", reject);
      incoming.on("end", () => {
        const status = incoming.statusCode ?? 0;
        // Streams of progress answer 200 and name a failure in a line of theirs.
        const failed = status >= 400 || text.includes('"errorDetail"');
        if (failed)
          reject(new EngineCallError(status, `${call.method ?? "GET"} ${call.path}: ${status} ${text.trim()}`));
        else resolve(text);
      });
    },
  );
  outgoing.on("error", reject);
  outgoing.end(body);
  return promise;
}

/** Calls the engine and parses its answer. */
export async function callEngineJson(socketPath: string, call: EngineCall): Promise<unknown> {
  const text = await callEngine(socketPath, call);
  return text === "" ? undefined : JSON.parse(text);
}
