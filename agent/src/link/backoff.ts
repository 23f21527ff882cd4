// Waits between connections, with full jitter: a control plane that comes back meets its fleet spread over the whole
// span and not in waves.

/** The longest wait after a failed connection. */
export const maxBackoffMs = 10_000;
const firstBackoffMs = 250;

/** A random wait after the `failures`-th failure in a row, from nothing up to the cap. */
export function backoffMs(failures: number, random: () => number = Math.random): number {
  const span = Math.min(maxBackoffMs, firstBackoffMs * 2 ** Math.min(Math.max(failures, 1) - 1, 16));
  return random() * span;
}

/** An interval 10 % longer or shorter, so that heartbeats of a fleet drift apart. */
export function jitterMs(intervalMs: number, random: () => number = Math.random): number {
  return intervalMs * (0.9 + 0.2 * random());
}
