// The one folder of the host that a container sees. It stands below a folder that only the agent may enter, so that
// what a customer does with its mode gives nobody on the node a way in.
import { constants } from "node:fs";
import { lstat, mkdir, open, rm } from "node:fs/promises";
import { join } from "node:path";
import type { InstanceId } from "@clodei/proto/ids";
import type { ImageUser } from "./image-user.ts";

const workspaceMode = 0o750;
const parentMode = 0o700;

/** The workspaces of a node's instances. */
export class Workspaces {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  path(instanceId: InstanceId): string {
    // A branded id holds letters, digits and "_" only; nobody gets out of the folder with one.
    return join(this.#folder, instanceId);
  }

  /** Makes the instance's folder where it is missing. What is in it stays. */
  async ensure(instanceId: InstanceId): Promise<string> {
    await mkdir(this.#folder, { recursive: true, mode: parentMode });
    const path = this.path(instanceId);
    await mkdir(path, { mode: workspaceMode }).catch((error: unknown) => {
      if (!(error instanceof Error && "code" in error && error.code === "EEXIST")) throw error;
    });
    return path;
  }

  /** Gives the folder itself to the user that the container runs as. */
  async own(instanceId: InstanceId, user: ImageUser): Promise<void> {
    // By a descriptor that follows no link: what is changed is what was looked at.
    const flags = constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW;
    const folder = await open(this.path(instanceId), flags);
    try {
      await folder.chown(user.uid, user.gid);
      await folder.chmod(workspaceMode);
    } finally {
      await folder.close();
    }
  }

  /**
   * The user that the folder was given to; undefined where there is none. A container without capabilities cannot give
   * its workspace away, so this is still the user that its processes must have.
   */
  async ownerUid(instanceId: InstanceId): Promise<number | undefined> {
    try {
      return (await lstat(this.path(instanceId))).uid;
    } catch {
      return undefined;
    }
  }

  /** Removes the folder and all that is in it. Only once no container of the instance is left. */
  async remove(instanceId: InstanceId): Promise<void> {
    await rm(this.path(instanceId), { recursive: true, force: true, maxRetries: 3 });
  }
}
