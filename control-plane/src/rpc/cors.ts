// Which browser pages may read our answers: those of the origins in the configuration, and no others.
import { cors } from "@connectrpc/connect";

/** The part of a request that decides. */
export type CorsRequest = {
  readonly method: string | undefined;
  readonly origin: string | undefined;
  /** The header access-control-request-method, which only a preflight has. */
  readonly requestedMethod: string | undefined;
};

const allowedHeaders = [...cors.allowedHeaders, "Authorization", "Clodei-Organization"].join(", ");
const exposedHeaders = [...cors.exposedHeaders, "Clodei-Request-Id", "Clodei-Reason", "Retry-After"].join(", ");
/** Browsers cap it at two hours. */
const preflightCacheSeconds = 7_200;

/** Whether a request is a browser's question in advance. */
export function isPreflight(request: CorsRequest): boolean {
  return request.method === "OPTIONS" && request.origin !== undefined && request.requestedMethod !== undefined;
}

/** The headers of an answer. Without an allowed origin a browser keeps the answer from the page. */
export function corsHeaders(request: CorsRequest, allowedOrigins: ReadonlySet<string>): Record<string, string> {
  // Also without an origin: a cache must not give one origin's answer to another.
  const headers: Record<string, string> = { vary: "origin" };
  if (request.origin === undefined || !allowedOrigins.has(request.origin)) return headers;
  headers["access-control-allow-origin"] = request.origin;
  if (isPreflight(request)) {
    headers["access-control-allow-methods"] = cors.allowedMethods.join(", ");
    headers["access-control-allow-headers"] = allowedHeaders;
    headers["access-control-max-age"] = String(preflightCacheSeconds);
  } else {
    headers["access-control-expose-headers"] = exposedHeaders;
  }
  return headers;
}
