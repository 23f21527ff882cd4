// Limits on how often one caller, or one address, may ask: a bucket of tokens for each. In memory and for one
// replica, because a limit that needs the database protects nothing.
import { isIPv6 } from "node:net";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import { canonicalAddress } from "./trusted-proxies.ts";

/** How often: so many a second in the long run, and so many at once. */
export type Rate = { readonly perSecond: number; readonly burst: number };

type Bucket = { tokens: number; filledAtMs: number };

/**
 * Fractions of tokens, added up, fall short of what they stand for: so much is no shortage. Who waits as long as told
 * would be refused again otherwise. It is owed to the bucket, so the long run is no faster.
 */
const roundingTokens = 1e-6;

/** Past this many buckets the one that was used longest ago goes: what is forgotten starts full. */
const maxBuckets = 20_000;

/** Limits how often each key asks. */
export class RateLimiter {
  readonly #rate: Rate;
  /** In the order of use, the oldest first. */
  readonly #buckets = new Map<string, Bucket>();

  constructor(rate: Rate) {
    this.#rate = rate;
  }

  /**
   * Takes a token of the key's bucket.
   * @param nowMs a monotonic time.
   * @throws DomainError RATE_LIMITED with the time until there is one.
   */
  take(key: string, nowMs: number = performance.now()): void {
    const bucket = this.#buckets.get(key) ?? { tokens: this.#rate.burst, filledAtMs: nowMs };
    this.#buckets.delete(key);
    this.#buckets.set(key, bucket);
    const gained = ((nowMs - bucket.filledAtMs) / 1_000) * this.#rate.perSecond;
    bucket.tokens = Math.min(this.#rate.burst, bucket.tokens + gained);
    bucket.filledAtMs = nowMs;
    if (this.#buckets.size > maxBuckets) {
      const [oldest] = this.#buckets.keys();
      if (oldest !== undefined) this.#buckets.delete(oldest);
    }
    if (bucket.tokens >= 1 - roundingTokens) {
      bucket.tokens -= 1;
      return;
    }
    const retryAfterMs = Math.ceil(((1 - bucket.tokens) / this.#rate.perSecond) * 1_000);
    throw new DomainError(ErrorReason.RATE_LIMITED, "too many requests: slow down", { retryAfterMs });
  }
}

/** The part of an address that one user holds: all of IPv4's, and the /64 of IPv6's. */
export function limitedAddressOf(text: string): string {
  const address = canonicalAddress(text) ?? text;
  if (!isIPv6(address)) return address;
  const [head = "", tail] = address.split("::");
  const groups = head === "" ? [] : head.split(":");
  const rest = tail === undefined || tail === "" ? [] : tail.split(":");
  const zeros =
    tail === undefined ? [] : Array.from({ length: Math.max(0, 8 - groups.length - rest.length) }, () => "0");
  return `${[...groups, ...zeros, ...rest].slice(0, 4).join(":")}::/64`;
}
