/**
 * Ids: a short prefix that says what is named, and a UUIDv7 in base32 (`ins_01h455vb4pex5vsknk084sn02q`),
 * as TypeID (https://github.com/jetify-com/typeid) specifies. Text order is order of creation, to the
 * millisecond; two ids of one millisecond stand in random order.
 *
 * Ids are parsed at the edge and branded inside: a NodeId is never taken for an InstanceId.
 */
import { encodeBase32 } from "./base32.ts";

/** A checked id with this prefix. */
export type Id<P extends string> = string & { readonly __prefix: P };

export type InstanceId = Id<"ins">;
export type NodeId = Id<"nod">;
export type OrganizationId = Id<"org">;
export type ApiKeyId = Id<"key">;
export type UserId = Id<"usr">;
export type EnrollmentTokenId = Id<"ent">;
export type OperatorId = Id<"opr">;

/** Every prefix in use. A prefix is never used for a second kind of object. */
export type IdPrefix = "ins" | "nod" | "org" | "key" | "usr" | "ent" | "opr";

// 128 bits are 26 digits of 5 bits, of which the first carries only 3: above 7 it would not fit a UUID.
const suffixPattern = /^[0-7][0-9a-hjkmnp-tv-z]{25}$/;

/** The greatest time that a UUIDv7 holds: 48 bits of milliseconds, in the year 10889. */
const maxTimeMs = 2 ** 48 - 1;

/**
 * Makes a new id.
 *
 * @param nowMs Milliseconds since 1970; the clock where not given.
 * @throws RangeError where nowMs does not fit a UUIDv7.
 * @example newId("ins") // "ins_01h455vb4pex5vsknk084sn02q"
 */
export function newId<P extends IdPrefix>(prefix: P, nowMs: number = Date.now()): Id<P> {
  const timeMs = Math.floor(nowMs);
  if (!(timeMs >= 0 && timeMs <= maxTimeMs)) throw new RangeError(`time ${nowMs} does not fit an id`);
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(16));
  const view = new DataView(bytes.buffer);
  view.setUint16(0, Math.floor(timeMs / 2 ** 32));
  view.setUint32(2, timeMs % 2 ** 32);
  view.setUint8(6, 0x70 | (view.getUint8(6) & 0x0f)); // version 7
  view.setUint8(8, 0x80 | (view.getUint8(8) & 0x3f)); // the variant of RFC 9562
  return brand(prefix, `${prefix}_${encodeBase32(bytes)}`);
}

/**
 * Returns the text as an id, or undefined where it is none with this prefix. There is one spelling of an id:
 * upper case and look-alike letters are refused.
 */
export function parseId<P extends IdPrefix>(prefix: P, text: string): Id<P> | undefined {
  if (!text.startsWith(`${prefix}_`)) return undefined;
  return suffixPattern.test(text.slice(prefix.length + 1)) ? brand(prefix, text) : undefined;
}

/** The only place that brands. The prefix is an argument so that the type follows from it. */
function brand<P extends string>(_prefix: P, text: string): Id<P> {
  return text as Id<P>;
}
