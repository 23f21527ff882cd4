// What operators decide about nodes: cordon, revoke, enroll again. And what they watch.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { NodeId } from "@clodei/proto/ids";
import { currentCursor } from "../platform/changes.ts";
import type { SystemTx } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import { endCertificates, revokeReenrollmentTokens } from "./enrollment-store.ts";
import type { FleetNode } from "./model.ts";
import { type Hints, hintAfterCommit, lockNode, requireNode } from "./standing.ts";
import { bumpEnrollmentEpoch, readFleet, updateNode } from "./store.ts";

/** The fleet and the feed's position of one moment. Needs a "repeatable read" transaction. */
export async function snapshotFleet(
  tx: SystemTx,
): Promise<{ readonly nodes: readonly FleetNode[]; readonly cursor: string }> {
  const cursor = await currentCursor(tx);
  return { cursor, nodes: await readFleet(tx) };
}

/** Keeps new instances off a node, or lets them on again. @throws DomainError NOT_FOUND. */
export async function setCordoned(tx: SystemTx, nodeId: NodeId, cordoned: boolean, hints: Hints): Promise<FleetNode> {
  const node = await lockNode(tx, nodeId);
  if (node.cordoned === cordoned) return node;
  await updateNode(tx, nodeId, { cordoned });
  hintAfterCommit(tx, hints, "nodes", "placement");
  return requireNode(tx, nodeId);
}

/**
 * Revokes a node for good: its certificates end, its session is closed by whoever holds it, its instances are
 * lost. A node that was revoked before stays as it is. @throws DomainError NOT_FOUND.
 */
export async function revokeNode(
  tx: SystemTx,
  nodeId: NodeId,
  comment: string,
  now: Date,
  hints: Hints,
): Promise<FleetNode> {
  const node = await lockNode(tx, nodeId);
  if (node.state === "revoked") return node;
  await endCertificates(tx, nodeId);
  await revokeReenrollmentTokens(tx, nodeId, now);
  await updateNode(tx, nodeId, { state: "revoked", connected: false, acceptingWork: false, message: comment });
  hintAfterCommit(tx, hints, `node:${nodeId}`, "nodes", "instances", "placement");
  return requireNode(tx, nodeId);
}

/**
 * Makes room for a new enrollment of a node under its id: certificates and earlier enrollments end. The node
 * keeps its state until it is enrolled. @throws DomainError NOT_FOUND, NODE_REVOKED.
 */
export async function endIdentity(tx: SystemTx, nodeId: NodeId, now: Date, hints: Hints): Promise<FleetNode> {
  const node = await lockNode(tx, nodeId);
  if (node.state === "revoked") {
    throw new DomainError(ErrorReason.NODE_REVOKED, "a revoked node stays revoked: enroll the machine as a new node");
  }
  await endCertificates(tx, nodeId);
  await revokeReenrollmentTokens(tx, nodeId, now);
  await bumpEnrollmentEpoch(tx, nodeId);
  // Its state stays until its lease ends; new work would wait there for an agent that may not come.
  const message = "it waits for its new enrollment";
  await updateNode(tx, nodeId, { connected: false, acceptingWork: false, acceptingWorkMessage: message });
  hintAfterCommit(tx, hints, `node:${nodeId}`, "nodes");
  return requireNode(tx, nodeId);
}
