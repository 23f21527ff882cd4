// The stable reason that the control plane gave for an error. Programs branch on it and never on the text.

import { ConnectError } from "@connectrpc/connect";
import { ErrorReasonSchema } from "@clodei/proto/gen/clodei/v1/error";
import type { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";

const domain = "clodei.com";

/** The reason in the error's ErrorInfo; undefined where there is none of ours. */
export function reasonOf(error: unknown): ErrorReason | undefined {
  if (!(error instanceof ConnectError)) return undefined;
  const info = error.findDetails(ErrorInfoSchema).find((detail) => detail.domain === domain);
  return ErrorReasonSchema.values.find((value) => value.name === `ERROR_REASON_${info?.reason}`)?.number as
    | ErrorReason
    | undefined;
}

/** An error's text for a log line, cut short. */
export function messageOf(error: unknown): string {
  const text =
    error instanceof ConnectError ? error.rawMessage : error instanceof Error ? error.message : String(error);
  return text.slice(0, 1024);
}
