// Follows the files into which the engine writes a container's output, across their rotation and from any place.
//
// The engine keeps two files: container.log, and container.log.1 until the next rotation. Whoever is slower than a
// flood would lose what is rotated away; so each new file is opened as soon as it is seen, and stays readable.
import { constants } from "node:fs";
import { type FileHandle, open, stat } from "node:fs/promises";
import { join } from "node:path";
import { decodeRecords, type OutputEntry } from "./engine-records.ts";

/**
 * A place in the engine's files. A file is known by its first bytes, which hold the first record's time to the
 * nanosecond: its name changes with each rotation, and its inode is given to another file once it is gone.
 */
export interface OutputPosition {
  readonly file: Buffer;
  readonly offset: number;
}

/** What was read. */
export interface OutputBatch {
  readonly entries: readonly OutputEntry[];
  /** The place after the entries. */
  readonly position: OutputPosition;
  /** Output is missing before the entries: the engine dropped or lost it before it could be read. */
  readonly lostBefore: boolean;
  /** There may be more at once. */
  readonly full: boolean;
}

/** How many of a file's first bytes name it. Every record has more: 4 of length, 8 of source, 10 of time. */
export const fileNameBytes = 22;
const currentName = "container.log";
const olderName = "container.log.1";
/** Some hundred lines: with thousands at once, most of them outlive the nursery, and the collector costs more than they. */
const readBytes = 128 * 1024;
/** Files that wait to be read. Each keeps 32 MiB on the disk; what comes when there are so many is lost. */
const maxWaitingFiles = 8;

/** A file that comes after the one that is being read. */
interface WaitingFile {
  readonly file: FileHandle;
  readonly inode: number;
  readonly lostBefore: boolean;
}

/** Reads a container's output in order. For one caller at a time. */
export class EngineOutput implements AsyncDisposable {
  readonly #folder: string;
  readonly #resumeAt: OutputPosition | undefined;
  #file: FileHandle | undefined;
  #fileName: Buffer | undefined;
  #inode = 0;
  readonly #waiting: WaitingFile[] = [];
  /** Where in the file the next read begins. */
  #readOffset = 0;
  /** Bytes before `#readOffset` that make no whole record yet. */
  #rest: Buffer = Buffer.alloc(0);
  #lost = false;
  #full = false;

  /** @param resumeAt The place of an earlier reader; undefined begins with the oldest output there is. */
  constructor(folder: string, resumeAt: OutputPosition | undefined) {
    this.#folder = folder;
    this.#resumeAt = resumeAt;
  }

  /**
   * What has come since. Undefined when there is nothing more now.
   *
   * @param final The container has ended: a torn record at the end will not be completed.
   */
  async read(final: boolean): Promise<OutputBatch | undefined> {
    for (;;) {
      const file = this.#file ?? (await this.#openFirst());
      if (file === undefined) return undefined;
      // Before the read: the engine writes to a file until its rotation, so that only then its end is the end.
      await this.#noteRotation();
      if (await this.#fill(file)) {
        const batch = this.#decode(false);
        if (batch !== undefined) return batch;
        continue;
      }
      const next = this.#waiting[0];
      const batch = next !== undefined || final ? this.#decode(true) : undefined;
      const moved = next !== undefined && (await this.#moveTo(next));
      if (batch !== undefined || !moved) return batch;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const { file } of this.#waiting.splice(0)) await file.close();
    await this.#file?.close();
    this.#file = undefined;
  }

  async #fill(file: FileHandle): Promise<boolean> {
    const buffer = Buffer.allocUnsafe(this.#rest.length + readBytes);
    this.#rest.copy(buffer);
    const { bytesRead } = await file.read(buffer, this.#rest.length, readBytes, this.#readOffset);
    if (bytesRead === 0) return false;
    this.#readOffset += bytesRead;
    this.#full = bytesRead === readBytes;
    this.#rest = buffer.subarray(0, this.#rest.length + bytesRead);
    return true;
  }

  #decode(final: boolean): OutputBatch | undefined {
    const { entries, consumedBytes, damagedBytes } = decodeRecords(this.#rest, final);
    this.#rest = this.#rest.subarray(consumedBytes);
    if (damagedBytes > 0) this.#lost = true;
    if (entries.length === 0 || this.#fileName === undefined) return undefined;
    const lostBefore = this.#lost;
    this.#lost = false;
    const position = { file: this.#fileName, offset: this.#readOffset - this.#rest.length };
    return { entries, position, lostBefore, full: this.#full };
  }

  async #openFirst(): Promise<FileHandle | undefined> {
    if (this.#resumeAt !== undefined) {
      let isThere = false;
      for (const name of [olderName, currentName]) {
        const file = await this.#open(name);
        if (file === undefined) continue;
        isThere = true;
        const fileName = await nameOf(file);
        if (fileName?.equals(this.#resumeAt.file) === true) return this.#use(file, fileName, this.#resumeAt.offset);
        await file.close();
      }
      // No file is there at all when the container is being removed.
      if (!isThere) return undefined;
      this.#lost = true;
    }
    for (const name of [olderName, currentName]) {
      const file = await this.#open(name);
      const fileName = file === undefined ? undefined : await nameOf(file);
      // One that holds no record yet is looked at again later, when its name is known.
      if (file !== undefined && fileName !== undefined) return this.#use(file, fileName, 0);
      await file?.close();
    }
    return undefined;
  }

  /** Opens the file that the engine writes to now, unless it is known. */
  async #noteRotation(): Promise<void> {
    const lastInode = this.#waiting.at(-1)?.inode ?? this.#inode;
    if ((await this.#inodeOf(currentName)) === lastInode || this.#waiting.length === maxWaitingFiles) return;
    const file = await this.#open(currentName);
    if (file === undefined) return;
    const inode = (await file.stat()).ino;
    if (inode === lastInode) return file.close();
    // Nothing came between when the one before is the last that was known.
    const lostBefore = (await this.#inodeOf(olderName)) !== lastInode;
    this.#waiting.push({ file, inode, lostBefore });
  }

  /** Goes on with the next file; false while it holds nothing. */
  async #moveTo(next: WaitingFile): Promise<boolean> {
    const fileName = await nameOf(next.file);
    if (fileName === undefined) return false;
    await this.#file?.close();
    this.#waiting.shift();
    this.#lost ||= next.lostBefore;
    await this.#use(next.file, fileName, 0);
    return true;
  }

  async #use(file: FileHandle, fileName: Buffer, offset: number): Promise<FileHandle> {
    this.#file = file;
    this.#fileName = fileName;
    this.#inode = (await file.stat()).ino;
    this.#readOffset = offset;
    this.#rest = Buffer.alloc(0);
    return file;
  }

  async #inodeOf(name: string): Promise<number | undefined> {
    return stat(join(this.#folder, name)).then(
      ({ ino }) => ino,
      () => undefined,
    );
  }

  async #open(name: string): Promise<FileHandle | undefined> {
    return open(join(this.#folder, name), constants.O_RDONLY | constants.O_NOFOLLOW).catch(() => undefined);
  }
}

async function nameOf(file: FileHandle): Promise<Buffer | undefined> {
  const name = Buffer.alloc(fileNameBytes);
  const { bytesRead } = await file.read(name, 0, fileNameBytes, 0);
  return bytesRead === fileNameBytes ? name : undefined;
}
