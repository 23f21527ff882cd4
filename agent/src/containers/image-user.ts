// The user that an image's process runs as, which the workspace must belong to: root without capabilities cannot enter
// another user's folder.
import { EngineError } from "./engine-error.ts";

/** Numbers as the kernel knows them. */
export interface ImageUser {
  readonly uid: number;
  readonly gid: number;
  /** Groups that its processes may be in; undefined where the image's account files cannot be read. */
  readonly groups: AllowedGroups | undefined;
}

/** Groups that the engine may give a process. */
export interface AllowedGroups {
  /** Its own, one of them. */
  readonly primary: readonly number[];
  /** Any of them beside. Engines from 20.10.18 on name its own group here too. */
  readonly supplementary: readonly number[];
}

/** The image's account files as they stand in the container; undefined where there is no plain file to read. */
export interface AccountFiles {
  readonly passwd: string | undefined;
  readonly group: string | undefined;
}

/** The two highest values mean "unchanged" to the kernel. */
const maxId = 2 ** 32 - 3;
const numberPattern = /^(?:0|[1-9][0-9]{0,9})$/;

/**
 * Resolves an image's USER. A number counts as it stands; only a name is looked up. An image can still map a number to
 * another user, which runc believes: the read-back after the start compares what came of it.
 *
 * The groups are those that runc could find: of whatever account is meant, where the files name several.
 *
 * @param user USER of the image: "", "1000", "1000:1000", "name", "name:group".
 */
export function resolveImageUser(user: string, files: AccountFiles): ImageUser {
  const [name = "", group] = user.split(":");
  const isRoot = name === "" || name === "root";
  const entries = rowsOf(files.passwd).filter(([, , uid = ""]) => isId(uid));
  const accounts = entries.map(([account, , uid, gid]) => ({ account, uid: Number(uid), gid: idOf(gid) }));
  const named = accounts.filter(({ account }) => account === name);
  const uid = isRoot ? 0 : isId(name) ? Number(name) : named[0]?.uid;
  if (uid === undefined) {
    const lack =
      files.passwd === undefined
        ? "a name, and its /etc/passwd is no plain file of at most 1 MiB"
        : "which its /etc/passwd does not name";
    throw new EngineError("start_failed", `the image runs as ${JSON.stringify(user)}, ${lack}`);
  }
  const meant = isRoot || isId(name) ? accounts.filter((other) => other.uid === uid || other.account === name) : named;
  const groups = rowsOf(files.group).map(([title, , gid, members = ""]) => ({
    title,
    gid: idOf(gid),
    members: members.split(","),
  }));
  const known = files.passwd !== undefined && files.group !== undefined;
  if (group !== undefined) {
    const gids = isId(group) ? [Number(group)] : groups.filter(({ title }) => title === group).map(({ gid }) => gid);
    return { uid, gid: gids[0] ?? 0, groups: known ? { primary: gids, supplementary: gids } : undefined };
  }
  const primary = meant.length > 0 ? meant.map(({ gid }) => gid) : [0];
  const joined = groups.filter(({ members }) => meant.some(({ account = "" }) => members.includes(account)));
  const supplementary = [...primary, ...joined.map(({ gid }) => gid)];
  return { uid, gid: primary[0] ?? 0, groups: known ? { primary, supplementary } : undefined };
}

function rowsOf(text: string | undefined): string[][] {
  return (text ?? "").split("\n").map((line) => line.trim().split(":"));
}

/** As runc reads it: what is no number is 0. */
function idOf(text: string | undefined): number {
  return text !== undefined && isId(text) ? Number(text) : 0;
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
