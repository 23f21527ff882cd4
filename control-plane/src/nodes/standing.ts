// What every part of this slice says alike: which node is meant, whether it may work, who is told of a change.
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { Location } from "@clodei/proto/gen/clodei/v1/location";
import { type EnrollmentTokenId, type NodeId, parseId } from "@clodei/proto/ids";
import type { SystemTx, Tx } from "../platform/database.ts";
import { DomainError } from "../platform/errors.ts";
import type { Topic, Wakeups } from "../platform/wakeups.ts";
import type { FleetNode, NodeLocation, NodeState } from "./model.ts";
import * as store from "./store.ts";

/** Where hints go after a commit. */
export type Hints = Pick<Wakeups, "notify">;

/** Locks a node against other writers until the transaction ends. @throws DomainError NOT_FOUND. */
export async function lockNode(tx: SystemTx, nodeId: NodeId): Promise<FleetNode> {
  const [node] = await store.lockNodes(tx, [nodeId]);
  return node ?? throwNotFound();
}

/** One node. @throws DomainError NOT_FOUND. */
export async function requireNode(tx: SystemTx, nodeId: NodeId): Promise<FleetNode> {
  return (await store.readNode(tx, nodeId)) ?? throwNotFound();
}

/** A node id from a request. One that is none names no node. @throws DomainError NOT_FOUND. */
export function requireNodeId(text: string): NodeId {
  return parseId("nod", text) ?? throwNotFound();
}

/** An enrollment token's id from a request. @throws DomainError NOT_FOUND. */
export function requireEnrollmentTokenId(text: string): EnrollmentTokenId {
  const id = parseId("ent", text);
  if (id !== undefined) return id;
  throw new DomainError(
    ErrorReason.NOT_FOUND,
    "there is no such enrollment token: ListEnrollmentTokens shows those that there are",
  );
}

/** A location from a request. @throws DomainError INVALID_ARGUMENT where there is none. */
export function requireLocation(location: Location | undefined): NodeLocation {
  if (location !== undefined) return location;
  throw new DomainError(ErrorReason.INVALID_ARGUMENT, "location is required", {
    fields: [{ field: "location", rule: "required", message: "must say where the nodes stand" }],
  });
}

/** Sends hints once the transaction has committed. */
export function hintAfterCommit(tx: Tx, hints: Hints, ...topics: readonly Topic[]): void {
  tx.afterCommit(() => {
    for (const topic of topics) hints.notify(topic);
  });
}

/** Refuses what only a node in good standing may do. @throws DomainError NODE_REVOKED, NODE_QUARANTINED. */
export function assertMayWork(state: NodeState): void {
  if (state === "revoked") {
    throw new DomainError(
      ErrorReason.NODE_REVOKED,
      "this node was revoked: the machine can be enrolled as a new node only, with a new enrollment token",
    );
  }
  if (state === "quarantined") {
    throw new DomainError(
      ErrorReason.NODE_QUARANTINED,
      "two processes used this node's identity: stop the copy, then enroll the node again with the token of ReenrollNode",
    );
  }
}

function throwNotFound(): never {
  throw new DomainError(ErrorReason.NOT_FOUND, "there is no such node: ListNodes shows those that there are");
}
