// Whether a user's e-mail address is verified, where the token does not say so: the issuer's user endpoint is asked
// with the user's own token, and its answer is kept. The address itself is neither read nor kept.
import type { Clock } from "../platform/clock.ts";
import type { Log } from "../platform/log.ts";
import { fetchBounded } from "./fetch-json.ts";
import type { UserEndpoint } from "./issuers.ts";

/** How long "verified" is believed: as long as the design allows. */
const verifiedMs = 10 * 60_000;
/** "Not verified" is asked again soon: somebody has just clicked the link in the mail. */
const unverifiedMs = 15_000;
const maxUsers = 10_000;

/** Answers, kept for a while. */
export class VerifiedEmails {
  readonly #clock: Clock;
  readonly #log: Log;
  /** In the order of insertion, so that the oldest goes first. */
  readonly #answers = new Map<string, { readonly verified: boolean; readonly untilMs: number }>();
  readonly #pending = new Map<string, Promise<boolean>>();

  constructor(options: { readonly clock: Clock; readonly log: Log }) {
    this.#clock = options.clock;
    this.#log = options.log;
  }

  /** Whether the user's address is verified. An endpoint that does not answer means no. */
  async isVerified(endpoint: UserEndpoint, subject: string, token: string): Promise<boolean> {
    const key = `${endpoint.url.href} ${subject}`;
    const known = this.#answers.get(key);
    if (known !== undefined && known.untilMs > this.#clock().getTime()) return known.verified;
    let pending = this.#pending.get(key);
    if (pending === undefined) {
      pending = this.#ask(endpoint, subject, token, key).finally(() => this.#pending.delete(key));
      this.#pending.set(key, pending);
    }
    return pending;
  }

  async #ask(endpoint: UserEndpoint, subject: string, token: string, key: string): Promise<boolean> {
    let verified = false;
    try {
      const answer = await fetchBounded(endpoint.url, { ...endpoint.headers, authorization: `Bearer ${token}` });
      verified = answer.status === 200 && saysVerified(JSON.parse(answer.body), subject);
    } catch (error) {
      this.#log.warn({ err: error, host: endpoint.url.host }, "a user endpoint did not answer: taken for unverified");
    }
    this.#answers.delete(key);
    this.#answers.set(key, {
      verified,
      untilMs: this.#clock().getTime() + (verified ? verifiedMs : unverifiedMs),
    });
    const oldest = this.#answers.keys().next();
    if (this.#answers.size > maxUsers && oldest.done !== true) this.#answers.delete(oldest.value);
    return verified;
  }
}

/**
 * Reads the user in the answer, which must be the one who asked. Supabase and its kin say when the address was
 * confirmed, OpenID Connect's userinfo whether it was. What stands in user_metadata is never looked at.
 */
function saysVerified(user: unknown, subject: string): boolean {
  if (typeof user !== "object" || user === null) return false;
  const fields = new Map<string, unknown>(Object.entries(user));
  const id = fields.get("sub") ?? fields.get("id");
  if (id !== subject) return false;
  const confirmTime = fields.get("email_confirmed_at");
  if (typeof confirmTime === "string" && !Number.isNaN(Date.parse(confirmTime))) return true;
  return fields.get("email_verified") === true;
}
