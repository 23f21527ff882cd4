// Calls EnrollmentService on the public listener, over TLS that is verified fully.

import type { X509Certificate } from "node:crypto";
import { getCACertificates } from "node:tls";
import type { Client } from "@connectrpc/connect";
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { dial } from "../dial.ts";
import type { Anchor } from "./anchor.ts";

const callTimeoutMs = 20_000;
const maxMessageBytes = 256 * 1024;

/** A client whose connection ends with the scope. */
export interface EnrollmentConnection extends Disposable {
  readonly client: Client<typeof EnrollmentService>;
}

/** Opens a connection that only a listener with a certificate under these roots, for this host name, passes. */
export function connectEnrollment(
  controlPlaneUrl: string,
  trusted: readonly string[] | "system",
): EnrollmentConnection {
  const manager = new Http2SessionManager(
    controlPlaneUrl,
    {},
    {
      createConnection: (url) =>
        dial(url, {
          minVersion: "TLSv1.2",
          rejectUnauthorized: true,
          ...(trusted === "system" ? {} : { ca: [...trusted] }),
        }),
    },
  );
  const transport = createGrpcTransport({
    baseUrl: controlPlaneUrl,
    sessionManager: manager,
    defaultTimeoutMs: callTimeoutMs,
    readMaxBytes: maxMessageBytes,
    writeMaxBytes: maxMessageBytes,
    acceptCompression: [],
  });
  return {
    client: createClient(EnrollmentService, transport),
    [Symbol.dispose]: () => manager.abort(),
  };
}

/** What an anchor trusts, in PEM. */
export function trustedBy(anchor: Anchor): readonly string[] | "system" {
  return anchor.kind === "system" ? "system" : [anchor.root.toString()];
}

/**
 * What an enrolled node trusts at the public listener, in PEM: that one shows a certificate under the node CA or under a
 * public root, and both were good at enrollment.
 */
export function trustedWith(roots: readonly X509Certificate[]): readonly string[] {
  return [...roots.map((root) => root.toString()), ...getCACertificates("default")];
}
