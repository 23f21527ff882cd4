// The way every call to Docker goes: over one socket, with a time limit and the caller's signal, and with errors
// that tell an engine that is away from one that refuses.
import { Agent } from "node:http";
import type { Readable } from "node:stream";
import { inspect } from "node:util";
import Docker from "dockerode";
import { EngineError } from "./engine-error.ts";

/** For calls that only look something up. */
export const lookTimeoutMs = 30_000;
/** For calls that change something. Under load an engine took 10 s for a start. */
export const changeTimeoutMs = 120_000;

const messageCharacters = 1024;

/** What a failed call is known by. */
interface Refusal {
  readonly status: number;
  readonly message: string;
}

/** Docker's API with limits. */
export class DockerClient {
  readonly docker: Docker;

  constructor(socketPath: string) {
    // `host` is cleared because dockerode prefers DOCKER_HOST of the environment to a socket that was asked for.
    // A connection for each call: a kept one breaks the first call after the engine's restart, and opening one on a
    // unix socket takes a tenth of a millisecond.
    const options = {
      socketPath,
      host: undefined,
      port: undefined,
      protocol: "http" as const,
      agent: new BriefAgent({ keepAlive: false }),
    };
    this.docker = new Docker(options);
  }

  /** Looks something up by its path. For those of dockerode's methods whose types take no signal. */
  async get(what: string, path: string, signal: AbortSignal): Promise<unknown> {
    return this.call(what, { signal, timeoutMs: lookTimeoutMs }, (docker, abortSignal) => {
      const { promise, resolve, reject } = Promise.withResolvers<unknown>();
      const statusCodes = { 200: true, 404: "not found", 500: "server error" };
      docker.modem.dial({ path, method: "GET", statusCodes, abortSignal }, (error: Error | null, result: unknown) => {
        if (error === null) resolve(result);
        else reject(error);
      });
      return promise;
    });
  }

  /**
   * Makes a call. Throws the signal's reason when it was aborted, and EngineError for all else.
   *
   * @param what Completes the sentence "could not …".
   */
  async call<T>(
    what: string,
    limits: { readonly signal: AbortSignal; readonly timeoutMs: number },
    work: (docker: Docker, abortSignal: AbortSignal) => Promise<T>,
  ): Promise<T> {
    limits.signal.throwIfAborted();
    const timeout = AbortSignal.timeout(limits.timeoutMs);
    const either = AbortSignal.any([limits.signal, timeout]);
    const aborted = Promise.withResolvers<never>();
    const onAbort = (): void => aborted.reject(new Error("aborted"));
    either.addEventListener("abort", onAbort, { once: true });
    try {
      // dockerode does not always notice when an answer breaks off after its head: the limit ends the call regardless.
      return await Promise.race([work(this.docker, either), aborted.promise]);
    } catch (error) {
      limits.signal.throwIfAborted();
      if (timeout.aborted) {
        throw new EngineError("away", `the container engine did not ${what} within ${limits.timeoutMs} ms`, {
          cause: error,
        });
      }
      throw engineError(what, error);
    } finally {
      either.removeEventListener("abort", onAbort);
    }
  }

  /**
   * Makes a call whose answer's body comes only when something happens, and reads it to its end. Throws EngineError as
   * soon as the connection breaks.
   */
  async wait(what: string, path: string, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    try {
      const { promise, resolve, reject } = Promise.withResolvers<unknown>();
      const statusCodes = { 200: true, 404: "not found", 500: "server error" };
      const call = { path, method: "POST", isStream: true, statusCodes, abortSignal: signal };
      this.docker.modem.dial(call, (error: Error | null, result: unknown) => {
        if (error === null) resolve(result);
        else reject(error);
      });
      for await (const _ of (await promise) as Readable);
    } catch (error) {
      signal.throwIfAborted();
      throw engineError(what, error);
    }
  }
}

/**
 * dockerode's modem inspects each request's options to all depths for its debug log, also where nobody logs. An agent
 * leads from there to every open socket: 20 ms of processor time a call.
 */
class BriefAgent extends Agent {
  [inspect.custom](): string {
    return "Agent";
  }
}

/** Sorts an error of dockerode. */
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

/** The engine's answer, where there was one: status and its own words. */
export function refusalOf(error: unknown): Refusal | undefined {
  const cause = error instanceof EngineError ? error.cause : error;
  if (!(cause instanceof Error) || !("statusCode" in cause) || typeof cause.statusCode !== "number") return undefined;
  const json: unknown = "json" in cause ? cause.json : undefined;
  const inner = typeof json === "object" && json !== null && "message" in json ? json.message : undefined;
  const message = typeof inner === "string" ? inner : cause.message;
  return { status: cause.statusCode, message: message.trim().slice(0, messageCharacters) };
}

/** Whether the call failed because what it names is not there. */
export function isMissing(error: unknown): boolean {
  return refusalOf(error)?.status === 404;
}
