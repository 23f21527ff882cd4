/**
 * Reads a stream through breaks: when the connection is cut or the server drains, it is opened again from where
 * it stood. What "where it stood" means is the caller's (a cursor, positions); when and how long to try is here.
 */
import { type RetryPolicy, retryDelayMs, sleep } from "./backoff.ts";
import { ClodeiError, toClodeiError } from "./errors.ts";

/** How a stream is kept up. */
export type ResumePolicy = {
  readonly retry: RetryPolicy;
  /** How long the first opening may take. */
  readonly openWithinMs: number;
  /** How long a stream that stood may be away before its error is passed on. */
  readonly giveUpAfterMs: number;
  isTransient(error: ClodeiError): boolean;
};

/** Long enough for a control plane to be replaced, short enough that nobody waits for nothing. */
export const defaultGiveUpAfterMs = 5 * 60 * 1000;

/** A stream that stood for this long was well, although it had nothing to say. */
const wellAfterMs = 1_000;

/** What is read, and from where. */
export type ResumableStream<M> = {
  /** Opens the stream from where it stands now. Ended by the signal. */
  open(signal: AbortSignal): AsyncIterable<M>;
  /** Whether an end without an error is the end; otherwise the stream is opened again. */
  isComplete(): boolean;
  /** Looks at an error that is not transient: true when the caller changed where the stream stands, to open it again at once. */
  recover?(error: ClodeiError): boolean;
};

/** Yields the stream's messages. Returning early (break) ends the open stream. */
export async function* readResuming<M>(
  stream: ResumableStream<M>,
  policy: ResumePolicy,
  callerSignal: AbortSignal | undefined,
): AsyncGenerator<M, void, undefined> {
  let aliveMs = performance.now();
  let limitMs = policy.openWithinMs;
  for (let attempt = 1; ; attempt++) {
    const controller = new AbortController();
    const signal = callerSignal === undefined ? controller.signal : AbortSignal.any([callerSignal, controller.signal]);
    const openedMs = performance.now();
    let failure: ClodeiError;
    try {
      for await (const message of stream.open(signal)) {
        attempt = 0;
        yield message;
      }
      if (stream.isComplete()) return;
      failure = new ClodeiError("unavailable", "UNAVAILABLE", "the server ended the stream");
    } catch (cause) {
      failure = toClodeiError(cause);
      if (stream.recover?.(failure) === true) continue;
      if (!policy.isTransient(failure)) throw failure;
    } finally {
      // The iterables of Connect have no return(): only the signal ends the stream on the wire.
      controller.abort();
    }
    const nowMs = performance.now();
    if (attempt === 0 || nowMs - openedMs >= wellAfterMs) {
      attempt = 0;
      aliveMs = nowMs;
      limitMs = policy.giveUpAfterMs;
    }
    const delayMs = retryDelayMs(policy.retry, attempt + 1, failure.retryAfterMs);
    if (nowMs + delayMs - aliveMs > limitMs) throw failure;
    await sleep(delayMs, callerSignal);
  }
}
