// Who may call a method stands in its schema, and this reads it there, for all listeners. What a method does not
// say is not allowed: a method without the option is callable by nobody.
import { type DescMethod, getOption, hasOption, isUnknownEnum } from "@bufbuild/protobuf";
import {
  Access,
  AccessSchema,
  authorization,
  type Authorization,
  type Role,
  RoleSchema,
} from "@clodei/proto/gen/clodei/options/v1/options";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import type { Caller } from "./caller.ts";

/** Published services of others, whose schemas cannot carry our option. Anyone may call them. */
export const openServices: ReadonlySet<string> = new Set([
  "grpc.health.v1.Health",
  "grpc.reflection.v1.ServerReflection",
  "grpc.reflection.v1alpha.ServerReflection",
]);

/** The rule of a method, or undefined where it has none. */
export function authorizationOf(method: DescMethod): Authorization | undefined {
  return hasOption(method, authorization) ? getOption(method, authorization) : undefined;
}

/**
 * Lets a caller pass, or throws.
 * @throws DomainError CREDENTIALS_MISSING, PERMISSION_DENIED or EMAIL_NOT_VERIFIED.
 */
export function authorize(method: DescMethod, caller: Caller): void {
  if (openServices.has(method.parent.typeName)) return;
  const rule = authorizationOf(method);
  if (rule === undefined || !isAdmitted(rule, caller)) throw refusal(rule, caller);
  if (rule.verifiedEmail && !hasVerifiedEmail(caller)) {
    throw new DomainError(ErrorReason.EMAIL_NOT_VERIFIED, "verify your e-mail address first");
  }
}

function isAdmitted(rule: Authorization, caller: Caller): boolean {
  if (isUnknownEnum(AccessSchema, rule.access)) return false;
  switch (rule.access) {
    case Access.UNSPECIFIED:
      return false;
    case Access.PUBLIC:
      return true;
    case Access.AUTHENTICATED:
      return caller.kind === "customer" || caller.kind === "user" || caller.kind === "platform";
    case Access.ROLES:
      return caller.kind === "customer" && rule.allowedRoles.some((role) => caller.roles.has(role));
    case Access.PLATFORM:
      return caller.kind === "platform";
    case Access.NODE:
      return caller.kind === "node";
    case Access.ENROLLMENT_TOKEN:
      // The token, or the signature, is in the request, and the handler judges it. Whoever has an identity needs none.
      return caller.kind === "anonymous";
    case Access.CRON:
      // No method uses it yet, so nobody has such a token.
      return false;
    case Access.REPLICA:
      return caller.kind === "replica";
  }
}

/** Operators, nodes and control planes have no e-mail address of their own to verify. */
function hasVerifiedEmail(caller: Caller): boolean {
  switch (caller.kind) {
    case "customer":
    case "user":
      return caller.emailVerified;
    case "platform":
    case "node":
    case "replica":
      return true;
    case "anonymous":
      return false;
  }
}

function refusal(rule: Authorization | undefined, caller: Caller): DomainError {
  if (caller.kind === "anonymous" && rule !== undefined) {
    return new DomainError(ErrorReason.CREDENTIALS_MISSING, "give an API key or a token: authorization: Bearer <key>");
  }
  return new DomainError(ErrorReason.PERMISSION_DENIED, `you may not call this method: ${whoMay(rule, caller)}`);
}

/** Whom a method admits instead of this caller. It stands in the schema, which everybody may read. */
function whoMay(rule: Authorization | undefined, caller: Caller): string {
  if (rule === undefined || isUnknownEnum(AccessSchema, rule.access)) return "nobody may";
  switch (rule.access) {
    case Access.UNSPECIFIED:
    case Access.PUBLIC:
      return "nobody may";
    case Access.AUTHENTICATED:
      return "it is for people and API keys";
    case Access.ROLES:
      return whichRolesMay(rule.allowedRoles, caller);
    case Access.PLATFORM:
      return "it is for platform operators, with an operator's API key; no role in an organization implies it";
    case Access.NODE:
      return "it is for nodes, with their certificates on the node listener";
    case Access.ENROLLMENT_TOKEN:
      return "it is for nodes that have no certificate yet: leave out the authorization header";
    case Access.CRON:
      return "it is for the scheduler";
    case Access.REPLICA:
      return "it is for control planes among themselves, with their certificates on the replica listener";
  }
}

function whichRolesMay(allowed: readonly Role[], caller: Caller): string {
  const names = (roles: Iterable<Role>): string => [...roles].map(roleName).join(", ");
  if (caller.kind === "customer") {
    const own = caller.roles.size === 0 ? "none" : names(caller.roles);
    return `it takes one of the roles ${names(allowed)} in the organization, and yours is ${own}; its admins give roles`;
  }
  return `it is for members of an organization in one of the roles ${names(allowed)}: use an API key of the organization`;
}

function roleName(role: Role): string {
  return isUnknownEnum(RoleSchema, role) ? String(role) : (RoleSchema.value[role]?.localName.toLowerCase() ?? "");
}
