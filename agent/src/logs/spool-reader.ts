// Reads a spool: from the start or a place, by time, or the last lines; then, if asked, what comes. Holds one piece of
// a segment at a time, so a slow reader costs the same memory as a fast one.
import { type FileHandle, open, readFile } from "node:fs/promises";
import { create } from "@bufbuild/protobuf";
import { type Timestamp, TimestampSchema } from "@bufbuild/protobuf/wkt";
import {
  type LogChunk,
  LogChunkSchema,
  type LogGap,
  LogGapSchema,
  type LogPosition,
  LogStream,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { maxLogChunkBytes } from "@clodei/proto/node-link";
import { blockHeaderBytes, type BlockHeader, decodeEntries, decodeHeader } from "./block.ts";
import type { OutputEntry, OutputStream } from "./engine-records.ts";
import type { Segment, Spool } from "./spool.ts";

/** Which part of the output is wanted. */
export interface LogRequest {
  /** Stay, and give what comes, until the attempt ends. */
  readonly follow: boolean;
  /** Only the last so many lines of what is there, both streams together. */
  readonly tailLines?: number | undefined;
  /** Only what the engine read at or after this time. */
  readonly sinceTime?: Timestamp | undefined;
  /** Go on after these places; takes the place of the two before. A stream without one begins at its start. */
  readonly positions?: readonly LogPosition[] | undefined;
}

/** What a reader is given. `end` comes last, and only when the attempt ended and everything was given. */
export type LogEvent =
  | { readonly kind: "chunk"; readonly chunk: LogChunk }
  | { readonly kind: "gap"; readonly gap: LogGap }
  | { readonly kind: "end" };

/** Lines of one stream that came within this time share a chunk: many small messages cost more than they tell. */
const chunkSpanNs = 10_000_000n;
const readBytes = 256 * 1024;
const streams: readonly OutputStream[] = [LogStream.STDOUT, LogStream.STDERR];

/** A block where it stands. */
interface PlacedBlock {
  readonly header: BlockHeader;
  readonly entries: readonly OutputEntry[];
}

/** Where giving begins. */
interface Start {
  readonly segment: number;
  /** Bytes of each stream that are not given, because the reader has them or did not ask; undefined: as they come. */
  readonly offsets: Map<OutputStream, number | undefined>;
  readonly sinceNs: bigint;
}

/** Gives what was asked for. */
export async function* readSpool(
  spool: Spool,
  attempt: number,
  request: LogRequest,
  signal: AbortSignal,
): AsyncGenerator<LogEvent> {
  const start = await startOf(spool, request);
  const giver = new Giver(attempt, start);
  for await (const block of blocksOf(spool, start.segment, request.follow, signal)) {
    for (const event of giver.take(block)) yield event;
    if (block.header.end) {
      yield { kind: "end" };
      return;
    }
  }
}

/** Turns blocks into chunks and gaps. */
class Giver {
  readonly #attempt: number;
  readonly #sinceNs: bigint;
  /** The next byte of each stream to be given. */
  readonly #expected: Map<OutputStream, number | undefined>;

  constructor(attempt: number, start: Start) {
    this.#attempt = attempt;
    this.#sinceNs = start.sinceNs;
    this.#expected = start.offsets;
  }

  *take(block: PlacedBlock): Generator<LogEvent> {
    const offsets = new Map<OutputStream, number>([
      [LogStream.STDOUT, block.header.before.stdout],
      [LogStream.STDERR, block.header.before.stderr],
    ]);
    for (const stream of streams) yield* this.#gap(stream, offsets.get(stream) ?? 0, block.header.lostBefore);
    let pending: PendingChunk | undefined;
    for (const entry of block.entries) {
      const offset = offsets.get(entry.stream) ?? 0;
      offsets.set(entry.stream, offset + entry.data.length);
      const data = this.#wanted(entry, offset);
      if (data.length === 0) continue;
      if (pending !== undefined && !pending.takes(entry, data)) {
        yield pending.event(this.#attempt);
        pending = undefined;
      }
      if (pending === undefined) pending = new PendingChunk(entry, offset + entry.data.length - data.length, data);
      else pending.add(data);
    }
    if (pending !== undefined) yield pending.event(this.#attempt);
  }

  /** The part of an entry that is to be given. */
  #wanted(entry: OutputEntry, offset: number): Buffer {
    const expected = this.#expected.get(entry.stream) ?? offset;
    this.#expected.set(entry.stream, Math.max(expected, offset + entry.data.length));
    if (entry.timeNs < this.#sinceNs) return Buffer.alloc(0);
    return entry.data.subarray(Math.max(0, expected - offset));
  }

  *#gap(stream: OutputStream, offset: number, lostBefore: boolean): Generator<LogEvent> {
    const expected = this.#expected.get(stream);
    const missing = expected === undefined ? 0 : Math.max(0, offset - expected);
    if (missing > 0) this.#expected.set(stream, offset);
    // What the engine lost has no known length: it is named once, with 0, and the positions go on without it.
    if (missing === 0 && !(lostBefore && stream === LogStream.STDOUT)) return;
    const gap = create(LogGapSchema, {
      attempt: this.#attempt,
      stream,
      offset: BigInt(offset - missing),
      lengthBytes: BigInt(missing),
    });
    yield { kind: "gap", gap };
  }
}

/** A chunk that more lines may join. */
class PendingChunk {
  readonly #entry: OutputEntry;
  readonly #offset: number;
  readonly #parts: Buffer[];
  #bytes: number;

  constructor(entry: OutputEntry, offset: number, data: Buffer) {
    this.#entry = entry;
    this.#offset = offset;
    this.#parts = [data];
    this.#bytes = data.length;
  }

  takes(entry: OutputEntry, data: Buffer): boolean {
    const span = entry.timeNs - this.#entry.timeNs;
    const near = span >= 0n && span <= chunkSpanNs;
    return entry.stream === this.#entry.stream && near && this.#bytes + data.length <= maxLogChunkBytes;
  }

  add(data: Buffer): void {
    this.#parts.push(data);
    this.#bytes += data.length;
  }

  event(attempt: number): LogEvent {
    const chunk = create(LogChunkSchema, {
      attempt,
      stream: this.#entry.stream,
      offset: BigInt(this.#offset),
      time: timestampOf(this.#entry.timeNs),
      data: Buffer.concat(this.#parts),
    });
    return { kind: "chunk", chunk };
  }
}

async function startOf(spool: Spool, request: LogRequest): Promise<Start> {
  const first = spool.segments[0]?.number ?? 1;
  const from = (offset: number | undefined): Map<OutputStream, number | undefined> =>
    new Map(streams.map((stream) => [stream, offset]));
  if (request.positions !== undefined && request.positions.length > 0) {
    const offsets = from(0);
    for (const position of request.positions) {
      if (position.stream === LogStream.STDOUT || position.stream === LogStream.STDERR) {
        offsets.set(position.stream, Number(position.offset));
      }
    }
    return { segment: await segmentBefore(spool, offsets), offsets, sinceNs: 0n };
  }
  const sinceNs = request.sinceTime === undefined ? 0n : nanosecondsOf(request.sinceTime);
  if (request.tailLines !== undefined) {
    const tail = await tailStart(spool, request.tailLines, sinceNs);
    if (tail !== undefined) return tail;
  }
  // Whoever asks by time misses nothing when what was dropped is older than that.
  const oldest = (await firstHeader(spool, spool.segments[0]))?.timeNs ?? 0n;
  return { segment: first, offsets: from(oldest < sinceNs ? undefined : 0), sinceNs };
}

/** The last segment that begins at or before all of the places. */
async function segmentBefore(spool: Spool, offsets: ReadonlyMap<OutputStream, number | undefined>): Promise<number> {
  for (const segment of spool.segments.toReversed()) {
    const before = (await firstHeader(spool, segment))?.before;
    if (before === undefined) continue;
    const [stdout = 0, stderr = 0] = streams.map((stream) => offsets.get(stream));
    if (before.stdout <= stdout && before.stderr <= stderr) return segment.number;
  }
  return spool.segments[0]?.number ?? 1;
}

async function firstHeader(spool: Spool, segment: Segment | undefined): Promise<BlockHeader | undefined> {
  if (segment === undefined || segment.bytes === 0) return undefined;
  const file = await open(spool.segmentPath(segment)).catch(() => undefined);
  if (file === undefined) return undefined;
  try {
    const buffer = Buffer.alloc(blockHeaderBytes);
    const { bytesRead } = await file.read(buffer, 0, blockHeaderBytes, 0);
    return decodeHeader(buffer.subarray(0, bytesRead), 0);
  } finally {
    await file.close();
  }
}

/** Looks for the line with that number, counted from the end; undefined when there are not so many. */
async function tailStart(spool: Spool, lines: number, sinceNs: bigint): Promise<Start | undefined> {
  const offsets = new Map<OutputStream, number | undefined>([
    [LogStream.STDOUT, spool.offsets.stdout],
    [LogStream.STDERR, spool.offsets.stderr],
  ]);
  if (lines === 0) return { segment: spool.segments.at(-1)?.number ?? 1, offsets, sinceNs };
  let left = lines;
  // The piece of a line that stands last in a stream is a line as well.
  const lineOpen = new Map<OutputStream, boolean>();
  for (const segment of spool.segments.toReversed()) {
    const buffer = (await readFile(spool.segmentPath(segment)).catch(() => Buffer.alloc(0))).subarray(0, segment.bytes);
    const placed = [...blocksIn(buffer)].flatMap((block) => placedEntries(block));
    for (const { entry, offset } of placed.toReversed()) {
      const endsLine = entry.data.at(-1) === 10;
      const startsCounting = endsLine || !(lineOpen.get(entry.stream) ?? false);
      if (startsCounting && left === 0) return { segment: segment.number, offsets, sinceNs };
      if (startsCounting) left -= 1;
      lineOpen.set(entry.stream, true);
      offsets.set(entry.stream, offset);
    }
  }
  return undefined;
}

function placedEntries(block: PlacedBlock): { entry: OutputEntry; offset: number }[] {
  const next = new Map<OutputStream, number>([
    [LogStream.STDOUT, block.header.before.stdout],
    [LogStream.STDERR, block.header.before.stderr],
  ]);
  return block.entries.map((entry) => {
    const offset = next.get(entry.stream) ?? 0;
    next.set(entry.stream, offset + entry.data.length);
    return { entry, offset };
  });
}

function* blocksIn(buffer: Buffer): Generator<PlacedBlock & { readonly endOffset: number }> {
  let offset = 0;
  for (;;) {
    const header = decodeHeader(buffer, offset);
    const entries = header === undefined ? undefined : decodeEntries(buffer, offset, header);
    if (header === undefined || entries === undefined) return;
    offset += blockHeaderBytes + header.payloadBytes;
    yield { header, entries, endOffset: offset };
  }
}

/** All blocks from a segment on, in order, with what comes while it waits. */
async function* blocksOf(
  spool: Spool,
  firstSegment: number,
  follow: boolean,
  signal: AbortSignal,
): AsyncGenerator<PlacedBlock> {
  let number = firstSegment;
  for (;;) {
    signal.throwIfAborted();
    // Dropped ones are passed over; the offsets tell how much that was.
    const segment = spool.segments.find((candidate) => candidate.number >= number);
    if (segment !== undefined) {
      number = segment.number + 1;
      yield* segmentBlocks(spool, segment, follow, signal);
      continue;
    }
    if (!follow || spool.removed) return;
    // Nothing was awaited since the look: no change can have come between.
    await changeOrAbort(spool.changed(), signal);
  }
}

async function* segmentBlocks(
  spool: Spool,
  segment: Segment,
  follow: boolean,
  signal: AbortSignal,
): AsyncGenerator<PlacedBlock> {
  // An open file can still be read once its name was dropped.
  const file = await open(spool.segmentPath(segment)).catch(() => undefined);
  if (file === undefined) return;
  try {
    let offset = 0;
    for (;;) {
      signal.throwIfAborted();
      const change = spool.changed();
      if (offset < segment.bytes) {
        const { blocks, bytes } = await blocksAt(file, offset, segment.bytes);
        for (const block of blocks) yield block;
        // Bytes that are no block: the disk lost them. The next segment's offsets tell how much that was.
        if (bytes === 0) return;
        offset += bytes;
        continue;
      }
      const isLast = spool.segments.at(-1) === segment;
      if (!isLast || !follow || spool.removed) return;
      await changeOrAbort(change, signal);
    }
  } finally {
    await file.close();
  }
}

async function blocksAt(
  file: FileHandle,
  offset: number,
  end: number,
): Promise<{ blocks: PlacedBlock[]; bytes: number }> {
  let size = Math.min(readBytes, end - offset);
  for (;;) {
    const buffer = Buffer.allocUnsafe(size);
    const { bytesRead } = await file.read(buffer, 0, size, offset);
    const header = decodeHeader(buffer.subarray(0, bytesRead), 0);
    const needed = header === undefined ? 0 : blockHeaderBytes + header.payloadBytes;
    if (needed > size && needed <= end - offset) {
      size = needed;
      continue;
    }
    const blocks = [...blocksIn(buffer.subarray(0, bytesRead))];
    return { blocks, bytes: blocks.at(-1)?.endOffset ?? 0 };
  }
}

async function changeOrAbort(change: Promise<void>, signal: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const onAbort = (): void => resolve();
  signal.addEventListener("abort", onAbort, { once: true });
  void change.then(resolve);
  if (signal.aborted) resolve();
  await promise;
  signal.removeEventListener("abort", onAbort);
}

function timestampOf(timeNs: bigint): Timestamp {
  return create(TimestampSchema, { seconds: timeNs / 1_000_000_000n, nanos: Number(timeNs % 1_000_000_000n) });
}

function nanosecondsOf(time: Timestamp): bigint {
  return time.seconds * 1_000_000_000n + BigInt(time.nanos);
}
