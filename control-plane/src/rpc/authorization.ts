// Who may call a method stands in its schema, and this reads it there, for both listeners. What a method does not
// say is not allowed: a method without the option is callable by nobody.
import { type DescMethod, getOption, hasOption, isUnknownEnum } from "@bufbuild/protobuf";
import { Access, AccessSchema, authorization, type Authorization } from "@clodei/proto/gen/clodei/options/v1/options";
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
  }
}

/** Operators and nodes have no e-mail address of their own to verify. */
function hasVerifiedEmail(caller: Caller): boolean {
  switch (caller.kind) {
    case "customer":
    case "user":
      return caller.emailVerified;
    case "platform":
    case "node":
      return true;
    case "anonymous":
      return false;
  }
}

function refusal(rule: Authorization | undefined, caller: Caller): DomainError {
  if (caller.kind === "anonymous" && rule !== undefined) {
    return new DomainError(ErrorReason.CREDENTIALS_MISSING, "give an API key or a token: authorization: Bearer <key>");
  }
  return new DomainError(ErrorReason.PERMISSION_DENIED, "you may not call this method");
}
