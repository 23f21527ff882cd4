// What other slices ask of identity: who is this, and make somebody a credential. A key is shown to whoever asked
// for it, once; what is kept of it is a hash.
import { createHash } from "node:crypto";
import { formatApiKey, parseApiKey } from "@clodei/proto/api-key";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { type ApiKeyId, newId, type OperatorId, type OrganizationId, type UserId } from "@clodei/proto/ids";
import { newSecret } from "@clodei/proto/secret";
import type { Clock } from "../platform/clock.ts";
import type { SystemTx, Tx } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Log } from "../platform/log.ts";
import type { JwtIssuer } from "./issuers.ts";
import { type ApiKeyPrincipal, type RoleName, rolesOf, type TokenPrincipal } from "./model.ts";
import * as store from "./store.ts";
import { TokenVerifier, type VerifiedToken } from "./tokens.ts";

export type { ApiKeyPrincipal, RoleName, TokenPrincipal } from "./model.ts";
export { roleNamesOf, rolesOf } from "./model.ts";

/** What identity is made of. */
export type IdentityOptions = { readonly issuers: readonly JwtIssuer[]; readonly clock: Clock; readonly log: Log };

/** A key that was made. The text is nowhere else. */
export type CreatedApiKey = { readonly id: ApiKeyId; readonly apiKey: string };

/** A key that is revoked, and whose it was: an organization's or an operator's. */
export type RevokedApiKey = {
  readonly organizationId: OrganizationId | undefined;
  readonly operatorId: OperatorId | undefined;
  readonly name: string;
  /** Of the first time. */
  readonly revokeTime: Date;
};

/** How a person is known: to whom a token says it belongs. */
export type UserName = { readonly issuer: string; readonly subject: string };

/** Whether a bearer credential looks like an API key of ours, good or not. */
export function looksLikeApiKey(credential: string): boolean {
  return credential.toLowerCase().startsWith("clodei_");
}

/** Knows who calls, and makes credentials. */
export class IdentityService {
  readonly #options: IdentityOptions;
  readonly #tokens: TokenVerifier;

  constructor(options: IdentityOptions) {
    this.#options = options;
    this.#tokens = new TokenVerifier(options);
  }

  /**
   * Says what an API key speaks for. Works without a tenant.
   *
   * @throws DomainError API_KEY_MALFORMED where it is mistyped, API_KEY_INVALID where it is unknown, revoked or expired.
   */
  async authenticateApiKey(tx: Tx, text: string): Promise<ApiKeyPrincipal> {
    const key = parseApiKey(text);
    if (key === undefined) {
      throw new DomainError(
        ErrorReason.API_KEY_MALFORMED,
        "this is not a whole API key: copy it again, from clodei_sk_ to its last character",
      );
    }
    const row = await store.authenticateApiKey(tx, key.id, hashOf(text));
    if (row === undefined) {
      throw new DomainError(
        ErrorReason.API_KEY_INVALID,
        "this API key is unknown, revoked or expired: ask an admin of your organization for a new one",
      );
    }
    if (row.organization_id === null) return { kind: "operator", apiKeyId: key.id };
    return {
      kind: "organization",
      apiKeyId: key.id,
      organizationId: row.organization_id,
      organizationName: row.organization_name ?? "",
      roles: rolesOf(row.roles),
    };
  }

  /** Verifies a token, without the database. @throws DomainError TOKEN_INVALID, UNAVAILABLE. */
  verifyToken(token: string): Promise<VerifiedToken> {
    return this.#tokens.verify(token);
  }

  /** Says whom a verified token names; a user is made at first sight. @throws DomainError TOKEN_INVALID. */
  async authenticateUser(tx: Tx, token: VerifiedToken): Promise<TokenPrincipal> {
    const user = await store.authenticateUser(tx, token.issuer, token.subject, this.#newUserId());
    if (user === undefined) {
      throw new DomainError(ErrorReason.TOKEN_INVALID, "the bearer token is refused: its user is disabled here");
    }
    return { ...user, emailVerified: token.emailVerified };
  }

  /** Makes a key of an organization. Its maker's e-mail address counts for it. */
  async createApiKey(
    tx: SystemTx,
    request: {
      readonly organizationId: OrganizationId;
      readonly name: string;
      readonly roles: readonly RoleName[];
      readonly expireTime?: Date;
    },
  ): Promise<CreatedApiKey> {
    return this.#insertKey(tx, { operatorId: undefined, expireTime: undefined, ...request });
  }

  /**
   * Makes a platform operator, and a key for it. In production the first one is made on the command line.
   *
   * @param request.user the person, who is then an operator by a token too.
   */
  async createOperator(
    tx: SystemTx,
    request: { readonly name: string; readonly user?: UserName },
  ): Promise<CreatedApiKey & { readonly operatorId: OperatorId }> {
    const operatorId = newId("opr", this.#nowMs());
    const userId = request.user === undefined ? undefined : await this.ensureUser(tx, request.user);
    await store.insertOperator(tx, { id: operatorId, name: request.name, userId });
    const key = await this.#insertKey(tx, {
      organizationId: undefined,
      operatorId,
      name: request.name,
      roles: [],
      expireTime: undefined,
    });
    return { ...key, operatorId };
  }

  /** Revokes a key, at once and for good. Undefined: there is none by this id. */
  async revokeApiKey(tx: SystemTx, id: ApiKeyId): Promise<RevokedApiKey | undefined> {
    const row = await store.revokeApiKey(tx, id);
    if (row === undefined) return undefined;
    const { name, revoke_time: revokeTime } = row;
    return {
      organizationId: row.organization_id ?? undefined,
      operatorId: row.operator_id ?? undefined,
      name,
      revokeTime,
    };
  }

  /** Takes an operator's access away, with all keys. @returns whether there is one by this id. */
  disableOperator(tx: SystemTx, id: OperatorId): Promise<boolean> {
    return store.disableOperator(tx, id);
  }

  /** Takes a user's access away, in all organizations. @returns whether there is one by this id. */
  disableUser(tx: SystemTx, id: UserId): Promise<boolean> {
    return store.disableUser(tx, id);
  }

  /** The user that an issuer names, made where there is none yet. */
  ensureUser(tx: SystemTx, user: UserName): Promise<UserId> {
    return store.ensureUser(tx, user.issuer, user.subject, this.#newUserId());
  }

  async #insertKey(
    tx: SystemTx,
    key: Omit<Parameters<typeof store.insertApiKey>[1], "id" | "secretHash">,
  ): Promise<CreatedApiKey> {
    const id = newId("key", this.#nowMs());
    const apiKey = formatApiKey({ id, secret: newSecret() });
    await store.insertApiKey(tx, { ...key, id, secretHash: hashOf(apiKey) });
    return { id, apiKey };
  }

  #newUserId(): UserId {
    return newId("usr", this.#nowMs());
  }

  #nowMs(): number {
    return this.#options.clock().getTime();
  }
}

/** A key has 256 random bits: nobody tries them all, so one plain sha256 is as good as a slow hash. */
function hashOf(apiKey: string): Buffer {
  return createHash("sha256").update(apiKey).digest();
}
