// The blocks of the spool. One block is one write: what the agent read from the engine at once, together with the place
// in the engine's files after it. So output and place can never disagree, whenever the agent is killed: a block is
// there as a whole, or it fails its checksum and is read from the engine again.
import { crc32 } from "node:zlib";
import { LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";
import { fileNameBytes, type OutputPosition } from "./engine-output.ts";
import type { OutputEntry, OutputStream } from "./engine-records.ts";

/** Bytes of each stream, counted from the attempt's start. */
export interface StreamOffsets {
  readonly stdout: number;
  readonly stderr: number;
}

/** A block without its entries. */
export interface BlockHeader {
  readonly payloadBytes: number;
  /** The attempt ended, and this is the last block. */
  readonly end: boolean;
  /** Output is missing before this block that the engine dropped before it was read; nobody knows how much. */
  readonly lostBefore: boolean;
  /** Bytes of each stream before this block. */
  readonly before: StreamOffsets;
  /** Time of the first entry. */
  readonly timeNs: bigint;
  /** Where the engine's files are to be read on. Undefined before the first output. */
  readonly position: OutputPosition | undefined;
}

const magic = 0x434c4f47;
const flagEnd = 1;
const flagLost = 2;
const flagPosition = 4;
export const blockHeaderBytes = 72;
/** More than any block holds; a length beyond it is damage. */
const maxPayloadBytes = 4 * 1024 * 1024;
const maxNumberBytes = 10;

/** Writes a block. */
export function encodeBlock(
  entries: readonly OutputEntry[],
  header: Pick<BlockHeader, "end" | "lostBefore" | "before" | "position">,
): Buffer {
  const payload = encodeEntries(entries);
  const block = Buffer.alloc(blockHeaderBytes + payload.length);
  const { position } = header;
  block.writeUInt32BE(magic, 0);
  block.writeUInt32BE(payload.length, 4);
  block.writeUInt32BE(
    (header.end ? flagEnd : 0) | (header.lostBefore ? flagLost : 0) | (position ? flagPosition : 0),
    12,
  );
  block.writeBigUInt64BE(BigInt(header.before.stdout), 16);
  block.writeBigUInt64BE(BigInt(header.before.stderr), 24);
  block.writeBigUInt64BE(entries[0]?.timeNs ?? 0n, 32);
  block.writeBigUInt64BE(BigInt(position?.offset ?? 0), 40);
  position?.file.copy(block, 48, 0, fileNameBytes);
  payload.copy(block, blockHeaderBytes);
  block.writeUInt32BE(crc32(block.subarray(12)), 8);
  return block;
}

/** Reads a block's header; undefined where none stands. The checksum is not looked at. */
export function decodeHeader(buffer: Buffer, offset: number): BlockHeader | undefined {
  if (offset + blockHeaderBytes > buffer.length || buffer.readUInt32BE(offset) !== magic) return undefined;
  const payloadBytes = buffer.readUInt32BE(offset + 4);
  if (payloadBytes > maxPayloadBytes) return undefined;
  const flags = buffer.readUInt32BE(offset + 12);
  const file = Buffer.from(buffer.subarray(offset + 48, offset + 48 + fileNameBytes));
  return {
    payloadBytes,
    end: (flags & flagEnd) !== 0,
    lostBefore: (flags & flagLost) !== 0,
    before: {
      stdout: Number(buffer.readBigUInt64BE(offset + 16)),
      stderr: Number(buffer.readBigUInt64BE(offset + 24)),
    },
    timeNs: buffer.readBigUInt64BE(offset + 32),
    position: (flags & flagPosition) === 0 ? undefined : { file, offset: Number(buffer.readBigUInt64BE(offset + 40)) },
  };
}

/** Reads a whole block's entries; undefined where the block is torn or damaged. */
export function decodeEntries(buffer: Buffer, offset: number, header: BlockHeader): OutputEntry[] | undefined {
  const end = offset + blockHeaderBytes + header.payloadBytes;
  if (end > buffer.length || crc32(buffer.subarray(offset + 12, end)) !== buffer.readUInt32BE(offset + 8))
    return undefined;
  const entries: OutputEntry[] = [];
  let { timeNs } = header;
  let at = offset + blockHeaderBytes;
  while (at < end) {
    const size = readNumber(buffer, at);
    const delta = readNumber(buffer, size.end);
    const length = Math.floor(size.value / 2);
    timeNs += BigInt(delta.value % 2 === 0 ? delta.value / 2 : -(delta.value + 1) / 2);
    const stream: OutputStream = size.value % 2 === 0 ? LogStream.STDOUT : LogStream.STDERR;
    entries.push({ stream, timeNs, data: buffer.subarray(delta.end, delta.end + length) });
    at = delta.end + length;
  }
  return entries;
}

/** Each entry: length and stream in one number, time since the entry before (which a clock can set back), bytes. */
function encodeEntries(entries: readonly OutputEntry[]): Buffer {
  const bytes = entries.reduce((sum, entry) => sum + entry.data.length, 0);
  const payload = Buffer.allocUnsafe(bytes + entries.length * 2 * maxNumberBytes);
  let before = entries[0]?.timeNs ?? 0n;
  let at = 0;
  for (const entry of entries) {
    // A clock that was set back by more than 26 days would need more bits than a number has.
    const delta = Math.max(Number(entry.timeNs - before), -(2 ** 51));
    before = entry.timeNs;
    at = writeNumber(payload, at, entry.data.length * 2 + (entry.stream === LogStream.STDERR ? 1 : 0));
    at = writeNumber(payload, at, delta >= 0 ? delta * 2 : -delta * 2 - 1);
    at += entry.data.copy(payload, at);
  }
  return payload.subarray(0, at);
}

/** Seven bits to a byte, the lowest first; without bit operators, which end at 32 bits. */
function writeNumber(buffer: Buffer, offset: number, value: number): number {
  let at = offset;
  let rest = value;
  while (rest >= 128) {
    buffer[at] = (rest % 128) + 128;
    rest = Math.floor(rest / 128);
    at += 1;
  }
  buffer[at] = rest;
  return at + 1;
}

function readNumber(buffer: Buffer, offset: number): { readonly value: number; readonly end: number } {
  let value = 0;
  let factor = 1;
  for (let end = offset; ; end += 1) {
    const byte = buffer[end] ?? 0;
    value += (byte % 128) * factor;
    factor *= 128;
    if (byte < 128) return { value, end: end + 1 };
  }
}

/** The offsets after a block. */
export function offsetsAfter(before: StreamOffsets, entries: readonly OutputEntry[]): StreamOffsets {
  let { stdout, stderr } = before;
  for (const entry of entries) {
    if (entry.stream === LogStream.STDOUT) stdout += entry.data.length;
    else stderr += entry.data.length;
  }
  return { stdout, stderr };
}
