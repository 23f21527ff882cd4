// IdentityService on the wire: translates, and nothing else.
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { HandlerContext, ServiceImpl } from "@connectrpc/connect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import {
  CredentialKind,
  type IdentityService as IdentityServiceDescriptor,
  type WhoAmIResponseSchema,
} from "@clodei/proto/gen/clodei/v1/identity_service";
import { DomainError } from "../platform/errors.ts";
import type { Caller, Credential } from "../rpc/caller.ts";
import { callerOf } from "../rpc/context.ts";

/** The handlers of clodei.v1.IdentityService. */
export function identityHandlers(): ServiceImpl<typeof IdentityServiceDescriptor> {
  return {
    whoAmI: (_request: unknown, context: HandlerContext) => whoAmI(callerOf(context)),
  };
}

function whoAmI(caller: Caller): MessageInitShape<typeof WhoAmIResponseSchema> {
  switch (caller.kind) {
    case "customer":
      return {
        callerId: caller.callerId,
        credential: credentialKind(caller.credential),
        organizationId: caller.organizationId,
        organizationName: caller.organizationName,
        roles: [...caller.roles].toSorted((a, b) => a - b),
        emailVerified: caller.emailVerified,
      };
    case "user":
      return { callerId: caller.callerId, credential: CredentialKind.TOKEN, emailVerified: caller.emailVerified };
    case "platform":
      return {
        callerId: caller.callerId,
        credential: credentialKind(caller.credential),
        platformOperator: true,
        emailVerified: true,
      };
    case "anonymous":
    case "node":
    case "replica":
      // The method's option admits none of them: this is the second lock on the same door.
      throw new DomainError(ErrorReason.CREDENTIALS_MISSING, "give an API key or a token: authorization: Bearer <key>");
  }
}

function credentialKind(credential: Credential): CredentialKind {
  switch (credential) {
    case "api_key":
      return CredentialKind.API_KEY;
    case "token":
      return CredentialKind.TOKEN;
  }
}
