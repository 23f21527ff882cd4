/**
 * What every call gets, raw clients included: credentials, a deadline, an idempotency key, retries where they
 * are safe, and typed errors. It is a transport around the platform's transport, so nothing can go past it.
 */
import type { DescMessage, DescMethodStreaming, DescMethodUnary, MessageInitShape } from "@bufbuild/protobuf";
import { MethodOptions_IdempotencyLevel } from "@bufbuild/protobuf/wkt";
import {
  ConnectError,
  type ContextValues,
  type StreamResponse,
  type Transport,
  type UnaryResponse,
} from "@connectrpc/connect";
import { type RetryPolicy, retryDelayMs, sleep } from "./backoff.ts";
import type { Authorize } from "./credentials.ts";
import { canceledError, ClodeiError, toClodeiError } from "./errors.ts";
import { withIdempotencyKey } from "./idempotency-key.ts";
import { checkOptions, checkRequest, optionNames } from "./request-check.ts";
import type { Wire } from "./wire.ts";

/** Options of a single call. */
export type CallOptions = {
  /** Cancels the call: it rejects with the reason CANCELED. */
  readonly signal?: AbortSignal | undefined;
  /**
   * Milliseconds that the call may take, its retries included; then it rejects with DEADLINE_EXCEEDED. The
   * client's own where absent; 0 for none.
   */
  readonly timeoutMs?: number | undefined;
};

/** Options of a call that changes something. */
export type MutationOptions = CallOptions & {
  /**
   * At most 64 characters. The same key and content within 24 hours has one effect, however often it is sent.
   * Made by the SDK for each call where absent: give one to make your own retries safe, beyond one process.
   */
  readonly idempotencyKey?: string | undefined;
};

/** The options of every call. */
export const callNames = optionNames<CallOptions>({ signal: true, timeoutMs: true });

/** The options of a call that changes something. */
export const mutationNames = optionNames<MutationOptions>({ signal: true, timeoutMs: true, idempotencyKey: true });

/**
 * The options of a call as Connect's clients take them.
 *
 * @param names The options that the method has. Others are refused.
 */
export function callOptions(
  options: CallOptions,
  names: readonly string[] = callNames,
): { signal?: AbortSignal; timeoutMs?: number } {
  checkOptions(options, names);
  const { signal, timeoutMs } = options;
  return { ...(signal === undefined ? {} : { signal }), ...(timeoutMs === undefined ? {} : { timeoutMs }) };
}

/** What the calls of a client have in common. */
export type CallDefaults = {
  readonly wire: Wire;
  readonly authorize: Authorize;
  readonly retry: RetryPolicy;
  /** For unary calls; streams live until they are ended. */
  readonly timeoutMs: number;
  /** Aborted when the client is closed. */
  readonly closeSignal: AbortSignal;
};

/** The transport that all clients of the SDK use. */
export class CallTransport implements Transport {
  readonly #defaults: CallDefaults;

  constructor(defaults: CallDefaults) {
    this.#defaults = defaults;
  }

  async unary<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    callerSignal: AbortSignal | undefined,
    timeoutMs: number | undefined,
    header: HeadersInit | undefined,
    input: MessageInitShape<I>,
    contextValues?: ContextValues,
  ): Promise<UnaryResponse<I, O>> {
    const { wire, retry } = this.#defaults;
    checkRequest(method.input, input);
    const { message, hasKey } = withIdempotencyKey(method.input, input);
    const safe = hasKey || method.idempotency === MethodOptions_IdempotencyLevel.NO_SIDE_EFFECTS;
    const signal = this.#signalOf(callerSignal);
    const limitMs = timeoutMs ?? this.#defaults.timeoutMs;
    const deadlineMs = limitMs > 0 ? performance.now() + limitMs : Number.POSITIVE_INFINITY;
    for (let attempt = 1; ; attempt++) {
      try {
        const headers = await this.#headers(header);
        return await wire.transport.unary(method, signal, remainingMs(deadlineMs), headers, message, contextValues);
      } catch (cause) {
        const error = this.#errorOf(cause, signal);
        if (!safe || attempt >= retry.maxAttempts || !this.isTransient(error)) throw error;
        const delayMs = retryDelayMs(retry, attempt, error.retryAfterMs);
        // The error at hand says more than DEADLINE_EXCEEDED would.
        if (performance.now() + delayMs >= deadlineMs) throw error;
        await sleep(delayMs, signal);
      }
    }
  }

  /** Streams are not retried here: only who reads one knows where to go on. See resume.ts. */
  async stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodStreaming<I, O>,
    callerSignal: AbortSignal | undefined,
    timeoutMs: number | undefined,
    header: HeadersInit | undefined,
    input: AsyncIterable<MessageInitShape<I>>,
    contextValues?: ContextValues,
  ): Promise<StreamResponse<I, O>> {
    const signal = this.#signalOf(callerSignal);
    // Streams of the public API are answers: the request is one message, and it is there.
    const requests = await Array.fromAsync(input);
    for (const request of requests) checkRequest(method.input, request);
    try {
      const headers = await this.#headers(header);
      const { transport } = this.#defaults.wire;
      const response = await transport.stream(method, signal, timeoutMs, headers, each(requests), contextValues);
      return { ...response, message: this.#messages(response.message, signal) };
    } catch (cause) {
      throw this.#errorOf(cause, signal);
    }
  }

  /** Whether the same call may succeed if it is sent again, as far as the error says. */
  isTransient(error: ClodeiError): boolean {
    const { wire, closeSignal } = this.#defaults;
    if (closeSignal.aborted || error.reason === "CANCELED" || error.reason === "DEADLINE_EXCEEDED") return false;
    if (wire.isConnectionLost(error.cause)) return true;
    // Only a server's own word counts: this side says "unavailable" for a host that does not exist, too.
    const fromServer = error.cause instanceof ConnectError && error.cause.isWireError;
    if (error.code === "unavailable") return fromServer;
    return error.retryAfterMs !== undefined && (error.code === "aborted" || error.code === "resource_exhausted");
  }

  async *#messages<T>(messages: AsyncIterable<T>, signal: AbortSignal): AsyncGenerator<T> {
    try {
      yield* messages;
    } catch (cause) {
      throw this.#errorOf(cause, signal);
    }
  }

  #signalOf(callerSignal: AbortSignal | undefined): AbortSignal {
    const { closeSignal } = this.#defaults;
    return callerSignal === undefined ? closeSignal : AbortSignal.any([callerSignal, closeSignal]);
  }

  async #headers(header: HeadersInit | undefined): Promise<Headers> {
    const headers = new Headers(header);
    await this.#defaults.authorize(headers);
    return headers;
  }

  #errorOf(cause: unknown, signal: AbortSignal): ClodeiError {
    if (signal.aborted) return canceledError(signal);
    // Not the transport's: it knows nothing of why.
    if (cause instanceof ClodeiError) return cause;
    const { wire } = this.#defaults;
    const error = toClodeiError(cause);
    const explained = wire.explain(error.cause);
    if (explained === undefined && !wire.isConnectionLost(error.cause)) return error;
    // Whatever the transport makes of it (canceled, aborted, internal): for a caller it is one thing.
    const message = explained ?? `the connection to the control plane was lost: ${error.message}`;
    return new ClodeiError("unavailable", "UNAVAILABLE", message, { cause: error.cause });
  }
}

/** What is left of a deadline, for the transport: undefined for none, and never 0, which would mean none. */
function remainingMs(deadlineMs: number): number | undefined {
  return deadlineMs === Number.POSITIVE_INFINITY ? undefined : Math.max(1, Math.ceil(deadlineMs - performance.now()));
}

async function* each<T>(items: readonly T[]): AsyncGenerator<T> {
  yield* items;
}
