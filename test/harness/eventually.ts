// Waiting for what must become true by itself.
import { setTimeout as sleep } from "node:timers/promises";

const pollMs = 50;

/** Runs `check` until it no longer throws and returns its value; throws its last error when the time is over. */
export async function eventually<T>(timeoutMs: number, check: () => T | Promise<T>): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    try {
      return await check();
    } catch (error) {
      if (performance.now() > deadline) throw error;
      await sleep(pollMs);
    }
  }
}
