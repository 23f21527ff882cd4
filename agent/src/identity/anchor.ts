// Finds out by what the control plane's listener can be verified before anything is said to it. The first connection
// sends no byte above TLS and believes nothing: it looks whether the listener's chain holds the root that the
// enrollment token names by digest. If so, that root alone is the anchor of every later connection; if not, the
// system's roots are. Later connections are verified fully, host name included.

import { connect } from "node:tls";
import type { DetailedPeerCertificate } from "node:tls";
import { X509Certificate } from "node:crypto";
import { isIP } from "node:net";
import { certificateDigest } from "./trust.ts";

/** What verifies the listener. */
export type Anchor = { readonly kind: "system" } | { readonly kind: "root"; readonly root: X509Certificate };

const timeoutMs = 10_000;
const maxChainLength = 10;

/** Looks at the chain of the listener. Throws where it cannot be reached. */
export async function findAnchor(url: URL, caDigestHex: string, signal: AbortSignal): Promise<Anchor> {
  const host = url.hostname.replace(/^\[(.*)\]$/, "$1");
  const { promise, resolve, reject } = Promise.withResolvers<Anchor>();
  const socket = connect({
    host,
    port: Number(url.port === "" ? 443 : url.port),
    // Nothing is believed and nothing is sent on this connection; see above.
    rejectUnauthorized: false,
    minVersion: "TLSv1.2",
    ALPNProtocols: ["h2", "http/1.1"],
    ...(isIP(host) === 0 ? { servername: host } : {}),
  });
  const onAbort = (): void => reject(signal.reason);
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    socket.setTimeout(timeoutMs, () => reject(new Error(`${url.host} did not answer within ${timeoutMs} ms`)));
    socket.once("error", (error: Error) =>
      reject(new Error(`${url.host} cannot be reached: ${error.message}`, { cause: error })),
    );
    socket.once("secureConnect", () => {
      const root = chainOf(socket.getPeerCertificate(true)).find(
        (certificate) => certificate.ca && certificateDigest(certificate) === caDigestHex,
      );
      resolve(root === undefined ? { kind: "system" } : { kind: "root", root });
    });
    return await promise;
  } finally {
    signal.removeEventListener("abort", onAbort);
    socket.destroy();
  }
}

/** The certificates that the listener sent, its own first. */
function chainOf(leaf: DetailedPeerCertificate): X509Certificate[] {
  const chain: X509Certificate[] = [];
  let current: DetailedPeerCertificate | undefined = leaf;
  for (let length = 0; length < maxChainLength && current?.raw !== undefined; length++) {
    chain.push(new X509Certificate(current.raw));
    // The root's issuer is the root itself.
    if (current.issuerCertificate === current) break;
    current = current.issuerCertificate;
  }
  return chain;
}
