// A state folder is one node's for ever. Another node that worked in it would take the first one's workspaces for
// leftovers and remove them, and its containers, which carry the first one's name, would run on without anybody.

import { access, readdir } from "node:fs/promises";
import { type NodeId, parseId } from "@clodei/proto/ids";
import { IdentityStore } from "./identity/identity-store.ts";
import { StateFolderError } from "./identity/state-folder.ts";
import type { StatePaths } from "./identity/state-folder.ts";
import { Journal } from "./journal/journal.ts";

/**
 * The node whose folder this is; undefined where it is nobody's yet. Throws StateFolderError where it holds what
 * belongs to customers, and nothing tells of which node.
 */
export async function ownerOf(paths: StatePaths): Promise<NodeId | undefined> {
  // The journal first: it is the one that tells of workspaces and containers.
  const owner = (await journalOwner(paths)) ?? (await new IdentityStore(paths.identity).nodeId());
  if (owner !== undefined) return owner;
  for (const folder of [paths.workspaces, paths.logs]) {
    if ((await readdir(folder)).some((name) => parseId("ins", name) !== undefined)) {
      throw new StateFolderError(
        `${folder} holds data of instances, and nothing in ${paths.folder} tells of which node: ` +
          "use an empty --state folder, or move that data away first",
      );
    }
  }
  return undefined;
}

/** Opens the journal of the folder as this node's. Throws StateFolderError where it is another's. */
export function openJournal(paths: StatePaths, nodeId: NodeId): Journal {
  const journal = Journal.open(paths.journal);
  try {
    const owner = journal.nodeId();
    if (owner === undefined) journal.saveNodeId(nodeId);
    else if (owner !== nodeId) throw new StateFolderError(foreignFolder(paths.folder, owner, nodeId));
    return journal;
  } catch (error) {
    journal[Symbol.dispose]();
    throw error;
  }
}

/** Why a node must not use the folder, and what to do. */
export function foreignFolder(folder: string, owner: string, nodeId: string): string {
  return (
    `${folder} is the state folder of node ${owner}, and ${nodeId} must not use it: it would remove the workspaces ` +
    `of ${owner} and leave its containers running without anybody. Use an empty --state folder for ${nodeId}. ` +
    `To end ${owner}, revoke it and run the agent with its identity until its containers are gone; ` +
    `where that identity is lost, enroll here with a token of ReenrollNode for ${owner}`
  );
}

async function journalOwner(paths: StatePaths): Promise<NodeId | undefined> {
  const exists = await access(paths.journal).then(
    () => true,
    () => false,
  );
  if (!exists) return undefined;
  using journal = Journal.open(paths.journal);
  return parseId("nod", journal.nodeId() ?? "");
}
