/** Where the control plane is, as the caller says it. */
import { ClodeiError } from "./errors.ts";

/** @throws ClodeiError with INVALID_ARGUMENT where it is no URL, or one over which a key would be sent in the open. */
export function parseEndpoint(endpoint: string): URL {
  const url = URL.canParse(endpoint) ? new URL(endpoint) : undefined;
  const loopback = ["localhost", "127.0.0.1", "[::1]"].includes(url?.hostname ?? "");
  // Over plain http an API key could be read by anyone on the way.
  if (url?.protocol === "https:" || (url?.protocol === "http:" && loopback)) return url;
  const message = `endpoint must be like "https://api.example:8443" (http:// on loopback alone), not "${endpoint}"`;
  throw new ClodeiError("invalid_argument", "INVALID_ARGUMENT", message);
}
