// TLS of the node listener and of the replica listener: TLS 1.3 only, X25519, and a client certificate of the node CA,
// which the handshake itself requires. @grpc/grpc-js takes none of the first two from its public factory, so the
// credentials are a class of ours; a test sees that TLS 1.2 and a missing or foreign certificate are refused.
import type { SecureContextOptions } from "node:tls";
import { ServerCredentials } from "@grpc/grpc-js";
import { dispatchLimits } from "./limits.ts";

/** What the listener shows and whom it believes, in PEM. */
export type ListenerTlsMaterial = {
  /** The listener's key. */
  readonly privateKeyPem: string;
  /** The listener's certificate and what leads to its root. */
  readonly certificateChainPem: string;
  /** The node CA's roots. */
  readonly clientCaPem: string;
};

/** Both ends of the link between replicas keep to it, and the node listener's end of the node link. */
export const tlsProtocol = { minVersion: "TLSv1.3", maxVersion: "TLSv1.3", ecdhCurve: "X25519" } as const;

/** The listener's credentials. Their certificate can be replaced while the listener serves. */
export class ListenerCredentials extends ServerCredentials {
  constructor(material: ListenerTlsMaterial) {
    super(
      {
        ...tlsProtocol,
        requestCert: true,
        rejectUnauthorized: true,
        handshakeTimeout: dispatchLimits.handshakeTimeoutMs,
      },
      secureContext(material),
    );
  }

  /** New connections see the new certificate; those that stand go on. */
  renew(material: ListenerTlsMaterial): void {
    this.updateSecureContextOptions(secureContext(material));
  }

  override _equals(other: ServerCredentials): boolean {
    return this === other;
  }
}

// The protocol's bounds stand here too: replacing the context of a TLS server forgets those that it had.
function secureContext(material: ListenerTlsMaterial): SecureContextOptions {
  return { ...tlsProtocol, ca: material.clientCaPem, cert: material.certificateChainPem, key: material.privateKeyPem };
}
