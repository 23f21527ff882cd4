// An attempt's output on the node's disk: a row of segments, each a row of blocks. Only ever appended to; the oldest
// segments are dropped when there is too much.
import { constants } from "node:fs";
import { type FileHandle, mkdir, open, readdir, readFile, rm, stat, truncate } from "node:fs/promises";
import { join } from "node:path";
import {
  blockHeaderBytes,
  decodeEntries,
  decodeHeader,
  encodeBlock,
  offsetsAfter,
  type StreamOffsets,
} from "./block.ts";
import type { OutputPosition } from "./engine-output.ts";
import type { OutputEntry } from "./engine-records.ts";

/** A sixteenth of what is kept: so little more than needed is dropped at once. */
const segmentsPerSpool = 16;
const segmentPattern = /^\d{12}\.log$/;

/** A piece of the spool. */
export interface Segment {
  readonly number: number;
  /** Bytes that are written as whole blocks. Grows in the last one. */
  bytes: number;
}

/** What is known of a spool from its last block. */
interface Tail {
  readonly offsets: StreamOffsets;
  readonly position: OutputPosition | undefined;
  readonly ended: boolean;
}

const emptyTail: Tail = { offsets: { stdout: 0, stderr: 0 }, position: undefined, ended: false };

/** One attempt's spool. One object for each in a process; one writer, any number of readers. */
export class Spool {
  readonly folder: string;
  readonly #segments: Segment[];
  readonly #maxBytes: number;
  #tail: Tail;
  #file: FileHandle | undefined;
  #waiting = Promise.withResolvers<void>();
  #removed = false;

  private constructor(folder: string, maxBytes: number, segments: Segment[], tail: Tail) {
    this.folder = folder;
    this.#maxBytes = maxBytes;
    this.#segments = segments;
    this.#tail = tail;
  }

  /** Opens a spool, or makes an empty one. A torn end, left by a process that was killed, is cut off. */
  static async open(folder: string, maxBytes: number): Promise<Spool> {
    await mkdir(folder, { recursive: true, mode: 0o700 });
    const names = (await readdir(folder)).filter((name) => segmentPattern.test(name)).toSorted();
    const segments: Segment[] = [];
    for (const name of names)
      segments.push({ number: Number.parseInt(name, 10), bytes: (await stat(join(folder, name))).size });
    let tail: Tail | undefined;
    while (tail === undefined) {
      const last = segments.at(-1);
      if (last === undefined) return new Spool(folder, maxBytes, segments, emptyTail);
      tail = await repair(folder, last);
      if (tail === undefined) segments.pop();
    }
    return new Spool(folder, maxBytes, segments, tail);
  }

  /** The segments that are there, the oldest first. */
  get segments(): readonly Segment[] {
    return this.#segments;
  }

  /** Bytes of each stream that were ever written. */
  get offsets(): StreamOffsets {
    return this.#tail.offsets;
  }

  /** Where the engine's files are to be read on. */
  get position(): OutputPosition | undefined {
    return this.#tail.position;
  }

  /** Whether the attempt ended and its last output is here. */
  get ended(): boolean {
    return this.#tail.ended;
  }

  /** Whether it was removed: readers have nothing to wait for. */
  get removed(): boolean {
    return this.#removed;
  }

  segmentPath(segment: Segment): string {
    return join(this.folder, segmentName(segment.number));
  }

  /** Writes output, with the place in the engine's files after it. */
  async append(entries: readonly OutputEntry[], position: OutputPosition, lostBefore: boolean): Promise<void> {
    await this.#write(entries, { position, lostBefore, end: false });
  }

  /** Notes that the attempt ended and nothing will follow. */
  async end(): Promise<void> {
    if (!this.#tail.ended) await this.#write([], { position: this.#tail.position, lostBefore: false, end: true });
  }

  /** Resolves at the next change. */
  changed(): Promise<void> {
    return this.#waiting.promise;
  }

  /** Closes the file; the next append opens it again. */
  async close(): Promise<void> {
    const file = this.#file;
    this.#file = undefined;
    await file?.close();
  }

  /** Removes everything, and lets readers go. */
  async remove(): Promise<void> {
    this.#removed = true;
    await this.close();
    await rm(this.folder, { recursive: true, force: true });
    this.#notify();
  }

  async #write(
    entries: readonly OutputEntry[],
    what: { readonly position: OutputPosition | undefined; readonly lostBefore: boolean; readonly end: boolean },
  ): Promise<void> {
    if (this.#removed) throw new Error("the logs were removed");
    const block = encodeBlock(entries, { ...what, before: this.#tail.offsets });
    const segment = await this.#segmentFor(block.length);
    this.#file ??= await open(
      this.segmentPath(segment),
      constants.O_WRONLY | constants.O_CREAT | constants.O_NOFOLLOW,
      0o600,
    );
    // At a place of its own, so that a write that failed in the middle (a full disk) is written over by the next.
    await this.#file.write(block, 0, block.length, segment.bytes);
    segment.bytes += block.length;
    this.#tail = { offsets: offsetsAfter(this.#tail.offsets, entries), position: what.position, ended: what.end };
    await this.#dropOldest();
    this.#notify();
  }

  async #segmentFor(bytes: number): Promise<Segment> {
    const last = this.#segments.at(-1);
    if (last !== undefined && last.bytes + bytes <= this.#maxBytes / segmentsPerSpool) return last;
    if (last !== undefined && last.bytes === 0) return last;
    await this.close();
    const segment = { number: (last?.number ?? 0) + 1, bytes: 0 };
    this.#segments.push(segment);
    return segment;
  }

  async #dropOldest(): Promise<void> {
    let total = this.#segments.reduce((sum, segment) => sum + segment.bytes, 0);
    while (total > this.#maxBytes && this.#segments.length > 1) {
      const oldest = this.#segments.shift();
      if (oldest === undefined) return;
      total -= oldest.bytes;
      await rm(this.segmentPath(oldest), { force: true });
    }
  }

  #notify(): void {
    const { resolve } = this.#waiting;
    this.#waiting = Promise.withResolvers<void>();
    resolve();
  }
}

function segmentName(number: number): string {
  return `${String(number).padStart(12, "0")}.log`;
}

/** Cuts a segment after its last whole block. Removes it, and returns undefined, when there is none. */
async function repair(folder: string, segment: Segment): Promise<Tail | undefined> {
  const path = join(folder, segmentName(segment.number));
  const buffer = await readFile(path);
  let tail: Tail | undefined;
  let offset = 0;
  for (;;) {
    const header = decodeHeader(buffer, offset);
    const entries = header === undefined ? undefined : decodeEntries(buffer, offset, header);
    if (header === undefined || entries === undefined) break;
    tail = { offsets: offsetsAfter(header.before, entries), position: header.position, ended: header.end };
    offset += blockHeaderBytes + header.payloadBytes;
  }
  if (tail === undefined) {
    await rm(path, { force: true });
    return undefined;
  }
  if (offset < buffer.length) await truncate(path, offset);
  segment.bytes = offset;
  return tail;
}
