// The way every call to Docker goes: over one socket, with a time limit and the caller's signal, in bounded memory, and
// with errors that tell an engine that is away from one that refuses. Over node:http alone: docs/decisions has why.
import { type IncomingMessage, request } from "node:http";
import { addAbortSignal, type Readable } from "node:stream";
import { EngineError } from "./engine-error.ts";

/** For calls that only look something up. */
const lookTimeoutMs = 30_000;
/** For calls that change something. Under load an engine took 10 s for a start. */
export const changeTimeoutMs = 120_000;
/** The largest answer that is taken as one: a list of thousands of containers stays below it. */
const maxAnswerBytes = 64 * 1024 * 1024;
/** What of a refusal is read. */
const maxRefusalBytes = 64 * 1024;

const messageCharacters = 1024;

/** A call to Docker's API. */
export interface EngineCall {
  readonly method: "GET" | "POST" | "DELETE";
  /** Without the query. Names in it are ours, or an image's reference, and need no escaping. */
  readonly path: string;
  readonly query?: Readonly<Record<string, string>>;
  /** Sent as JSON. */
  readonly body?: object;
  readonly headers?: Readonly<Record<string, string>>;
  /** Until its answer has been read. Default: 30 s to look, 120 s to change. None for `wait` and `stream`. */
  readonly timeoutMs?: number;
}

/** The engine answered, and said no. */
class EngineRefusal extends Error {
  override readonly name = "EngineRefusal";
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

/**
 * Docker's API with limits. Each method throws the signal's reason when that was aborted, and EngineError for all else;
 * its `what` completes the sentence "could not …".
 */
export class DockerClient {
  readonly #socketPath: string;

  constructor(socketPath: string) {
    this.#socketPath = socketPath;
  }

  /** Makes a call, and returns its answer's JSON; undefined where the answer is empty. */
  json(what: string, call: EngineCall, signal: AbortSignal): Promise<unknown> {
    return this.read(what, call, signal, async (body) => {
      const text = (await readAll(body, maxAnswerBytes, () => new Error("its answer is without end"))).toString();
      return text.trim() === "" ? undefined : (JSON.parse(text) as unknown);
    });
  }

  /** Looks something up. */
  get(what: string, path: string, signal: AbortSignal, query: EngineCall["query"] = {}): Promise<unknown> {
    return this.json(what, { method: "GET", path, query }, signal);
  }

  /** Makes a call, and has its answer's body read as it comes. */
  read<T>(what: string, call: EngineCall, signal: AbortSignal, read: (body: Readable) => Promise<T>): Promise<T> {
    const timeoutMs = call.timeoutMs ?? (call.method === "GET" ? lookTimeoutMs : changeTimeoutMs);
    return this.#limited(what, signal, timeoutMs, async (limit) => read(await this.#send(call, limit)));
  }

  /**
   * Makes a call whose answer's body comes only when something happens, for as long as that takes, and reads it to its
   * end. Fails as soon as the connection breaks.
   */
  async wait(what: string, call: EngineCall, signal: AbortSignal): Promise<void> {
    for await (const _ of this.stream(what, call, signal));
  }

  /** The same, and hands on what comes. */
  async *stream(what: string, call: EngineCall, signal: AbortSignal): AsyncGenerator<Buffer> {
    signal.throwIfAborted();
    try {
      yield* (await this.#send(call, signal)) as AsyncIterable<Buffer>;
    } catch (error) {
      signal.throwIfAborted();
      throw engineError(what, error);
    }
  }

  async #limited<T>(
    what: string,
    signal: AbortSignal,
    timeoutMs: number,
    work: (limit: AbortSignal) => Promise<T>,
  ): Promise<T> {
    signal.throwIfAborted();
    const timeout = AbortSignal.timeout(timeoutMs);
    try {
      return await work(AbortSignal.any([signal, timeout]));
    } catch (error) {
      signal.throwIfAborted();
      if (timeout.aborted) {
        throw new EngineError("away", `the container engine did not ${what} within ${timeoutMs} ms`, { cause: error });
      }
      throw engineError(what, error);
    }
  }

  /** Resolves with the body of an answer that is no refusal. The signal ends the reading of it, too. */
  async #send(call: EngineCall, signal: AbortSignal): Promise<IncomingMessage> {
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
    const query = new URLSearchParams(call.query).toString();
    const body = call.body === undefined ? undefined : JSON.stringify(call.body);
    const outgoing = request({
      socketPath: this.#socketPath,
      method: call.method,
      path: query === "" ? call.path : `${call.path}?${query}`,
      headers: {
        host: "docker",
        ...(body === undefined
          ? {}
          : { "content-type": "application/json", "content-length": String(Buffer.byteLength(body)) }),
        ...call.headers,
      },
      // A connection for each call: a kept one breaks the first call after the engine's restart, and opening one on a
      // unix socket takes a tenth of a millisecond.
      agent: false,
      signal,
    });
    outgoing.on("response", resolve);
    outgoing.on("error", reject);
    outgoing.end(body);
    // The request's signal ends with its head.
    const answer = addAbortSignal(signal, await promise);
    const status = answer.statusCode ?? 0;
    if (status < 200 || status > 299) throw await readRefusal(status, answer);
    return answer;
  }
}

/** Reads a body whole. @param tooLong Makes the error of one that has more bytes than that. */
export async function readAll(body: Readable, maxBytes: number, tooLong: () => Error): Promise<Buffer> {
  const parts: Buffer[] = [];
  let bytes = 0;
  for await (const part of body as AsyncIterable<Buffer>) {
    bytes += part.length;
    if (bytes > maxBytes) throw tooLong();
    parts.push(part);
  }
  return Buffer.concat(parts);
}

/** Docker says why as {"message": "…"}. Whatever else answers there says it as it likes. */
async function readRefusal(status: number, answer: IncomingMessage): Promise<EngineRefusal> {
  const text = (
    await readAll(answer, maxRefusalBytes, () => new EngineRefusal(status, "its words are without end"))
  ).toString();
  let said: unknown;
  try {
    said = JSON.parse(text);
  } catch {
    // Plain words.
  }
  const named = typeof said === "object" && said !== null && "message" in said ? said.message : undefined;
  const words = (typeof named === "string" ? named : text).trim().slice(0, messageCharacters);
  return new EngineRefusal(status, words === "" ? `status ${status}` : words);
}

/** Sorts the error of a call. */
export function engineError(what: string, error: unknown): EngineError {
  if (error instanceof EngineError) return error;
  const refusal = refusalOf(error);
  if (refusal === undefined) {
    const text = error instanceof Error ? error.message : String(error);
    return isBrokenConnection(error)
      ? new EngineError("away", `the container engine does not answer (${text})`, { cause: error })
      : new EngineError("failed", `could not ${what}: ${text}`, { cause: error });
  }
  const message = `could not ${what}: ${refusal.message}`;
  // An engine that is being stopped, or that has lost its containerd, answers like this.
  if (
    /shutting down|containerd.*(connection refused|closed)|ttrpc: closed|transport is closing/i.test(refusal.message)
  ) {
    return new EngineError("away", message, { cause: error });
  }
  return new EngineError(refusal.status === 404 ? "not_found" : "failed", message, { cause: error });
}

/** Whether the call failed between us and the engine. Anything else is a mistake, and says nothing of the engine. */
function isBrokenConnection(error: unknown): boolean {
  // JSON that was cut off.
  if (error instanceof SyntaxError) return true;
  // Of the system, of streams and of the HTTP parser. Node marks what it was called wrongly with as TypeErrors.
  return error instanceof Error && "code" in error && !(error instanceof TypeError || error instanceof RangeError);
}

/** The engine's answer, where it refused: status and its own words. */
export function refusalOf(error: unknown): Pick<EngineRefusal, "status" | "message"> | undefined {
  const cause = error instanceof EngineError ? error.cause : error;
  return cause instanceof EngineRefusal ? cause : undefined;
}

/** Whether the call failed because what it names is not there. */
export function isMissing(error: unknown): boolean {
  return refusalOf(error)?.status === 404;
}

/** Swallows the engine's refusals with these statuses, which say that there is nothing to do. */
export function unless(...statuses: readonly number[]): (error: unknown) => void {
  return (error) => {
    if (!statuses.includes(refusalOf(error)?.status ?? 0)) throw error;
  };
}
