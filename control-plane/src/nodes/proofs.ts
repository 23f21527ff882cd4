// What a stranger must prove before anything is done for it, and what it is told where it does not: what to do next,
// and nothing of what exists.
import { verify, X509Certificate } from "node:crypto";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { renewalSignatureMessage } from "@clodei/proto/node-link";
import { DomainError } from "../platform/errors.ts";
import { readCertificateRequest, type RequestedKey } from "./certificates.ts";

/** The key of a certificate request. @throws DomainError INVALID_ARGUMENT. */
export async function requireKey(certificateRequest: Uint8Array): Promise<RequestedKey> {
  const key = await readCertificateRequest(certificateRequest);
  if (key !== undefined) return key;
  throw new DomainError(ErrorReason.INVALID_ARGUMENT, "the certificate request cannot be used", {
    fields: [
      {
        field: "certificate_request",
        rule: "pkcs10-p256",
        message: "must be a PKCS #10 request in DER for an ECDSA key on P-256, signed by that key",
      },
    ],
  });
}

/** Whether the certificate's key signed this renewal. */
export function isSignedBy(
  certificate: Uint8Array,
  renewal: { readonly challenge: Uint8Array; readonly certificateRequest: Uint8Array; readonly signature: Uint8Array },
): boolean {
  try {
    const key = new X509Certificate(certificate).publicKey;
    const message = renewalSignatureMessage(renewal.challenge, renewal.certificateRequest);
    return verify("sha256", message, { key, dsaEncoding: "der" }, renewal.signature);
  } catch {
    return false; // a signature that is no DER
  }
}

/** One text for all that can be wrong with a token, so that it tells nobody which tokens there are. */
export function tokenInvalid(): DomainError {
  return new DomainError(
    ErrorReason.ENROLLMENT_TOKEN_INVALID,
    "this enrollment token enrolls no node here: it is unknown, expired, revoked or used up. " +
      "Ask an operator for a new one (NodeService.CreateEnrollmentToken) and enroll again",
  );
}

/** Of challenge and signature: one text, so that neither can be tried apart. */
export function challengeInvalid(): DomainError {
  return new DomainError(
    ErrorReason.CHALLENGE_INVALID,
    "the challenge is too old, was used before, or is not signed by the key of this node's certificate: " +
      "ask for a new one (CreateRenewalChallenge) and sign it at once",
  );
}

/** For whoever holds the key of a certificate that is no longer good for a renewal, or of one that is not ours. */
export function certificateInvalid(): DomainError {
  return new DomainError(
    ErrorReason.CERTIFICATE_INVALID,
    "this certificate cannot be renewed: it is not this node's newest, or ran out more than 30 days ago. " +
      "Ask an operator to enroll the node again (NodeService.ReenrollNode)",
  );
}
