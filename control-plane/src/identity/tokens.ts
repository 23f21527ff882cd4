// Tokens of configured issuers. The algorithm is pinned to ES256, so that neither "none" nor a symmetric key made of
// a public one is ever tried; the issuer picks the keys, and the audience must be ours.
import { decodeJwt, errors, type JWTPayload, jwtVerify } from "jose";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { Clock } from "../platform/clock.ts";
import { DomainError } from "../platform/errors.ts";
import type { Log } from "../platform/log.ts";
import { IssuerKeys, KeysUnavailable } from "./issuer-keys.ts";
import type { JwtIssuer } from "./issuers.ts";
import { VerifiedEmails } from "./verified-email.ts";

/** Clocks of issuers and replicas may differ by so much. */
const clockToleranceSeconds = 30;
/** Node takes headers of 16 KiB and more; a token of ours has one. */
const maxTokenCharacters = 8 * 1024;
/** As long as the column that holds it. */
const maxSubjectBytes = 255;
const keysRetryMs = 5_000;

/** What a good token says. */
export type VerifiedToken = {
  readonly issuer: string;
  readonly subject: string;
  readonly emailVerified: boolean;
  /** From then on it is refused. */
  readonly expireTime: Date;
};

/** Verifies tokens. */
export class TokenVerifier {
  readonly #issuers: ReadonlyMap<string, { readonly issuer: JwtIssuer; readonly keys: IssuerKeys }>;
  readonly #clock: Clock;
  readonly #log: Log;
  readonly #emails: VerifiedEmails;

  constructor(options: { readonly issuers: readonly JwtIssuer[]; readonly clock: Clock; readonly log: Log }) {
    this.#clock = options.clock;
    this.#log = options.log;
    this.#emails = new VerifiedEmails(options);
    this.#issuers = new Map(
      options.issuers.map((issuer) => [issuer.issuer, { issuer, keys: new IssuerKeys(issuer.jwksUrl, options.clock) }]),
    );
  }

  /**
   * Verifies a token: signature, algorithm, issuer, audience, times.
   *
   * @throws DomainError TOKEN_INVALID; UNAVAILABLE where the issuer's keys cannot be had.
   */
  async verify(token: string): Promise<VerifiedToken> {
    if (token.length > maxTokenCharacters) throw tokenInvalid("it is too long");
    const found = this.#issuers.get(unverifiedIssuer(token));
    if (found === undefined) throw tokenInvalid("it is not of an issuer that this server accepts");
    const { issuer, keys } = found;
    let payload: JWTPayload;
    try {
      const verified = await jwtVerify(token, (header, input) => keys.keyOf(header, input), {
        algorithms: ["ES256"],
        issuer: issuer.issuer,
        audience: [...issuer.audiences],
        requiredClaims: ["sub", "exp", "iat"],
        clockTolerance: clockToleranceSeconds,
        currentDate: this.#clock(),
      });
      payload = verified.payload;
    } catch (error) {
      throw this.#refusal(error, issuer);
    }
    const { sub: subject, exp = 0 } = payload;
    if (subject === undefined || subject === "" || Buffer.byteLength(subject) > maxSubjectBytes) {
      throw tokenInvalid("its subject cannot be used");
    }
    const emailVerified = await this.#isEmailVerified(issuer, payload, subject, token);
    return {
      issuer: issuer.issuer,
      subject,
      emailVerified,
      expireTime: new Date((exp + clockToleranceSeconds) * 1000),
    };
  }

  #isEmailVerified(issuer: JwtIssuer, payload: JWTPayload, subject: string, token: string): Promise<boolean> | boolean {
    if (issuer.emailVerifiedClaim !== undefined) return claimAt(payload, issuer.emailVerifiedClaim) === true;
    if (issuer.userEndpoint === undefined) return false;
    return this.#emails.isVerified(issuer.userEndpoint, subject, token);
  }

  #refusal(error: unknown, issuer: JwtIssuer): DomainError {
    if (error instanceof KeysUnavailable) {
      this.#log.warn({ err: error.cause, host: issuer.jwksUrl.host }, "an issuer's keys cannot be fetched");
      return new DomainError(ErrorReason.UNAVAILABLE, "the issuer of this token cannot be asked for its keys: retry", {
        retryAfterMs: keysRetryMs,
        cause: error,
      });
    }
    if (error instanceof errors.JWTExpired) return tokenInvalid("it has expired: sign in again, or refresh it", error);
    if (error instanceof errors.JWTClaimValidationFailed) {
      return tokenInvalid(`its claim ${JSON.stringify(error.claim)} is not what this server accepts`, error);
    }
    if (error instanceof errors.JOSEError) return tokenInvalid("its signature or its algorithm is not accepted", error);
    throw error;
  }
}

/** The issuer that an unverified token claims: says which keys to try, and is verified with them. */
function unverifiedIssuer(token: string): string {
  try {
    return decodeJwt(token).iss ?? "";
  } catch {
    throw tokenInvalid("it is neither an API key nor a token");
  }
}

function claimAt(payload: JWTPayload, path: readonly string[]): unknown {
  let value: unknown = payload;
  for (const part of path) {
    if (typeof value !== "object" || value === null || !Object.hasOwn(value, part)) return undefined;
    value = new Map<string, unknown>(Object.entries(value)).get(part);
  }
  return value;
}

function tokenInvalid(why: string, cause?: unknown): DomainError {
  return new DomainError(ErrorReason.TOKEN_INVALID, `the bearer token is refused: ${why}`, { cause });
}
