/**
 * What goes wrong, in one type: whatever the SDK rejects with is a ClodeiError. Programs branch on its `reason`
 * and never on its message. Subclasses are few: only where a caller wants what they carry.
 */
import { type Code, ConnectError } from "@connectrpc/connect";
import { codeToString } from "@connectrpc/connect/protocol-connect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { type Instance, InstanceReason, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import {
  BadRequestSchema,
  ErrorInfoSchema,
  HelpSchema,
  RequestInfoSchema,
  RetryInfoSchema,
} from "@clodei/proto/gen/google/rpc/error_details";
import { durationMs } from "@bufbuild/protobuf/wkt";
import { nameOf } from "./enum-names.ts";

/** Status codes, as gRPC and Connect have them. Coarse; `reason` says more. */
export type StatusCode =
  | "canceled"
  | "unknown"
  | "invalid_argument"
  | "deadline_exceeded"
  | "not_found"
  | "already_exists"
  | "permission_denied"
  | "resource_exhausted"
  | "failed_precondition"
  | "aborted"
  | "out_of_range"
  | "unimplemented"
  | "internal"
  | "unavailable"
  | "data_loss"
  | "unauthenticated";

/**
 * The stable reasons, as docs/errors.md lists them. "UNSPECIFIED" where the server gave none, or one that this
 * version of the SDK does not know (then `metadata.reason` holds it).
 */
export type Reason = keyof typeof ErrorReason;

/** A field of a request that breaks a rule. */
export type FieldViolation = {
  /** The field's path as the schema names it: "spec.gpu.count". */
  readonly field: string;
  /** Which rule it breaks: "uint32.lte". Empty where the server named none. */
  readonly rule: string;
  /** What is wrong and what is allowed. */
  readonly message: string;
};

/** What a ClodeiError can carry. */
export type ClodeiErrorOptions = {
  readonly fieldViolations?: readonly FieldViolation[];
  readonly retryAfterMs?: number | undefined;
  readonly requestId?: string | undefined;
  readonly helpUrl?: string | undefined;
  readonly metadata?: Readonly<Record<string, string>>;
  readonly cause?: unknown;
};

/**
 * The error of every call.
 *
 * @example
 * try {
 *   await client.instances.run({ image: "evil/miner" });
 * } catch (error) {
 *   if (error instanceof ClodeiError && error.reason === "IMAGE_NOT_ALLOWED") console.log(error.message);
 *   else throw error;
 * }
 */
export class ClodeiError extends Error {
  readonly code: StatusCode;
  readonly reason: Reason;
  /** The fields that break a rule. Empty unless the reason is about fields. */
  readonly fieldViolations: readonly FieldViolation[];
  /** How long the server asks to wait before a retry. Absent where waiting does not help. */
  readonly retryAfterMs: number | undefined;
  /** Finds the request in the server's logs: name it when you ask for help. */
  readonly requestId: string | undefined;
  /** Where to read more. */
  readonly helpUrl: string | undefined;
  /** Facts beside the reason, as the server gave them. */
  readonly metadata: Readonly<Record<string, string>>;

  constructor(code: StatusCode, reason: Reason, message: string, options: ClodeiErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = "ClodeiError";
    this.code = code;
    this.reason = reason;
    this.fieldViolations = options.fieldViolations ?? [];
    this.retryAfterMs = options.retryAfterMs;
    this.requestId = options.requestId;
    this.helpUrl = options.helpUrl;
    this.metadata = options.metadata ?? {};
  }
}

/**
 * An instance ended, or was stopped, before what was waited for came about.
 *
 * @example
 * try {
 *   await instance.waitUntilRunning();
 * } catch (error) {
 *   if (error instanceof InstanceEndedError && error.instanceReason === "OUT_OF_MEMORY") askForMoreMemory();
 * }
 */
export class InstanceEndedError extends ClodeiError {
  /** The instance as it ended. A dump of the error leaves it out, as its enums are numbers: it has their names beside. */
  readonly instance: Instance;
  /** Its state: "FAILED", "STOPPED" or "DELETED". */
  readonly state: keyof typeof InstanceState;
  /** Why: "IMAGE_NOT_FOUND", "PLACEMENT_TIMED_OUT", … */
  readonly instanceReason: keyof typeof InstanceReason;
  /** How the process ended; absent where none ran. 128 + signal when a signal ended it. */
  readonly exitCode: number | undefined;

  constructor(instance: Instance, awaited: string) {
    const state = nameOf(InstanceState, instance.state);
    const reason = nameOf(InstanceReason, instance.reason);
    const why = reason === "UNSPECIFIED" ? "" : ` (${reason})`;
    const message = instance.message === "" ? "" : `: ${instance.message}`;
    super(
      "failed_precondition",
      "FAILED_PRECONDITION",
      `${instance.id} is ${state}${why} and not ${awaited}${message}`,
    );
    this.name = "InstanceEndedError";
    this.instance = instance;
    Object.defineProperty(this, "instance", { enumerable: false });
    this.state = state;
    this.instanceReason = reason;
    this.exitCode = instance.exitCode;
  }
}

/** The domain of our reasons. Another domain's reasons are another system's (a proxy's, a mesh's). */
const errorDomain = "clodei.com";

/** Reasons for errors that carry none: made by a proxy, by the transport, or by this side. */
const reasonByCode: Partial<Record<StatusCode, Reason>> = {
  canceled: "CANCELED",
  invalid_argument: "INVALID_ARGUMENT",
  deadline_exceeded: "DEADLINE_EXCEEDED",
  not_found: "NOT_FOUND",
  permission_denied: "PERMISSION_DENIED",
  failed_precondition: "FAILED_PRECONDITION",
  unimplemented: "UNIMPLEMENTED",
  internal: "INTERNAL",
  unavailable: "UNAVAILABLE",
};

/** Turns whatever a transport threw into a ClodeiError. A ClodeiError stays as it is. */
export function toClodeiError(error: unknown): ClodeiError {
  if (error instanceof ClodeiError) return error;
  const connectError = ConnectError.from(error);
  const code = statusCodeOf(connectError.code);
  const info = connectError.findDetails(ErrorInfoSchema).find((detail) => detail.domain === errorDomain);
  const retry = connectError.findDetails(RetryInfoSchema)[0]?.retryDelay;
  const given = info?.reason ?? "";
  const known = isReason(given) ? given : undefined;
  const metadata = { ...info?.metadata, ...(given !== "" && known === undefined ? { reason: given } : {}) };
  // What Connect says of an answer that has no error of its protocol.
  const isForeign = /^HTTP \d{3}$/u.test(connectError.rawMessage);
  const foreign = "answered by something that is not Clodei's public API, such as a proxy: look at endpoint";
  const message = isForeign ? `${connectError.rawMessage}, ${foreign}` : connectError.rawMessage;
  return new ClodeiError(code, known ?? reasonByCode[code] ?? "UNSPECIFIED", message, {
    fieldViolations: connectError
      .findDetails(BadRequestSchema)
      .flatMap((detail) =>
        detail.fieldViolations.map(({ field, reason, description }) => ({ field, rule: reason, message: description })),
      ),
    retryAfterMs: retry === undefined ? undefined : durationMs(retry),
    requestId: requestIdOf(connectError, metadata),
    helpUrl: connectError.findDetails(HelpSchema)[0]?.links[0]?.url,
    metadata,
    cause: connectError,
  });
}

/** The error for a call that the caller's signal ended. */
export function canceledError(signal: AbortSignal): ClodeiError {
  return new ClodeiError("canceled", "CANCELED", "the call was canceled", { cause: signal.reason });
}

function requestIdOf(error: ConnectError, metadata: Readonly<Record<string, string>>): string | undefined {
  const detail = error.findDetails(RequestInfoSchema)[0]?.requestId;
  return detail ?? metadata["requestId"] ?? error.metadata.get("clodei-request-id") ?? undefined;
}

function isReason(text: string): text is Reason {
  return Object.hasOwn(ErrorReason, text) && text !== "UNSPECIFIED";
}

function statusCodeOf(code: Code): StatusCode {
  // codeToString writes exactly these names; its type is merely string.
  return codeToString(code) as StatusCode;
}
