// The one place where reasons become status codes, for all listeners. What is not a DomainError is ours: its text
// goes to the log under the request's id, and the caller gets the id.
import { type DescMessage, isUnknownEnum, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { ErrorReason, ErrorReasonSchema } from "@clodei/proto/gen/clodei/v1/error";
import {
  BadRequestSchema,
  ErrorInfoSchema,
  QuotaFailureSchema,
  RetryInfoSchema,
} from "@clodei/proto/gen/google/rpc/error_details";
import { DatabaseAwayError } from "../platform/database.ts";
import { DomainError, type FieldViolation } from "../platform/errors.ts";

/** The domain of our reasons in google.rpc.ErrorInfo. */
export const errorDomain = "clodei.com";

type ReasonName = Exclude<keyof typeof ErrorReason, "UNSPECIFIED">;

/** The status code of each reason. */
export const codeOfReason: Readonly<Record<ReasonName, Code>> = {
  INVALID_ARGUMENT: Code.InvalidArgument,
  NOT_FOUND: Code.NotFound,
  CREDENTIALS_MISSING: Code.Unauthenticated,
  API_KEY_MALFORMED: Code.Unauthenticated,
  API_KEY_INVALID: Code.Unauthenticated,
  TOKEN_INVALID: Code.Unauthenticated,
  API_KEY_FROM_BROWSER: Code.PermissionDenied,
  ORGANIZATION_REQUIRED: Code.FailedPrecondition,
  PERMISSION_DENIED: Code.PermissionDenied,
  EMAIL_NOT_VERIFIED: Code.PermissionDenied,
  IDEMPOTENCY_KEY_REUSED: Code.FailedPrecondition,
  IDEMPOTENCY_KEY_IN_FLIGHT: Code.Aborted,
  SECRET_ALREADY_SHOWN: Code.FailedPrecondition,
  NOT_SUPPORTED_YET: Code.Unimplemented,
  IMAGE_NOT_ALLOWED: Code.InvalidArgument,
  FAILED_PRECONDITION: Code.FailedPrecondition,
  PAGE_TOKEN_INVALID: Code.InvalidArgument,
  CURSOR_INVALID: Code.InvalidArgument,
  CURSOR_EXPIRED: Code.OutOfRange,
  RATE_LIMITED: Code.ResourceExhausted,
  UNAVAILABLE: Code.Unavailable,
  NODE_UNREACHABLE: Code.Unavailable,
  ENROLLMENT_TOKEN_INVALID: Code.Unauthenticated,
  LOCATION_NOT_ALLOWED: Code.FailedPrecondition,
  NODE_REVOKED: Code.PermissionDenied,
  NODE_QUARANTINED: Code.PermissionDenied,
  CERTIFICATE_INVALID: Code.Unauthenticated,
  CHALLENGE_INVALID: Code.Unauthenticated,
  PROTOCOL_VIOLATION: Code.InvalidArgument,
  SESSION_REPLACED: Code.Aborted,
  VERSION_NOT_SUPPORTED: Code.FailedPrecondition,
  INTERNAL: Code.Internal,
  DEADLINE_EXCEEDED: Code.DeadlineExceeded,
  CANCELED: Code.Canceled,
  UNIMPLEMENTED: Code.Unimplemented,
  QUOTA_EXCEEDED: Code.ResourceExhausted,
  CONFLICT: Code.Aborted,
  LOGS_GONE: Code.NotFound,
};

/** As Connect spells it on the wire: "invalid_argument". */
export function codeName(code: Code): string {
  return (Code[code] ?? "unknown").replace(/(?<=[a-z])[A-Z]/g, (letter) => `_${letter}`).toLowerCase();
}

/** A detail of an error: a message and its schema. */
export type ErrorDetail = { readonly desc: DescMessage; readonly value: MessageInitShape<DescMessage> };

/** An error as a transport tells it. `code` is the number that Connect and gRPC share. */
export type Status = {
  readonly code: Code;
  readonly reason: ReasonName;
  readonly message: string;
  readonly details: readonly ErrorDetail[];
};

/**
 * What an error may have. gRPC carries one in trailers, the message twice: percent-encoded, and with the details as
 * base64. Clients on grpc-core refuse trailers of more than 8 KiB in all, and those of more than 64 KiB cannot be sent:
 * Node.js ends the connection then, and with it what others ask for on it. A request that an error quotes has up to 4 MiB.
 */
const maxMessageBytes = 1_280;
const maxViolationsBytes = 2_048;
const maxViolationTextBytes = 512;
/** What a violation takes beside its texts. */
const violationFrameBytes = 16;
const maxMetadataBytes = 1_024;

/** The name of a reason, as google.rpc.ErrorInfo carries it. */
export function reasonName(reason: ErrorReason): ReasonName {
  if (isUnknownEnum(ErrorReasonSchema, reason)) return "INTERNAL";
  const name = ErrorReasonSchema.value[reason]?.localName;
  return name !== undefined && isReasonName(name) ? name : "INTERNAL";
}

/** Turns any error into what the caller may know of it. */
export function statusOf(error: unknown, requestId: string): Status {
  const told = toDomainError(error);
  const reason = reasonName(told.reason);
  return {
    code: codeOfReason[reason],
    reason,
    message: clip(told.message, maxMessageBytes),
    details: detailsOf(told, reason, requestId),
  };
}

/** Turns any error into Connect's. One that Connect itself made keeps its code, where that says the same. */
export function toConnectError(error: unknown, requestId: string): ConnectError {
  const status = statusOf(error, requestId);
  const keepsCode = error instanceof ConnectError && status.reason !== "INTERNAL" && !isMiscalled(error);
  const code = keepsCode ? error.code : status.code;
  return new ConnectError(status.message, code, undefined, [...status.details], error);
}

/** Whether an error says nothing that the caller did: the log needs its text. */
export function isOurs(error: unknown): boolean {
  return reasonName(toDomainError(error).reason) === "INTERNAL";
}

function toDomainError(error: unknown): DomainError {
  if (error instanceof DomainError) return error;
  if (isTooLarge(error)) return new DomainError(ErrorReason.INVALID_ARGUMENT, tooLarge, { cause: error });
  if (isUnreadable(error)) return new DomainError(ErrorReason.INVALID_ARGUMENT, error.rawMessage, { cause: error });
  if (error instanceof ConnectError && !isCallerGone(error) && reasonOfCode(error.code) !== ErrorReason.INTERNAL) {
    return new DomainError(reasonOfCode(error.code), error.rawMessage, { cause: error });
  }
  if (error instanceof DatabaseAwayError) {
    return new DomainError(ErrorReason.UNAVAILABLE, "the server cannot reach its database now: retry", {
      retryAfterMs: databaseRetryMs,
      cause: error,
    });
  }
  if (isCallerGone(error) || (error instanceof Error && error.name === "AbortError")) {
    return new DomainError(ErrorReason.CANCELED, "the request was canceled", { cause: error });
  }
  return new DomainError(ErrorReason.INTERNAL, "an error of ours: give support the request id", { cause: error });
}

const databaseRetryMs = 1_000;

/** Of Node's streams, whose other end went away. (What the database's connection throws is a DatabaseAwayError by now.) */
const goneCodes: ReadonlySet<unknown> = new Set([
  "ECANCELED",
  "ERR_HTTP2_INVALID_STREAM",
  "ERR_HTTP2_STREAM_CANCEL",
  "ERR_HTTP2_STREAM_ERROR",
  "ERR_STREAM_DESTROYED",
  "ERR_STREAM_PREMATURE_CLOSE",
  "ERR_STREAM_WRITE_AFTER_END",
]);

/** Whether the code that Connect gave an error says something else than we do. */
function isMiscalled(error: ConnectError): boolean {
  return isCallerGone(error) || isTooLarge(error) || isUnreadable(error);
}

/** The caller's connection broke in the middle of an answer. Connect takes the reset that follows for an error of ours. */
function isCallerGone(error: unknown): boolean {
  if (error instanceof ConnectError) return error.rawMessage.startsWith("http/2 stream closed with error code");
  return error instanceof Error && goneCodes.has(Reflect.get(error, "code"));
}

/** The most that a message may have, packed or not. The default of the library is about 4 GiB. */
export const readMaxBytes = 4 * 1024 * 1024;
const tooLarge = `the message is larger than ${readMaxBytes} bytes, which is the most that a request may have`;

/**
 * Connect says "resource exhausted" of a message that is too large, and nothing else. To a client that is a limit of
 * rate, and worth a retry; this request will never be taken.
 */
function isTooLarge(error: unknown): boolean {
  return error instanceof ConnectError && error.code === Code.ResourceExhausted && error.details.length === 0;
}

/**
 * Whether a request was no message, or not compressed as it said. Connect calls these internal errors, by the gRPC
 * libraries' custom, and gives nothing but their sentences to know them by.
 */
function isUnreadable(error: unknown): error is ConnectError {
  return error instanceof ConnectError && error.code === Code.Internal && unreadable.test(error.rawMessage);
}

const unreadable = /^(?:parse binary: |decompression failed$|received compressed envelope, )/u;

/** Reasons for errors that the transport makes: an unreadable body, a message that is too long, a deadline. */
function reasonOfCode(code: Code): ErrorReason {
  switch (code) {
    case Code.InvalidArgument:
    case Code.OutOfRange:
      return ErrorReason.INVALID_ARGUMENT;
    case Code.NotFound:
      return ErrorReason.NOT_FOUND;
    case Code.Unauthenticated:
      return ErrorReason.CREDENTIALS_MISSING;
    case Code.PermissionDenied:
      return ErrorReason.PERMISSION_DENIED;
    case Code.Canceled:
      return ErrorReason.CANCELED;
    case Code.DeadlineExceeded:
      return ErrorReason.DEADLINE_EXCEEDED;
    case Code.Unimplemented:
      return ErrorReason.UNIMPLEMENTED;
    case Code.Unavailable:
      return ErrorReason.UNAVAILABLE;
    case Code.ResourceExhausted:
      return ErrorReason.QUOTA_EXCEEDED;
    case Code.Aborted:
    case Code.AlreadyExists:
      return ErrorReason.CONFLICT;
    case Code.FailedPrecondition:
      return ErrorReason.FAILED_PRECONDITION;
    case Code.Unknown:
    case Code.Internal:
    case Code.DataLoss:
      return ErrorReason.INTERNAL;
  }
}

function detailsOf(error: DomainError, reason: ReasonName, requestId: string): ErrorDetail[] {
  const facts = Object.entries(error.metadata);
  const metadata: Record<string, string> = {};
  for (const [name, value] of facts) metadata[name] = clip(value, Math.floor(maxMetadataBytes / facts.length));
  metadata["requestId"] = requestId;
  const details: ErrorDetail[] = [{ desc: ErrorInfoSchema, value: { reason, domain: errorDomain, metadata } }];
  if (error.fields.length > 0) {
    details.push({ desc: BadRequestSchema, value: { fieldViolations: violationsOf(error.fields) } });
  }
  if (error.quotaSubject !== undefined) {
    const description = clip(error.message, maxViolationTextBytes);
    const violations = [{ subject: error.quotaSubject, description }];
    details.push({ desc: QuotaFailureSchema, value: { violations } });
  }
  if (error.retryAfterMs !== undefined) {
    const seconds = Math.floor(error.retryAfterMs / 1_000);
    const retryDelay = { seconds: BigInt(seconds), nanos: Math.round((error.retryAfterMs - seconds * 1_000) * 1e6) };
    details.push({ desc: RetryInfoSchema, value: { retryDelay } });
  }
  return details;
}

/** The first ones, one at least, of as many fields as there is room for. A field's path may hold a key of the caller's. */
function violationsOf(fields: readonly FieldViolation[]): { field: string; description: string; reason: string }[] {
  let bytes = 0;
  const violations = fields.map(({ field, rule, message }) => ({
    field: clip(field, maxViolationTextBytes),
    description: clip(message, maxViolationTextBytes),
    reason: rule,
  }));
  return violations.filter(({ field, description, reason }, index) => {
    bytes += Buffer.byteLength(field + description + reason) + violationFrameBytes;
    return index === 0 || bytes <= maxViolationsBytes;
  });
}

const ellipsis = "…";

/** The text as UTF-8 can carry it, and cut where its percent-encoding would take more bytes. */
function clip(text: string, maxBytes: number): string {
  // No character takes less than one byte: a long text is not gone through to its end.
  const start = text.slice(0, maxBytes).toWellFormed();
  if (start.length === text.length && encodeURIComponent(start).length <= maxBytes) return start;
  let bytes = encodeURIComponent(ellipsis).length;
  let clipped = "";
  for (const character of start) {
    bytes += encodeURIComponent(character).length;
    if (bytes > maxBytes) break;
    clipped += character;
  }
  return clipped + ellipsis;
}

function isReasonName(name: string): name is ReasonName {
  return Object.hasOwn(codeOfReason, name);
}
