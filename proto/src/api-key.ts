/**
 * API keys: `clodei_sk_<id>_<secret>_<crc32>`. The checksum tells a typo from a revoked key before anything
 * is sent, and lets secret scanners be sure of a find. It protects nothing.
 */
import { type ApiKeyId, parseId } from "./ids.ts";

/** The parts of an API key. */
export type ApiKey = {
  readonly id: ApiKeyId;
  /** 32 to 128 letters and digits; `newSecret` makes one. */
  readonly secret: string;
};

const prefix = "clodei_sk_";
const pattern = /^clodei_sk_(key_[0-9a-z]{26})_([A-Za-z0-9]{32,128})_([0-9a-f]{8})$/;

/**
 * Writes an API key.
 *
 * @throws RangeError where a part is malformed.
 */
export function formatApiKey(key: ApiKey): string {
  const body = `${prefix}${key.id}_${key.secret}`;
  const text = `${body}_${crc32(body)}`;
  // The key itself stays out of the message: errors are logged.
  if (parseApiKey(text) === undefined) throw new RangeError("an API key needs an id and 32 to 128 letters and digits");
  return text;
}

/** Reads an API key. Undefined means malformed: shape or checksum is wrong. Nothing is said about validity. */
export function parseApiKey(text: string): ApiKey | undefined {
  const match = pattern.exec(text);
  if (match === null) return undefined;
  const [, idText = "", secret = "", checksum = ""] = match;
  const id = parseId("key", idText);
  if (id === undefined || crc32(text.slice(0, -checksum.length - 1)) !== checksum) return undefined;
  return { id, secret };
}

/** CRC-32 (ISO 3309, the one of zip and gzip) of ASCII text, 8 hexadecimal digits. */
function crc32(text: string): string {
  let crc = 0xffffffff;
  for (let at = 0; at < text.length; at++) {
    crc ^= text.charCodeAt(at);
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ((crc ^ 0xffffffff) >>> 0).toString(16).padStart(8, "0");
}
