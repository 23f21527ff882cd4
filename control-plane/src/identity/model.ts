// Who can call, as the identity slice knows them. Pure.
import { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import type { ApiKeyId, OperatorId, OrganizationId, UserId } from "@clodei/proto/ids";

/** A role as the database spells it. */
export type RoleName = "viewer" | "member" | "operator" | "author" | "compliance_officer" | "manager" | "admin";

const roleOfName: Readonly<Record<RoleName, Role>> = {
  viewer: Role.VIEWER,
  member: Role.MEMBER,
  operator: Role.OPERATOR,
  author: Role.AUTHOR,
  compliance_officer: Role.COMPLIANCE_OFFICER,
  manager: Role.MANAGER,
  admin: Role.ADMIN,
};

/** Every role by name, weakest first. They are a set and not a chain: the order gives no rights. */
const roleNames = Object.keys(roleOfName).filter(isRoleName);

/** Whether a text names a role. */
export function isRoleName(text: string): text is RoleName {
  return Object.hasOwn(roleOfName, text);
}

/** The roles by these names. A name that is none of ours gives nothing. */
export function rolesOf(names: readonly string[]): ReadonlySet<Role> {
  return new Set(names.filter(isRoleName).map((name) => roleOfName[name]));
}

/** The names of these roles. */
export function roleNamesOf(roles: ReadonlySet<Role>): RoleName[] {
  return roleNames.filter((name) => roles.has(roleOfName[name]));
}

/** What an API key speaks for. */
export type ApiKeyPrincipal =
  | {
      readonly kind: "organization";
      readonly apiKeyId: ApiKeyId;
      readonly organizationId: OrganizationId;
      readonly organizationName: string;
      readonly roles: ReadonlySet<Role>;
    }
  | { readonly kind: "operator"; readonly apiKeyId: ApiKeyId };

/** Whom a token names. */
export type TokenPrincipal = {
  readonly userId: UserId;
  /** Set where the user is a platform operator. */
  readonly operatorId: OperatorId | undefined;
  readonly emailVerified: boolean;
};
