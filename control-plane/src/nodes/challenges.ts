/**
 * Challenges of RenewExpired. Anyone may ask for one, for any node id, so they are not stored: a challenge carries
 * its end, a nonce, and a MAC over both and the node's id, under a secret that all replicas derive from the CA.
 * That it works once is the database's: it remembers those that were used.
 */
import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import type { NodeId } from "@clodei/proto/ids";

/** Long enough for a signature and a round trip over a bad line. */
export const challengeLifetimeMs = 60_000;

const endBytes = 6;
const nonceBytes = 10;
const macBytes = 16;
const challengeBytes = endBytes + nonceBytes + macBytes;

/** A challenge, 32 bytes. */
export type Challenge = { readonly challenge: Uint8Array<ArrayBuffer>; readonly expireTime: Date };

/** Makes a challenge for a node, whether or not there is such a node. */
export function createChallenge(secret: Uint8Array, nodeId: NodeId, now: Date): Challenge {
  const expireTimeMs = now.getTime() + challengeLifetimeMs;
  const head = Buffer.alloc(endBytes + nonceBytes);
  head.writeUIntBE(expireTimeMs, 0, endBytes);
  randomBytes(nonceBytes).copy(head, endBytes);
  const challenge = new Uint8Array(Buffer.concat([head, macOf(secret, nodeId, head)]));
  return { challenge, expireTime: new Date(expireTimeMs) };
}

/** When a challenge of ours for this node ends; undefined where it is not ours, another node's, or over. */
export function checkChallenge(secret: Uint8Array, nodeId: NodeId, challenge: Uint8Array, now: Date): Date | undefined {
  if (challenge.length !== challengeBytes) return undefined;
  const bytes = Buffer.from(challenge);
  const head = bytes.subarray(0, endBytes + nonceBytes);
  if (!timingSafeEqual(bytes.subarray(endBytes + nonceBytes), macOf(secret, nodeId, head))) return undefined;
  const expireTime = new Date(head.readUIntBE(0, endBytes));
  return expireTime > now ? expireTime : undefined;
}

function macOf(secret: Uint8Array, nodeId: NodeId, head: Buffer): Buffer {
  // A node id has one length, so id and head cannot be shifted against each other.
  return createHmac("sha256", secret).update(nodeId).update(head).digest().subarray(0, macBytes);
}
