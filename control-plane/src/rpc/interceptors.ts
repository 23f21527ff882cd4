// What stands between the public listener and a handler: a gate before the body is read, and behind it the onion,
// from the outside in: error mapping, authorization, the caller's limit, validation.
import { setTimeout as sleep } from "node:timers/promises";
import type { Message } from "@bufbuild/protobuf";
import { base64Decode } from "@bufbuild/protobuf/wire";
import {
  Code,
  ConnectError,
  type HandlerContext,
  type Interceptor,
  type StreamRequest,
  type UnaryRequest,
} from "@connectrpc/connect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import type { Log } from "../platform/log.ts";
import { authorize, openServices } from "./authorization.ts";
import { anonymousCaller, type Authenticate, type Caller } from "./caller.ts";
import { recordOf, type RequestRecord } from "./context.ts";
import { codeName, isOurs, toConnectError } from "./errors.ts";
import { explainJsonError } from "./json-errors.ts";
import type { Metrics } from "./metrics.ts";
import { limitedAddressOf, type RateLimiter } from "./rate-limit.ts";
import type { RequestValidator } from "./validation.ts";

/** What the gate and the interceptors work with. */
export type PipelineOptions = {
  readonly authenticate: Authenticate;
  /** Whether what a caller was admitted by still holds, for streams that stay open. */
  readonly stillHolds: (caller: Caller) => Promise<boolean>;
  readonly addressLimiter: RateLimiter;
  readonly callerLimiter: RateLimiter;
  readonly validator: RequestValidator;
  /** Aborts when the process drains. */
  readonly shutdownSignal: AbortSignal;
  /** How often an open stream asks again whether its caller still may. */
  readonly recheckMs: number;
  readonly metrics: Pick<Metrics, "openStreams">;
  readonly log: Log;
};

const apiKeyPrefix = /^bearer\s+clodei_/i;
/** Together with the interval of rechecks it stays below a second. */
const sharedAnswerMs = 200;
/** Retries after a drain should not come all at once: the SDK spreads them around this. */
const drainRetryMs = 1_000;
/** Nobody knows when one of them ends. */
const tooManyOpenRetryMs = 1_000;

/** Refuses before the body is read: too many requests, and wrong credentials. */
export function createGate(options: PipelineOptions): (context: HandlerContext) => Promise<void> {
  return async (context) => {
    const record = recordOf(context.values);
    record.method = `${context.service.typeName}/${context.method.name}`;
    record.isStream = context.method.methodKind !== "unary";
    context.responseHeader.set("clodei-request-id", record.requestId);
    completeErrors(context, record, options.log);
    try {
      if (record.hasTooManyOpen) throw tooManyOpenError();
      options.addressLimiter.take(limitedAddressOf(record.address));
      // Health must answer when the database, and so authentication, does not.
      if (!openServices.has(context.service.typeName)) {
        record.caller = await identify(options.authenticate, context.requestHeader);
      }
      // A deadline that is over by now: nothing is read for it any more.
      context.signal.throwIfAborted();
      checkQuery(context);
    } catch (error) {
      throw tell(error, record, options.log);
    }
  };
}

/** Connect does not catch that a message in a URL is not base64, and would call it an error of ours. */
function checkQuery({ requestMethod, url }: HandlerContext): void {
  if (requestMethod !== "GET") return;
  const query = new URL(url).searchParams;
  if (query.get("base64") !== "1") return;
  try {
    base64Decode(query.get("message") ?? "");
  } catch {
    throw new DomainError(ErrorReason.INVALID_ARGUMENT, "the message in the URL is not base64, as base64=1 says");
  }
}

/**
 * Connect makes some errors before an interceptor sees the request: for a body that cannot be read or is too long, and
 * for an unknown compression. It aborts the request with the very error that it sends next, in each of its protocols:
 * there they get their reason, its code, our request id and their bound.
 */
function completeErrors(context: HandlerContext, record: RequestRecord, log: Log): void {
  const complete = (error: unknown): void => {
    // One with details has been through here, or through the interceptors.
    if (!(error instanceof ConnectError) || error.details.length > 0) return;
    const explained = explainJsonError(context.method.input, error.rawMessage);
    const { code, message, rawMessage, details } = tell(explained ?? error, record, log);
    Object.assign(error, { code, message, rawMessage, details });
  };
  // The deadline's own comes by the signal alone. It does not stop the reading of a body, so that another may follow,
  // and that one changes nothing about a signal that is aborted already.
  context.signal.addEventListener("abort", () => complete(context.signal.reason), { once: true });
  // Not in the type, and in the object: where a version has it elsewhere, this throws for every request.
  const abortable = context as HandlerContext & { abort: (reason?: unknown) => void };
  const abort = abortable.abort.bind(context);
  abortable.abort = (reason) => {
    complete(reason);
    abort(reason);
  };
}

/** The onion, the outermost first. */
export function createInterceptors(options: PipelineOptions): Interceptor[] {
  return [errorMapping(options), authorization, callerLimit(options), validation(options)];
}

/** Finds the caller. A key that stands in a web page belongs to everybody who opens it, so none is accepted there. */
async function identify(authenticate: Authenticate, headers: Headers): Promise<Caller> {
  const credentials = headers.get("authorization");
  if (credentials === null || credentials === "") return anonymousCaller;
  const origin = headers.get("origin") ?? undefined;
  if (origin !== undefined && apiKeyPrefix.test(credentials)) {
    throw new DomainError(
      ErrorReason.API_KEY_FROM_BROWSER,
      "API keys are not accepted from a browser: use a user's token there, and revoke this key if others can read it",
    );
  }
  return authenticate(headers, origin);
}

function errorMapping(options: PipelineOptions): Interceptor {
  const access = new AccessChecks(options.stillHolds);
  return (next) => async (request) => {
    const record = recordOf(request.contextValues);
    try {
      const response = await next(request);
      if (response.stream) {
        const guarded = guardStream(response.message, request, options, access);
        return { ...response, message: mapStreamErrors(guarded, request.signal, record, options) };
      }
      record.code = "ok";
      return response;
    } catch (error) {
      throw tell(error, record, options.log);
    }
  };
}

async function* mapStreamErrors<T>(
  messages: AsyncIterable<T>,
  signal: AbortSignal,
  record: RequestRecord,
  options: PipelineOptions,
): AsyncGenerator<T> {
  const [service = "", method = ""] = record.method?.split("/") ?? [];
  options.metrics.openStreams.inc({ service, method });
  try {
    for await (const message of messages) yield message;
    // A handler that sees its signal simply ends, which its caller would take for the end of the data.
    if (options.shutdownSignal.aborted) throw drainError();
    if (isDeadline(signal.reason)) throw signal.reason;
    if (!signal.aborted) record.code = "ok";
  } catch (error) {
    throw tell(error, record, options.log);
  } finally {
    record.code ??= "canceled";
    options.metrics.openStreams.dec({ service, method });
  }
}

function isDeadline(reason: unknown): reason is ConnectError {
  return reason instanceof ConnectError && reason.code === Code.DeadlineExceeded;
}

/**
 * Ends a stream whose caller lost access: it asks again while the stream is open, at an interval that keeps
 * "within a second". That the database cannot be asked takes nobody's access away.
 */
async function* guardStream<T>(
  messages: AsyncIterable<T>,
  request: UnaryRequest | StreamRequest,
  options: PipelineOptions,
  access: AccessChecks,
): AsyncGenerator<T> {
  if (openServices.has(request.service.typeName)) {
    yield* messages;
    return;
  }
  const iterator = messages[Symbol.asyncIterator]();
  const stop = new AbortController();
  let isLost = false;
  // Of the wait that is on now, and no other: a race of every message against one promise that outlives them all
  // would keep them all in memory.
  let refuse = (): void => undefined;
  const next = (): Promise<IteratorResult<T>> =>
    new Promise((resolve, reject) => {
      refuse = () => reject(new DomainError(ErrorReason.PERMISSION_DENIED, "your access ended"));
      if (isLost) refuse();
      else iterator.next().then(resolve, reject);
    });
  const onLost = (): void => {
    isLost = true;
    refuse();
  };
  void watchAccess(recordOf(request.contextValues).caller, options.recheckMs, access, onLost, stop.signal);
  try {
    while (true) {
      const result = await next();
      if (result.done === true) return;
      yield result.value;
    }
  } finally {
    stop.abort();
    // Not awaited: a handler that waits for something ends when its signal aborts, which happens after this.
    iterator.return?.().catch(() => undefined);
  }
}

/** Calls back once what the caller was admitted by no longer holds. Ends then, or when the signal aborts. Never rejects. */
async function watchAccess(
  caller: Caller,
  everyMs: number,
  access: AccessChecks,
  onLost: () => void,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    await sleep(everyMs, undefined, { signal, ref: false }).catch(() => undefined);
    if (signal.aborted) return;
    if (await access.holds(caller)) continue;
    onLost();
    return;
  }
}

/** Streams of one caller share an answer for a moment, so that many of them cost the database what one does. */
class AccessChecks {
  readonly #stillHolds: (caller: Caller) => Promise<boolean>;
  readonly #recent = new Map<string, Promise<boolean>>();

  constructor(stillHolds: (caller: Caller) => Promise<boolean>) {
    this.#stillHolds = stillHolds;
  }

  holds(caller: Caller): Promise<boolean> {
    const key = JSON.stringify(caller, (_, value: unknown) => (value instanceof Set ? [...value] : value));
    const recent = this.#recent.get(key);
    if (recent !== undefined) return recent;
    const answer = this.#stillHolds(caller).catch(() => true);
    this.#recent.set(key, answer);
    setTimeout(() => this.#recent.delete(key), sharedAnswerMs).unref();
    return answer;
  }
}

const authorization: Interceptor = (next) => (request) => {
  authorize(request.method, recordOf(request.contextValues).caller);
  return next(request);
};

function callerLimit(options: PipelineOptions): Interceptor {
  return (next) => (request) => {
    const key = callerKey(recordOf(request.contextValues).caller);
    if (key !== undefined) options.callerLimiter.take(key);
    return next(request);
  };
}

function validation(options: PipelineOptions): Interceptor {
  return (next) => (request) => {
    const { input } = request.method;
    if (!request.stream) {
      options.validator.check(input, request.message);
      return next(request);
    }
    const { message: messages } = request;
    async function* checked(): AsyncGenerator<Message> {
      for await (const message of messages) {
        options.validator.check(input, message);
        yield message;
      }
    }
    return next({ ...request, message: checked() });
  };
}

function callerKey(caller: Caller): string | undefined {
  switch (caller.kind) {
    case "customer":
    case "user":
    case "platform":
      return caller.callerId;
    case "node":
      return caller.nodeId;
    case "replica":
      return caller.replicaId;
    case "anonymous":
      // Limited by address.
      return undefined;
  }
}

/** Maps an error for the caller, notes its code, and gives the log what the caller does not get. */
function tell(error: unknown, record: RequestRecord, log: Log): ConnectError {
  const mapped = toConnectError(error, record.requestId);
  record.code = codeName(mapped.code);
  if (isOurs(error)) log.error({ err: error, requestId: record.requestId, method: record.method }, "a request failed");
  return mapped;
}

function tooManyOpenError(): DomainError {
  return new DomainError(ErrorReason.RATE_LIMITED, "too many requests of your address are open: end some", {
    retryAfterMs: tooManyOpenRetryMs,
  });
}

/** What ends streams, and refuses requests, while the process drains. */
export function drainError(): DomainError {
  return new DomainError(ErrorReason.UNAVAILABLE, "the server is draining: connect again", {
    retryAfterMs: drainRetryMs,
  });
}
