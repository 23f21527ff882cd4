// Keeps the node connected: session after session, with the certificate as it is then. What the control plane says at
// the end of a session decides what comes next: reconnect, wait in quarantine, stop for good.

import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { Logger } from "pino";
import { messageOf, reasonOf } from "../error-reason.ts";
import type { Identity, IdentityStore } from "../identity/identity-store.ts";
import { CertificateTooOldError, isExpired, renewalTimeMs, renewExpired, renewOverLink } from "../identity/renewal.ts";
import { sleep } from "../sleep.ts";
import { backoffMs, maxAwayBackoffMs, maxRefusedBackoffMs } from "./backoff.ts";
import { connectLink } from "./connection.ts";
import { Session } from "./session.ts";
import type { SessionEnd, SessionOptions } from "./session.ts";

/** A renewal that failed is tried again after this; half of a certificate's life is left for it. */
const renewalRetryMs = 30_000;
/** How often a node in quarantine, or one that only an operator can help, asks again. */
const waitForOperatorMs = 20_000;
/** Sessions that lived so long end a row of failures. */
const steadyMs = 10_000;
/** What a control plane asks its agents to spread over is believed up to here. */
const maxReconnectWithinMs = 100_000;

/** Why the link ended for good. */
export type LinkEnd = "stopped" | "replaced" | "revoked";

/** What the link works with. */
export interface LinkOptions extends Omit<SessionOptions, "client"> {
  readonly store: IdentityStore;
  readonly identity: Identity;
  /** Told when the control plane revoked the node or put it in quarantine, and when it took it back. */
  readonly onStanding: (standing: "none" | "quarantined" | "revoked") => void;
}

/** The node's link to the control plane. */
export class Link {
  readonly #options: LinkOptions;
  readonly #log: Logger;
  #identity: Identity;
  /** Where the clocks of node and CA are half a life apart, a new certificate is due at once: not in a circle. */
  #renewNotBeforeMs = 0;
  #renewedExpiredMs = Number.NEGATIVE_INFINITY;

  constructor(options: LinkOptions) {
    this.#options = options;
    this.#log = options.log;
    this.#identity = options.identity;
  }

  /** Stays connected until the signal, or until the control plane ends it for good. */
  async run(signal: AbortSignal): Promise<LinkEnd> {
    let failures = 0;
    while (!signal.aborted) {
      const beginMs = performance.now();
      const end = isExpired(this.#identity.certificate, Date.now())
        ? await this.#renewExpired(signal)
        : await this.#session(signal);
      if (signal.aborted) break;
      if (end === "again") continue;
      const verdict = this.#judge(end);
      if (verdict !== undefined) return verdict;
      failures = end.welcomed && performance.now() - beginMs > steadyMs ? 1 : failures + 1;
      const waitMs = waitAfter(end, failures);
      this.#log.warn(
        { why: end.message, waitMs: Math.round(waitMs) },
        "not connected to the control plane; tries again",
      );
      await sleep(waitMs, signal);
    }
    return "stopped";
  }

  /** What the end of a session means for good; undefined: go on. */
  #judge(end: SessionEnd): LinkEnd | undefined {
    if (end.reason === ErrorReason.SESSION_REPLACED) {
      this.#log.error("another process of this node's identity took the session over: this one ends");
      return "replaced";
    }
    if (end.reason === ErrorReason.NODE_REVOKED) {
      this.#log.error({ why: end.message }, "the node was revoked: its instances are stopped, their workspaces stay");
      this.#options.onStanding("revoked");
      return "revoked";
    }
    if (end.reason === ErrorReason.NODE_QUARANTINED) {
      this.#log.error(
        { why: end.message },
        "the node is in quarantine until an operator enrolls it again: what runs goes on",
      );
      this.#options.onStanding("quarantined");
    }
    return undefined;
  }

  /** Runs one session, and renews the certificate in it when it is time. */
  async #session(signal: AbortSignal): Promise<SessionEnd | "again"> {
    using connection = connectLink(this.#identity);
    const renewed = new AbortController();
    const session = new Session({
      ...this.#options,
      client: connection.client,
      onWelcome: (sessionId) => {
        this.#log.info({ sessionId }, "connected to the control plane");
        this.#options.onStanding("none");
        this.#options.onWelcome(sessionId);
      },
    });
    const ended = new AbortController();
    const renewal = this.#renewInTime(connection.client, renewed, AbortSignal.any([signal, ended.signal]));
    const end = await session.run(AbortSignal.any([signal, renewed.signal]));
    ended.abort();
    await renewal;
    // It ran out in the session, or this node's clock is behind: neither takes an operator.
    const mayRenew = performance.now() - this.#renewedExpiredMs >= expiredRenewalGapMs;
    if (end.reason === ErrorReason.CERTIFICATE_INVALID && mayRenew) return await this.#renewExpired(signal);
    return renewed.signal.aborted && end.reason === undefined ? "again" : end;
  }

  async #renewInTime(client: SessionOptions["client"], renewed: AbortController, signal: AbortSignal): Promise<void> {
    let atMs = Math.max(renewalTimeMs(this.#identity.certificate), this.#renewNotBeforeMs);
    while (!signal.aborted) {
      // A timer takes 24 days at most, and a machine may have slept: look at the clock again and again.
      await sleep(Math.min(60_000, Math.max(0, atMs - Date.now())), signal);
      if (signal.aborted || Date.now() < atMs) continue;
      try {
        this.#identity = await renewOverLink(this.#options.store, this.#identity, client, signal);
        this.#log.info(
          { expireTime: this.#identity.certificate.validToDate.toISOString() },
          "renewed the node's certificate",
        );
        this.#renewNotBeforeMs = Date.now() + renewalGapMs(this.#identity);
        // The new certificate is used at once: a new session, which shows the secret of this one.
        return renewed.abort();
      } catch (error) {
        if (signal.aborted) return;
        this.#log.warn({ error: messageOf(error) }, "renewing the node's certificate failed; it is tried again");
        atMs = Date.now() + renewalGapMs(this.#identity);
      }
    }
  }

  async #renewExpired(signal: AbortSignal): Promise<SessionEnd | "again"> {
    try {
      this.#identity = await renewExpired(this.#options.store, this.#identity, signal);
      this.#log.info(
        { expireTime: this.#identity.certificate.validToDate.toISOString() },
        "renewed the certificate that had run out",
      );
      this.#renewedExpiredMs = performance.now();
      return "again";
    } catch (error) {
      if (error instanceof CertificateTooOldError) this.#log.error(error.message);
      return { welcomed: false, reason: reasonOf(error), message: messageOf(error), reconnectWithinMs: undefined };
    }
  }
}

/** A control plane that takes no certificate of its own, because its replicas' clocks disagree, is not asked in a circle. */
const expiredRenewalGapMs = 10_000;

/** The least time between two renewals. */
function renewalGapMs({ certificate }: Identity): number {
  const lifeMs = certificate.validToDate.getTime() - certificate.validFromDate.getTime();
  return Math.min(renewalRetryMs, lifeMs / 20);
}

/** How long to wait after a session, or a renewal, that ended so, the `failures`-th in a row. */
export function waitAfter(end: SessionEnd, failures: number, random: () => number = Math.random): number {
  switch (end.reason) {
    case ErrorReason.NODE_QUARANTINED:
    case ErrorReason.CERTIFICATE_INVALID:
    case ErrorReason.VERSION_NOT_SUPPORTED:
      return waitForOperatorMs * (0.5 + 0.5 * random());
    case undefined:
      return backoffMs(failures, maxAwayBackoffMs, random);
    default:
      return end.reconnectWithinMs === undefined
        ? backoffMs(failures, maxRefusedBackoffMs, random)
        : random() * Math.min(Math.max(end.reconnectWithinMs, 0), maxReconnectWithinMs);
  }
}
