// Waits between connections, with full jitter: a control plane that comes back meets its fleet spread over the whole
// span and not in waves.

/**
 * The longest wait where nobody answered, however long the outage is. A node is back, and its status right, within 5 s
 * of the control plane's return: after this wait, or after the second that a dial to a silent host has left and this
 * wait, it needs one connection and a few messages. A fleet of 2,000 that finds nobody knocks 1,300 times a second,
 * which costs refused packets alone. On the return it comes spread over the 3 s, each node once: who finds the control
 * plane busy then waits in the handshake, up to 10 s, and for Welcome, up to 15, instead of knocking again. So a large
 * fleet is back when its handshakes are done: 300 nodes took no longer with this cap than with one of 10 s.
 */
export const maxAwayBackoffMs = 3_000;
/** The longest wait after an answer that was a refusal: each try costs the control plane a handshake and a look. */
export const maxRefusedBackoffMs = 10_000;
const firstBackoffMs = 250;

/** A random wait after the `failures`-th failure in a row, from nothing up to the cap. */
export function backoffMs(failures: number, maxMs: number, random: () => number = Math.random): number {
  const span = Math.min(maxMs, firstBackoffMs * 2 ** Math.min(Math.max(failures, 1) - 1, 16));
  return random() * span;
}

/** An interval 10 % longer or shorter, so that heartbeats of a fleet drift apart. */
export function jitterMs(intervalMs: number, random: () => number = Math.random): number {
  return intervalMs * (0.9 + 0.2 * random());
}
