/** What both ends of the node link agree on beside the schema. */
import type { InstanceId } from "./ids.ts";

/** Version of the session protocol, in Hello. */
export const nodeLinkProtocolVersion = 1;

/** Bytes of output that a node keeps of each attempt; the oldest are dropped first. */
export const maxLogBytesPerAttempt = 64 * 1024 * 1024;

/** Bytes of output in one LogChunk at most: 1,000 slow readers then hold 16 MB and not 4 GB. */
export const maxLogChunkBytes = 16 * 1024;

/** For how long after its certificate ran out a node that is not revoked may renew it. */
export const renewAfterExpiryMs = 30 * 24 * 60 * 60 * 1000;

/** Labels of a node's containers and networks. An agent touches nothing that does not carry its own node id. */
export const containerLabels = {
  nodeId: "clodei.node_id",
  instanceId: "clodei.instance_id",
  attempt: "clodei.attempt",
  generation: "clodei.generation",
} as const;

/** The name of an attempt's container: a second create of the same attempt is a conflict to adopt, never a second container. */
export function containerName(instanceId: InstanceId, attempt: number): string {
  if (!Number.isSafeInteger(attempt) || attempt < 1) throw new RangeError(`attempt ${attempt} is not a number from 1`);
  return `clodei-${instanceId}-${attempt}`;
}

/** Sets the signature of RenewExpired apart from every other signature that the node's key makes. */
export const renewalSignatureContext = "clodei-renew-expired-v1";

/**
 * What a node signs with its old key to renew a certificate that ran out: context ‖ challenge ‖ CSR.
 * The challenge always has 32 bytes, so the parts cannot be shifted against each other.
 */
export function renewalSignatureMessage(
  challenge: Uint8Array,
  certificateRequest: Uint8Array,
): Uint8Array<ArrayBuffer> {
  if (challenge.length !== 32) throw new RangeError(`a challenge has 32 bytes, not ${challenge.length}`);
  const context = new TextEncoder().encode(renewalSignatureContext);
  const message = new Uint8Array(context.length + challenge.length + certificateRequest.length);
  message.set(context, 0);
  message.set(challenge, context.length);
  message.set(certificateRequest, context.length + challenge.length);
  return message;
}
