/** When to try again: full jitter over an exponential ceiling, and never sooner than the server asks for. */
import { canceledError } from "./errors.ts";

/** How calls are retried. */
export type RetryPolicy = {
  /** Tries in all, the first included. 1 turns retries off. */
  readonly maxAttempts: number;
  /** Ceiling of the first wait; each wait's ceiling is twice the one before. */
  readonly baseDelayMs: number;
  /** Ceiling of every wait. */
  readonly maxDelayMs: number;
};

/** Six tries within about three seconds ride out a restart of one replica without hiding an outage for long. */
export const defaultRetryPolicy: RetryPolicy = { maxAttempts: 6, baseDelayMs: 100, maxDelayMs: 5_000 };

/**
 * The wait before try number `attempt` + 1, in milliseconds: uniform between 0 and the ceiling, because a fleet
 * of clients that waits equal times comes back as one. What the server asks for is added, not jittered away.
 *
 * @param random Uniform in [0, 1).
 */
export function retryDelayMs(
  policy: RetryPolicy,
  attempt: number,
  retryAfterMs: number | undefined,
  random: () => number = Math.random,
): number {
  const ceilingMs = Math.min(policy.maxDelayMs, policy.baseDelayMs * 2 ** Math.min(attempt - 1, 30));
  return (retryAfterMs ?? 0) + random() * ceilingMs;
}

/** Waits. Rejects with a ClodeiError (CANCELED) as soon as the signal is aborted. */
export function sleep(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted === true) {
      reject(canceledError(signal));
      return;
    }
    const onAbort = () => {
      clearTimeout(timer);
      if (signal !== undefined) reject(canceledError(signal));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", onAbort);
      resolve();
    }, ms);
    signal?.addEventListener("abort", onAbort, { once: true });
  });
}
