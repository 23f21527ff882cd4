// The TLS connection below HTTP/2, to listeners that may not be there. Without a limit of its own the kernel asks a host
// that is silent after 1, 3, 7 and 15 seconds, and one that comes back in between is not noticed until the next time.

import { isIP } from "node:net";
import { connect } from "node:tls";
import type { ConnectionOptions, TLSSocket } from "node:tls";

/** Two packets are sent in it, a second apart: a lost one is no reason to begin anew. */
const dialTimeoutMs = 2_000;

/** Connects, and fails where the host takes no connection within 2 s. What follows, TLS, is not bounded here. */
export function dial({ hostname, port }: URL, options: ConnectionOptions): TLSSocket {
  const host = hostname.replace(/^\[(.*)\]$/, "$1");
  const socket = connect({
    host,
    port: Number(port === "" ? 443 : port),
    ALPNProtocols: ["h2"],
    ...(isIP(host) === 0 ? { servername: host } : {}),
    ...options,
  });
  // Not from the beginning: a resolver whose first server is away takes 5 s for a name, each time.
  socket.once("connectionAttempt", () => {
    const timer = setTimeout(() => {
      if (socket.connecting) socket.destroy(new Error(`no connection to ${host} within ${dialTimeoutMs} ms`));
    }, dialTimeoutMs);
    socket.once("connect", () => clearTimeout(timer)).once("close", () => clearTimeout(timer));
  });
  return socket;
}
