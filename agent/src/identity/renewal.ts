// Renewal of the node's certificate: over the node link at half of its life, so that an outage of half a life costs
// nothing; and on the public listener once it ran out, where the old key signs the server's fresh challenge together
// with the request for the new one. The old certificate stays valid until the new one is used.

import type { X509Certificate } from "node:crypto";
import { randomInt } from "node:crypto";
import type { Client } from "@connectrpc/connect";
import type { NodeLinkService } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { renewAfterExpiryMs, renewalSignatureMessage } from "@clodei/proto/node-link";
import { parseEndpoint } from "./enroll.ts";
import { connectEnrollment, trustedWith } from "./enrollment-client.ts";
import type { EnrollmentConnection } from "./enrollment-client.ts";
import { publicKeyDer } from "./identity-store.ts";
import type { Identity, IdentityStore } from "./identity-store.ts";
import { certificateRequest, signWithNodeKey } from "./key.ts";
import type { NodeKey } from "./key.ts";
import { checkNextTrustBundle, checkNodeCertificate } from "./trust.ts";

/** The certificate ran out longer ago than it may be renewed: the node must be enrolled again. */
export class CertificateTooOldError extends Error {
  override readonly name = "CertificateTooOldError";
}

/** When to renew: at half of the certificate's life, 10 % earlier or later, so that a fleet does not renew at once. */
export function renewalTimeMs(
  certificate: X509Certificate,
  random: () => number = () => randomInt(0, 1_000_000) / 1_000_000,
): number {
  const begin = certificate.validFromDate.getTime();
  const life = certificate.validToDate.getTime() - begin;
  return begin + life * 0.5 * (0.9 + 0.2 * random());
}

/** Whether the certificate ran out. */
export function isExpired(certificate: X509Certificate, nowMs: number): boolean {
  return certificate.validToDate.getTime() <= nowMs;
}

/** Renews over the node link, writes the new identity down and returns it. */
export async function renewOverLink(
  store: IdentityStore,
  identity: Identity,
  client: Client<typeof NodeLinkService>,
  signal: AbortSignal,
): Promise<Identity> {
  const key = await store.nextKey();
  const response = await client.renewCertificate(
    { certificateRequest: await certificateRequest(key) },
    { signal, timeoutMs: 20_000 },
  );
  return await adopt(store, identity, key, response);
}

/** Renews a certificate that ran out, on the public listener. Throws CertificateTooOldError after 30 days. */
export async function renewExpired(store: IdentityStore, identity: Identity, signal: AbortSignal): Promise<Identity> {
  if (Date.now() - identity.certificate.validToDate.getTime() > renewAfterExpiryMs) {
    throw new CertificateTooOldError("the node's certificate ran out more than 30 days ago: enroll the node again");
  }
  const key = await store.nextKey();
  using connection = connectToKnown(identity);
  const { challenge } = await connection.client.createRenewalChallenge({ nodeId: identity.nodeId }, { signal });
  const request = await certificateRequest(key);
  const signature = signWithNodeKey(identity.key, renewalSignatureMessage(challenge, request));
  const response = await connection.client.renewExpired(
    {
      nodeId: identity.nodeId,
      certificate: new Uint8Array(identity.certificate.raw),
      challenge,
      certificateRequest: request,
      signature,
    },
    { signal },
  );
  return await adopt(store, identity, key, response);
}

function connectToKnown(identity: Identity): EnrollmentConnection {
  return connectEnrollment(identity.controlPlaneUrl, trustedWith(identity.roots));
}

interface RenewalResponse {
  readonly certificate: Uint8Array;
  readonly trustBundle: readonly Uint8Array[];
  readonly nodeEndpoint: string;
}

async function adopt(
  store: IdentityStore,
  identity: Identity,
  key: NodeKey,
  response: RenewalResponse,
): Promise<Identity> {
  const roots = checkNextTrustBundle(response.trustBundle, identity.roots);
  const certificate = checkNodeCertificate(response.certificate, {
    roots,
    publicKeyDer: publicKeyDer(key),
    nowMs: Date.now(),
  });
  const renewed: Identity = {
    ...identity,
    key,
    certificate,
    roots,
    nodeEndpoint: parseEndpoint(response.nodeEndpoint),
  };
  await store.commit(renewed);
  return renewed;
}
