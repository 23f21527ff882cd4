// One error type for everything that a caller may be told, free of any transport: services throw it with a
// stable reason, and rpc/errors.ts alone turns reasons into status codes. Every other error is ours, and its
// text stays in the log.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { OrganizationId } from "@clodei/proto/ids";

/** A field of a request that breaks a rule. */
export type FieldViolation = {
  /** The field's path, "spec.gpus.count". */
  readonly field: string;
  /** Which rule it breaks, for a program: "uint32.lte", "image-allowlist". */
  readonly rule: string;
  /** What is wrong and what is allowed, for a person. */
  readonly message: string;
};

/** What a DomainError can carry beside its reason. */
export type DomainErrorOptions = {
  readonly fields?: readonly FieldViolation[];
  /** With QUOTA_EXCEEDED: whose limit is reached, "organization:org_…". The message says which. */
  readonly quotaSubject?: string;
  /** How long to wait before a retry can help. Absent: a retry does not help. */
  readonly retryAfterMs?: number;
  /** Facts for a program, by lowerCamelCase names. Never a secret, an e-mail address, or another's object. */
  readonly metadata?: Readonly<Record<string, string>>;
  readonly cause?: unknown;
};

/** A failure that the caller may be told of. The message is for a person, the reason for a program. */
export class DomainError extends Error {
  readonly reason: ErrorReason;
  readonly fields: readonly FieldViolation[];
  readonly quotaSubject: string | undefined;
  readonly retryAfterMs: number | undefined;
  readonly metadata: Readonly<Record<string, string>>;

  constructor(reason: ErrorReason, message: string, options: DomainErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = "DomainError";
    this.reason = reason;
    this.fields = options.fields ?? [];
    this.quotaSubject = options.quotaSubject;
    this.retryAfterMs = options.retryAfterMs;
    this.metadata = options.metadata ?? {};
  }
}

/**
 * A limit of an organization is reached.
 * @param name the limit for a program, "pending_instances".
 * @param what the limit for a person, after "at most 1000".
 */
export function quotaExceeded(organizationId: OrganizationId, name: string, limit: number, what: string): DomainError {
  return new DomainError(ErrorReason.QUOTA_EXCEEDED, `at most ${limit} ${what}`, {
    quotaSubject: `organization:${organizationId}`,
    metadata: { quota: name, limit: String(limit) },
  });
}
