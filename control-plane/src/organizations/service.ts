// What others ask of organizations: make one, who is a member, and who calls in whose name.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { newId, type OrganizationId, parseId, type UserId } from "@clodei/proto/ids";
import {
  type IdentityService,
  looksLikeApiKey,
  type RoleName,
  roleNamesOf,
  rolesOf,
  type UserName,
} from "../identity/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx, Tx } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import { anonymousCaller, type Authenticate, type Caller } from "../rpc/caller.ts";
import { defaultOrganization, type Membership } from "./model.ts";
import * as store from "./store.ts";

/** What organizations are made of. */
export type OrganizationsOptions = {
  readonly database: Database;
  readonly identity: IdentityService;
  readonly clock: Clock;
};

/** An organization that was made, with a key that may do everything in it. The key is nowhere else. */
export type CreatedOrganization = {
  readonly organizationId: OrganizationId;
  readonly adminApiKey: string;
};

/** Names the organization in whose name a token's bearer acts. */
const organizationHeader = "clodei-organization";
/** An error lists so many organizations: there is room for their ids, and their names in the message may be cut. */
const maxListedOrganizations = 30;

/** Organizations and their members. */
export class OrganizationsService {
  readonly #options: OrganizationsOptions;

  constructor(options: OrganizationsOptions) {
    this.#options = options;
  }

  /**
   * Finds out who calls, from the header `authorization` and, for a token, `clodei-organization`.
   *
   * @throws DomainError API_KEY_MALFORMED, API_KEY_INVALID, TOKEN_INVALID, ORGANIZATION_REQUIRED, PERMISSION_DENIED
   *   (not a member of the organization that is named, or there is none such), UNAVAILABLE.
   */
  readonly authenticate: Authenticate = async (headers) => {
    const authorization = headers.get("authorization") ?? "";
    if (authorization === "") return anonymousCaller;
    const credential = /^bearer +(\S+) *$/i.exec(authorization)?.[1];
    if (credential === undefined) {
      throw new DomainError(ErrorReason.TOKEN_INVALID, "the header authorization must be: Bearer <API key or token>");
    }
    const organization = headers.get(organizationHeader) ?? "";
    return looksLikeApiKey(credential)
      ? this.#authenticateApiKey(credential, organization)
      : this.#authenticateToken(credential, organization);
  };

  /**
   * Whether a caller whom `authenticate` returned may still do what it might then: an open stream asks. False once
   * its key was revoked, its token ended, or its user, operator, membership or one of its roles is gone.
   */
  readonly stillHolds = async (caller: Caller): Promise<boolean> => {
    const { database, clock } = this.#options;
    const tokenEnd = "tokenExpireTime" in caller ? caller.tokenExpireTime : undefined;
    if (tokenEnd !== undefined && tokenEnd <= clock()) return false;
    switch (caller.kind) {
      case "anonymous":
        return true;
      case "customer": {
        const { callerId, organizationId, roles } = caller;
        return database.anonymous((tx) => store.doesCallerHold(tx, callerId, organizationId, roleNamesOf(roles)));
      }
      case "user":
      case "platform":
        return database.anonymous((tx) => store.doesCallerHold(tx, caller.callerId, undefined, []));
      case "node":
      case "replica":
        return false; // judged on listeners of their own, by their certificates
    }
  };

  /** Makes an organization and a key with the role admin. */
  async create(
    tx: SystemTx,
    request: { readonly name: string; readonly member?: UserName },
  ): Promise<CreatedOrganization> {
    const organizationId = newId("org", this.#options.clock().getTime());
    await store.insertOrganization(tx, organizationId, request.name);
    const { apiKey } = await this.#options.identity.createApiKey(tx, {
      organizationId,
      name: "admin",
      roles: ["admin"],
    });
    if (request.member !== undefined) {
      const userId = await this.#options.identity.ensureUser(tx, request.member);
      await this.setMembership(tx, organizationId, userId, ["admin"]);
    }
    return { organizationId, adminApiKey: apiKey };
  }

  /** Makes a person a member, or gives a member these roles instead of the former. */
  setMembership(
    tx: SystemTx,
    organizationId: OrganizationId,
    userId: UserId,
    roles: readonly RoleName[],
  ): Promise<void> {
    return store.upsertMembership(tx, organizationId, userId, roles);
  }

  /** Ends a membership. @returns whether there was one. */
  removeMembership(tx: SystemTx, organizationId: OrganizationId, userId: UserId): Promise<boolean> {
    return store.deleteMembership(tx, organizationId, userId);
  }

  async #authenticateApiKey(apiKey: string, organization: string): Promise<Caller> {
    const { database, identity } = this.#options;
    const principal = await database.anonymous((tx) => identity.authenticateApiKey(tx, apiKey));
    if (principal.kind === "operator") {
      return { kind: "platform", callerId: principal.apiKeyId, credential: "api_key" };
    }
    // A key is of one organization. A header that names another means a mistake, and the request might delete.
    if (organization !== "" && organization !== principal.organizationId) throw notAMember();
    return {
      kind: "customer",
      organizationId: principal.organizationId,
      organizationName: principal.organizationName,
      callerId: principal.apiKeyId,
      credential: "api_key",
      roles: principal.roles,
      emailVerified: true, // its maker's was
    };
  }

  async #authenticateToken(token: string, organization: string): Promise<Caller> {
    const { database, identity } = this.#options;
    // Before the database: the issuer may have to be asked, which has no place in a transaction.
    const verified = await identity.verifyToken(token);
    const { expireTime: tokenExpireTime } = verified;
    return database.anonymous(async (tx): Promise<Caller> => {
      const user = await identity.authenticateUser(tx, verified);
      // Operators act for the platform, unless they name an organization that they are a member of.
      if (organization === "" && user.operatorId !== undefined) {
        return { kind: "platform", callerId: user.operatorId, credential: "token", tokenExpireTime };
      }
      const membership = await this.#membership(tx, user.userId, organization);
      if (membership === undefined) {
        return { kind: "user", callerId: user.userId, emailVerified: user.emailVerified, tokenExpireTime };
      }
      return {
        kind: "customer",
        ...membership,
        callerId: user.userId,
        credential: "token",
        emailVerified: user.emailVerified,
        tokenExpireTime,
      };
    });
  }

  async #membership(tx: Tx, userId: UserId, organization: string): Promise<Membership | undefined> {
    if (organization !== "") {
      const organizationId = parseId("org", organization);
      const row = organizationId === undefined ? undefined : await store.membershipOfUser(tx, userId, organizationId);
      if (row === undefined) throw notAMember();
      return toMembership(row);
    }
    const rows = await store.membershipsOfUser(tx, userId, maxListedOrganizations);
    const found = defaultOrganization(rows.map(toMembership));
    switch (found.kind) {
      case "one":
        return found.membership;
      case "none":
        return undefined;
      case "several":
        throw organizationRequired(found.memberships);
    }
  }
}

function toMembership(row: store.MembershipRow): Membership {
  return {
    organizationId: row.organization_id,
    organizationName: row.organization_name,
    roles: rolesOf(row.roles),
  };
}

function organizationRequired(memberships: readonly Membership[]): DomainError {
  const ids = memberships.map(({ organizationId }) => organizationId);
  return new DomainError(
    ErrorReason.ORGANIZATION_REQUIRED,
    `you belong to several organizations: name one in the header ${organizationHeader}: ` +
      memberships.map(({ organizationId, organizationName }) => `${organizationId} (${organizationName})`).join(", "),
    { metadata: { organizationIds: ids.join(",") } },
  );
}

/** The same for an organization of others and for one that is not there. */
function notAMember(): DomainError {
  return new DomainError(
    ErrorReason.PERMISSION_DENIED,
    `the header ${organizationHeader} must name an organization that you belong to, or be left out`,
  );
}
