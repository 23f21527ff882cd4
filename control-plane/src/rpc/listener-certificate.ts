// Keeps a listener's certificate fresh without a restart: a new one is taken when the old one says so.
import { setTimeout as sleep } from "node:timers/promises";
import type { Log } from "../platform/log.ts";

/** A certificate, and when to look for the next one. */
export type FreshCertificate = {
  readonly certificateChainPem: string;
  readonly privateKeyPem: string;
  readonly renewTime: Date;
};

/** Node's timers end at 2^31 ms. */
const maxSleepMs = 24 * 60 * 60 * 1_000;
/** Between two tries, where one failed. */
const retryMs = 60_000;

/** Renews a certificate at its time, and hands the new one on, until disposed of. */
export function keepCertificateFresh(options: {
  /** For the log: whose certificate it is. */
  readonly listener: "public" | "node" | "replica";
  readonly first: FreshCertificate;
  readonly obtain: () => Promise<FreshCertificate>;
  readonly use: (certificate: FreshCertificate) => void;
  readonly log: Log;
}): AsyncDisposable {
  const stop = new AbortController();
  const running = keepFresh(options, stop.signal);
  return {
    async [Symbol.asyncDispose]() {
      stop.abort();
      await running;
    },
  };
}

async function keepFresh(options: Parameters<typeof keepCertificateFresh>[0], signal: AbortSignal): Promise<void> {
  let { renewTime } = options.first;
  while (!signal.aborted) {
    const waitMs = Math.max(1_000, renewTime.getTime() - Date.now());
    await sleep(Math.min(waitMs, maxSleepMs), undefined, { signal }).catch(() => undefined);
    if (signal.aborted || Date.now() < renewTime.getTime()) continue;
    try {
      const next = await options.obtain();
      options.use(next);
      ({ renewTime } = next);
    } catch (error) {
      const { listener } = options;
      options.log.error({ err: error, listener }, "a listener's certificate could not be renewed");
      renewTime = new Date(Date.now() + retryMs);
    }
  }
}
