// WatchNodes: the fleet as it is, a bookmark, and then each node after it changed. The feed says which nodes changed;
// what is sent is the node as it is when it is read, so changes that follow each other fast may come as one, never
// out of order, and the last one always comes.
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { NodeBookmarkSchema, type WatchNodesResponseSchema } from "@clodei/proto/gen/clodei/v1/node_service";
import { type NodeId, parseId } from "@clodei/proto/ids";
import { readChanges } from "../platform/changes.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import type { FleetNode } from "./model.ts";
import { snapshotFleet } from "./operations.ts";
import { readNodes } from "./store.ts";
import { type Allocation, nodeToWire } from "./wire.ts";

/** What is allocated on nodes. Injected: placement is a later slice. */
export type ReadAllocations = (tx: SystemTx, nodeIds: readonly NodeId[]) => Promise<ReadonlyMap<NodeId, Allocation>>;

/** What a watch works with. */
export type WatchOptions = {
  readonly database: Database;
  readonly wakeups: Pick<Wakeups, "wait">;
  readonly allocations: ReadAllocations;
  /** How often the feed is read where no hint comes. */
  readonly pollIntervalMs: number;
};

type WatchMessage = MessageInitShape<typeof WatchNodesResponseSchema>;

const maxBatch = 500;
/** A quiet watch gets a bookmark now and then, so that its cursor does not grow too old. */
const bookmarkIntervalMs = 60_000;

/** Watches the fleet from a cursor, or from a snapshot where it is empty, until the signal aborts. */
export async function* watchNodes(
  options: WatchOptions,
  from: string,
  signal: AbortSignal,
): AsyncGenerator<WatchMessage, void, undefined> {
  /** The newest version that was sent of each node: one for each node of the fleet, so it is bounded by it. */
  const sent = new Map<NodeId, bigint>();
  let cursor = from;
  if (cursor === "") {
    const snapshot = await readSnapshot(options);
    for (const { node, allocation } of snapshot.nodes) {
      sent.set(node.nodeId, node.version);
      yield { event: { case: "snapshot", value: nodeToWire(node, allocation) }, cursor: "" };
    }
    cursor = snapshot.cursor;
    yield bookmark(cursor);
  }
  let lastMessageMs = performance.now();
  while (!signal.aborted) {
    const batch = await readBatch(options, cursor);
    cursor = batch.cursor;
    for (const { node, allocation, cursor: after } of batch.nodes) {
      if (node.version <= (sent.get(node.nodeId) ?? 0n)) continue;
      sent.set(node.nodeId, node.version);
      lastMessageMs = performance.now();
      yield { event: { case: "change", value: nodeToWire(node, allocation) }, cursor: after };
    }
    if (batch.more) continue;
    if (performance.now() - lastMessageMs > bookmarkIntervalMs) {
      lastMessageMs = performance.now();
      yield bookmark(cursor);
    }
    await options.wakeups.wait(["nodes"], options.pollIntervalMs, signal);
  }
}

function bookmark(cursor: string): WatchMessage {
  return { event: { case: "bookmark", value: create(NodeBookmarkSchema) }, cursor };
}

type Seen = { readonly node: FleetNode; readonly allocation: Allocation | undefined };

/** All at once: a transaction must not wait for whoever reads the stream. */
function readSnapshot(options: WatchOptions): Promise<{ nodes: Seen[]; cursor: string }> {
  return options.database.system(
    async (tx) => {
      const { nodes, cursor } = await snapshotFleet(tx);
      const allocations = await options.allocations(
        tx,
        nodes.map(({ nodeId }) => nodeId),
      );
      return { cursor, nodes: nodes.map((node) => ({ node, allocation: allocations.get(node.nodeId) })) };
    },
    { isolation: "repeatable read" },
  );
}

/** The nodes that changed after a cursor, each once, in the order of their last change. */
function readBatch(
  options: WatchOptions,
  from: string,
): Promise<{ nodes: (Seen & { cursor: string })[]; cursor: string; more: boolean }> {
  return options.database.system(async (tx) => {
    const batch = await readChanges(tx, "node", from, maxBatch);
    // Set anew, a key moves to the end: everything up to a node's last change was sent before it or with it.
    const cursors = new Map<NodeId, string>();
    for (const change of batch.changes) {
      const nodeId = parseId("nod", change.subjectId);
      if (nodeId === undefined) continue;
      cursors.delete(nodeId);
      cursors.set(nodeId, change.cursor);
    }
    const nodeIds = [...cursors.keys()];
    if (nodeIds.length === 0) return { nodes: [], cursor: batch.cursor, more: batch.more };
    const allocations = await options.allocations(tx, nodeIds);
    const nodes = new Map((await readNodes(tx, nodeIds)).map((node) => [node.nodeId, node]));
    return {
      cursor: batch.cursor,
      more: batch.more,
      nodes: [...cursors].flatMap(([nodeId, cursor]) => {
        const node = nodes.get(nodeId);
        return node === undefined ? [] : [{ node, allocation: allocations.get(nodeId), cursor }];
      }),
    };
  });
}
