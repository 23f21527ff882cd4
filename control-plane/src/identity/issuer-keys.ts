// An issuer's public keys: fetched when first needed, kept for ten minutes, fetched again early for a key that is
// not there (a rotation), and never more often than a stranger's tokens should make us.
import { createLocalJWKSet, errors, type FlattenedJWSInput, type JSONWebKeySet, type JWTHeaderParameters } from "jose";
import type { Clock } from "../platform/clock.ts";
import { fetchBounded } from "./fetch-json.ts";

type KeySet = ReturnType<typeof createLocalJWKSet>;

/** As long as an issuer that keeps to RFC 7517 announces a new key before it uses it; and a withdrawn one lives on. */
const freshMs = 10 * 60_000;
/** While the issuer does not answer, the last keys are good: its outage is not ours. Then a withdrawn key must be gone. */
const staleMs = 60 * 60_000;
/** Between two fetches: a token with an unknown key makes one at most, and an issuer that is down is asked seldom. */
const cooldownMs = 10_000;
const maxKeys = 64;

/** The issuer's keys cannot be had now. Says nothing about a token. */
export class KeysUnavailable extends Error {
  constructor(cause: unknown) {
    super("the issuer's keys cannot be fetched", { cause });
    this.name = "KeysUnavailable";
  }
}

/** The keys of one issuer. */
export class IssuerKeys {
  readonly #url: URL;
  readonly #clock: Clock;
  #keys: { readonly set: KeySet; readonly timeMs: number } | undefined;
  #lastTryMs = Number.NEGATIVE_INFINITY;
  #lastError: unknown;
  #pending: Promise<void> | undefined;

  constructor(url: URL, clock: Clock) {
    this.#url = url;
    this.#clock = clock;
  }

  /** The key that a token's header names. @throws KeysUnavailable; errors of jose where there is no such key. */
  async keyOf(header: JWTHeaderParameters, token: FlattenedJWSInput): Promise<Awaited<ReturnType<KeySet>>> {
    const age = this.#ageMs();
    if (age > freshMs) await this.#refresh();
    const set = this.#usable();
    try {
      return await set(header, token);
    } catch (error) {
      if (!(error instanceof errors.JWKSNoMatchingKey) || this.#isCoolingDown()) throw error;
      await this.#refresh();
      return this.#usable()(header, token);
    }
  }

  #usable(): KeySet {
    if (this.#keys === undefined || this.#ageMs() > staleMs) throw new KeysUnavailable(this.#lastError);
    return this.#keys.set;
  }

  #ageMs(): number {
    return this.#keys === undefined ? Number.POSITIVE_INFINITY : this.#clock().getTime() - this.#keys.timeMs;
  }

  #isCoolingDown(): boolean {
    return this.#clock().getTime() - this.#lastTryMs < cooldownMs;
  }

  /** Fetches, once for everybody who waits. A failure is remembered, and never thrown: older keys may do. */
  async #refresh(): Promise<void> {
    if (this.#pending === undefined) {
      if (this.#isCoolingDown()) return;
      this.#lastTryMs = this.#clock().getTime();
      this.#pending = this.#fetch().finally(() => {
        this.#pending = undefined;
      });
    }
    await this.#pending;
  }

  async #fetch(): Promise<void> {
    try {
      const { status, body } = await fetchBounded(this.#url, { accept: "application/jwk-set+json, application/json" });
      if (status !== 200) throw new Error(`the key set of ${this.#url.host} answered with status ${status}`);
      this.#keys = { set: createLocalJWKSet(readKeySet(JSON.parse(body))), timeMs: this.#clock().getTime() };
    } catch (error) {
      this.#lastError = error;
    }
  }
}

/** Only the keys that could ever be used: others (RSA, symmetric ones by mistake) are no business of ours. */
function readKeySet(value: unknown): JSONWebKeySet {
  if (typeof value !== "object" || value === null || !("keys" in value) || !Array.isArray(value.keys)) {
    throw new Error("the answer is no key set");
  }
  const keys = value.keys.filter(isP256Key);
  if (keys.length > maxKeys) throw new Error(`the key set has more than ${maxKeys} keys`);
  return { keys };
}

function isP256Key(key: unknown): key is JSONWebKeySet["keys"][number] {
  return (
    typeof key === "object" && key !== null && "kty" in key && key.kty === "EC" && "crv" in key && key.crv === "P-256"
  );
}
