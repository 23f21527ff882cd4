// The user that an image's process runs as, which the workspace must belong to: root without capabilities cannot enter
// another user's folder.
import { EngineError } from "./engine-error.ts";

/** Numbers as the kernel knows them. */
export interface ImageUser {
  readonly uid: number;
  readonly gid: number;
}

/** The two highest values mean "unchanged" to the kernel. */
const maxId = 2 ** 32 - 3;
const numberPattern = /^(?:0|[1-9][0-9]{0,9})$/;

/**
 * Resolves an image's USER. A number counts as it stands; only for a name is the image's /etc/passwd read. An image can
 * still map a number to another user, which runc believes: the read-back after the start compares what came of it.
 *
 * @param user USER of the image: "", "1000", "1000:1000", "name", "name:group".
 * @param readPasswd Reads /etc/passwd as it stands in the container.
 */
export async function resolveImageUser(user: string, readPasswd: () => Promise<string>): Promise<ImageUser> {
  const [name = "", group] = user.split(":");
  const gid = group !== undefined && isId(group) ? Number(group) : 0;
  if (name === "" || name === "root") return { uid: 0, gid };
  if (isId(name)) return { uid: Number(name), gid };
  for (const line of (await readPasswd()).split("\n")) {
    const [account, , uid = "", primaryGroup = ""] = line.split(":");
    if (account !== name || !isId(uid)) continue;
    return { uid: Number(uid), gid: group === undefined && isId(primaryGroup) ? Number(primaryGroup) : gid };
  }
  throw new EngineError(
    "start_failed",
    `the image runs as ${JSON.stringify(user)}, which its /etc/passwd does not name`,
  );
}

function isId(text: string): boolean {
  return numberPattern.test(text) && Number(text) <= maxId;
}

/** The first file of a tar archive as text; undefined where the archive holds something else, such as a link. */
export function firstFileOfTar(archive: Buffer): string | undefined {
  const blockBytes = 512;
  if (archive.length < blockBytes) return undefined;
  const type = archive.toString("latin1", 156, 157);
  const size = Number.parseInt(archive.toString("latin1", 124, 136), 8);
  if ((type !== "0" && type !== "\0") || !Number.isSafeInteger(size) || blockBytes + size > archive.length)
    return undefined;
  return archive.toString("utf8", blockBytes, blockBytes + size);
}
