/**
 * Crockford's base32 in lower case, as TypeID uses it: no i, l, o, u, so that a person can read an id aloud.
 * The text keeps the order of the bytes.
 */
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz";

/**
 * Encodes bytes as one big-endian number, padded with zero bits at the front to a whole number of digits.
 *
 * @example encodeBase32(new Uint8Array(16)) // 26 digits, the first of which is at most 7
 */
export function encodeBase32(bytes: Uint8Array): string {
  let value = 0n;
  for (const byte of bytes) value = (value << 8n) | BigInt(byte);
  let text = "";
  for (let left = Math.ceil((bytes.length * 8) / 5); left > 0; left--) {
    text = alphabet.charAt(Number(value & 31n)) + text;
    value >>= 5n;
  }
  return text;
}
