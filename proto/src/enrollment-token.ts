/**
 * Enrollment tokens: `CLDT-1-<ca digest>-<id>-<secret>`. The digest is sha256 of the DER of the node CA's root:
 * the agent refuses a control plane that cannot show a root with it, so whoever carries the token also carries
 * the trust.
 */
import { type EnrollmentTokenId, parseId } from "./ids.ts";

/** The parts of an enrollment token. */
export type EnrollmentTokenParts = {
  /** sha256 of the root certificate's DER, 64 hexadecimal digits in lower case. */
  readonly caDigestHex: string;
  readonly id: EnrollmentTokenId;
  /** 32 to 128 characters of base64url; `newSecret` makes one. */
  readonly secret: string;
};

// Only the secret may hold a hyphen, and it stands last: the parts cannot be read in two ways.
const pattern = /^CLDT-1-([0-9a-f]{64})-(ent_[0-9a-z]{26})-([A-Za-z0-9_-]{32,128})$/;

/**
 * Writes an enrollment token.
 *
 * @throws RangeError where a part is malformed.
 */
export function formatEnrollmentToken(parts: EnrollmentTokenParts): string {
  const text = `CLDT-1-${parts.caDigestHex}-${parts.id}-${parts.secret}`;
  // The token itself stays out of the message: errors are logged.
  if (parseEnrollmentToken(text) === undefined) throw new RangeError("a part of the enrollment token is malformed");
  return text;
}

/** Reads an enrollment token; undefined where it is malformed. White space around it is not taken away. */
export function parseEnrollmentToken(text: string): EnrollmentTokenParts | undefined {
  const match = pattern.exec(text);
  if (match === null) return undefined;
  const [, caDigestHex = "", idText = "", secret = ""] = match;
  const id = parseId("ent", idText);
  return id === undefined ? undefined : { caDigestHex, id, secret };
}
