// What a handler may ask about its request.
import { type ContextValues, createContextKey, createContextValues, type HandlerContext } from "@connectrpc/connect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import { anonymousCaller, type Caller, type CustomerCaller, type PlatformCaller } from "./caller.ts";

/** What the listener notes of a request, from its arrival to its line in the access log. */
export type RequestRecord = {
  readonly requestId: string;
  /** Where the request comes from, as far as it is proven: for the limits, never for the log. */
  readonly address: string;
  /** Whether that address has as many requests open through proxies as it may. */
  readonly hasTooManyOpen: boolean;
  caller: Caller;
  /** "service/method", once the request is known to be for one. */
  method: string | undefined;
  /** Whether that method streams, in whichever direction. */
  isStream: boolean;
  /** The name of the answer's code, once there is one. */
  code: string | undefined;
};

const recordKey = createContextKey<RequestRecord>({
  requestId: "",
  address: "",
  hasTooManyOpen: false,
  caller: anonymousCaller,
  method: undefined,
  isStream: false,
  code: undefined,
});

/** Starts the values of a request. */
export function createRequestValues(record: RequestRecord): ContextValues {
  return createContextValues().set(recordKey, record);
}

/** The record of a request, from the values of its context. */
export function recordOf(values: ContextValues): RequestRecord {
  return values.get(recordKey);
}

/** Who calls. */
export function callerOf(context: HandlerContext): Caller {
  return recordOf(context.values).caller;
}

/** The caller, where it acts for an organization. @throws DomainError PERMISSION_DENIED where it does not. */
export function customerOf(context: HandlerContext): CustomerCaller {
  const caller = callerOf(context);
  if (caller.kind === "customer") return caller;
  throw new DomainError(ErrorReason.PERMISSION_DENIED, "this method is for members of an organization");
}

/** The caller, where it is a platform operator. @throws DomainError PERMISSION_DENIED where it is not. */
export function platformOf(context: HandlerContext): PlatformCaller {
  const caller = callerOf(context);
  if (caller.kind === "platform") return caller;
  throw new DomainError(ErrorReason.PERMISSION_DENIED, "this method is for platform operators");
}

/** The id under which our logs know the request. */
export function requestIdOf(context: HandlerContext): string {
  return recordOf(context.values).requestId;
}
