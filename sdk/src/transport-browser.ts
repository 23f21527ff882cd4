/**
 * The browser's side of the SDK: Connect over fetch. The browser makes the connections, decides which certificates
 * it trusts, and keeps an answer from a page whose origin the control plane does not name.
 */
import { ConnectError } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { parseEndpoint } from "./endpoint.ts";
import { ClodeiError } from "./errors.ts";
import { isCutShort, type Wire, type WireOptions } from "./wire.ts";

/** Opens a wire. Nothing is sent before the first call. */
export function openWire(options: WireOptions): Wire {
  const url = parseEndpoint(options.endpoint);
  if (options.ca !== undefined) {
    const message = "ca cannot be given in a browser, which trusts the authorities of its own settings: leave it out";
    throw new ClodeiError("invalid_argument", "INVALID_ARGUMENT", message);
  }
  return {
    transport: createConnectTransport({ baseUrl: url.href, useBinaryFormat: true }),
    isConnectionLost,
    explain: (error) => (isConnectionLost(error) ? explainLost(url.origin) : undefined),
    // Connections are the browser's; the calls end by their signals.
    close: () => {},
  };
}

/** fetch has one error for all that can happen to a connection. */
function isConnectionLost(error: unknown): boolean {
  // A token function asks its issuer by fetch, too.
  if (error instanceof TypeError || isCutShort(error)) return true;
  return error instanceof ConnectError && !error.isWireError && error.cause instanceof TypeError;
}

/** The browser tells a page no more than that it did not work. */
function explainLost(origin: string): string {
  return (
    `no answer from ${origin} that this page may read: the connection was lost, the browser does not trust the ` +
    "certificate there, or CLODEI_CORS_ORIGINS of the control plane does not name this page's origin"
  );
}
