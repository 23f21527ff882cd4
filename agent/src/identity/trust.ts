// Whom the agent believes. The enrollment token carries the digest of the node CA's root; a trust bundle is taken only
// if that root is in it and vouches, by signature, for every other root. Later bundles are judged by the one before,
// so a CA can be replaced without a gap and never by somebody else's.

import { X509Certificate, createHash } from "node:crypto";

/** The certificate or trust bundle that came is not to be believed. */
export class TrustError extends Error {
  override readonly name = "TrustError";
}

// A bundle holds the CA, its successor and their cross signatures.
const maxRoots = 16;

/** sha256 of a certificate's DER, in lower-case hexadecimal. */
export function certificateDigest(certificate: X509Certificate): string {
  return createHash("sha256").update(certificate.raw).digest("hex");
}

/** Parses the bundle and checks it against the token's digest. Throws TrustError. */
export function checkTrustBundle(bundle: readonly Uint8Array[], caDigestHex: string): X509Certificate[] {
  const certificates = parseBundle(bundle);
  const anchor = certificates.find((certificate) => certificateDigest(certificate) === caDigestHex);
  if (anchor === undefined) {
    throw new TrustError(
      "no root of the trust bundle has the digest of the enrollment token: this is another control plane",
    );
  }
  return vouchedBy([anchor], certificates);
}

/** Parses a later bundle and checks it against the roots that are trusted now. Throws TrustError. */
export function checkNextTrustBundle(
  bundle: readonly Uint8Array[],
  trusted: readonly X509Certificate[],
): X509Certificate[] {
  const certificates = parseBundle(bundle);
  const digests = new Set(trusted.map(certificateDigest));
  // A successor may stand in the bundle without its predecessor, if it was vouched for in an earlier bundle.
  const anchors = certificates.filter((certificate) => digests.has(certificateDigest(certificate)));
  return vouchedBy([...trusted, ...anchors], certificates);
}

/** Checks that the certificate is for this key, and that a root of the bundle signed it. Throws TrustError. */
export function checkNodeCertificate(
  der: Uint8Array,
  options: { readonly roots: readonly X509Certificate[]; readonly publicKeyDer: Uint8Array; readonly nowMs: number },
): X509Certificate {
  const certificate = parseCertificate(der);
  const publicKey = certificate.publicKey.export({ format: "der", type: "spki" });
  if (!publicKey.equals(options.publicKeyDer)) throw new TrustError("the certificate is for another key");
  if (!options.roots.some((root) => isSignedBy(certificate, root))) {
    throw new TrustError("no root of the trust bundle signed the certificate");
  }
  if (certificate.validToDate.getTime() <= options.nowMs)
    throw new TrustError("the certificate has run out (or this machine's clock is wrong)");
  return certificate;
}

function parseBundle(bundle: readonly Uint8Array[]): X509Certificate[] {
  if (bundle.length === 0) throw new TrustError("the trust bundle is empty");
  if (bundle.length > maxRoots) throw new TrustError(`the trust bundle has more than ${maxRoots} certificates`);
  return bundle.map((der) => {
    const certificate = parseCertificate(der);
    if (!certificate.ca) throw new TrustError("the trust bundle holds a certificate that is no CA's");
    return certificate;
  });
}

function parseCertificate(der: Uint8Array): X509Certificate {
  try {
    return new X509Certificate(der);
  } catch (error) {
    throw new TrustError("a certificate could not be read", { cause: error });
  }
}

function vouchedBy(anchors: readonly X509Certificate[], certificates: readonly X509Certificate[]): X509Certificate[] {
  const believed = [...anchors];
  let open = certificates.filter((certificate) => !believed.some((other) => other.raw.equals(certificate.raw)));
  // A chain of successors needs as many rounds as it has links.
  for (let round = 0; round < maxRoots && open.length > 0; round++) {
    const vouched = open.filter((certificate) =>
      believed.some((other) => isSignedBy(certificate, other) || isSameAuthority(certificate, other)),
    );
    if (vouched.length === 0) break;
    believed.push(...vouched);
    open = open.filter((certificate) => !vouched.includes(certificate));
  }
  if (open.length > 0) throw new TrustError("the trust bundle holds a root that the known one does not vouch for");
  return [...certificates];
}

/** One authority may have several certificates: its self-signed root, and one that its predecessor signed. */
function isSameAuthority(left: X509Certificate, right: X509Certificate): boolean {
  return left.subject === right.subject && left.publicKey.equals(right.publicKey);
}

function isSignedBy(certificate: X509Certificate, issuer: X509Certificate): boolean {
  try {
    return issuer.ca && certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
  } catch {
    return false;
  }
}
