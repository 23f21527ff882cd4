/** Random secrets inside tokens and API keys. */
import { encodeBase32 } from "./base32.ts";

/** 256 bits: nobody guesses it, so that a plain sha256 is enough to store it by. */
const secretBytes = 32;

/**
 * Makes a new secret: 52 letters and digits, so that a double click selects the whole of what holds it.
 */
export function newSecret(): string {
  return encodeBase32(globalThis.crypto.getRandomValues(new Uint8Array(secretBytes)));
}
