// The users of the images that containers are made of, looked up once for each image: an image never changes, and a
// container that has not run yet holds the image's own account files.
import { EngineError } from "./engine-error.ts";
import { type AccountFiles, firstFileOfTar, type ImageUser, resolveImageUser } from "./image-user.ts";
import type { NodeContainers } from "./node-containers.ts";

/** So many are remembered. */
const maxImages = 1024;

/** The users of images. */
export class ImageUsers {
  readonly #containers: NodeContainers;
  readonly #users = new Map<string, ImageUser>();

  constructor(containers: NodeContainers) {
    this.#containers = containers;
  }

  /** The user, where it was looked up before. */
  known(imageId: string, user: string): ImageUser | undefined {
    return this.#users.get(keyOf(imageId, user));
  }

  /**
   * The user that an image's process runs as. Throws EngineError start_failed where it has none.
   *
   * @param containerId A container of the image that has not run.
   */
  async of(imageId: string, user: string, containerId: string, signal: AbortSignal): Promise<ImageUser> {
    const known = this.known(imageId, user);
    if (known !== undefined) return known;
    const [passwd, group] = await Promise.all([
      this.#read(containerId, "/etc/passwd", signal),
      this.#read(containerId, "/etc/group", signal),
    ]);
    const found = resolveImageUser(user, { passwd, group });
    const [oldest] = this.#users.keys();
    if (oldest !== undefined && this.#users.size >= maxImages) this.#users.delete(oldest);
    this.#users.set(keyOf(imageId, user), found);
    return found;
  }

  /** A file's text, empty where there is none. Undefined for what is no plain file, or too large to be an account file. */
  async #read(containerId: string, path: string, signal: AbortSignal): Promise<AccountFiles["passwd"]> {
    try {
      const archive = await this.#containers.archive(containerId, path, signal);
      return archive === undefined ? "" : firstFileOfTar(archive);
    } catch (error) {
      if (error instanceof EngineError && error.kind === "start_failed") return undefined;
      throw error;
    }
  }
}

function keyOf(imageId: string, user: string): string {
  return `${imageId} ${user}`;
}
