// The position of a reader of changes, as it goes out and comes back. A snapshot of PostgreSQL names every writer that
// was at work, and there can be as many as the database has connections: they are written as what lies between one and
// the next, a byte or two each.
import { Buffer } from "node:buffer";

/** How far a reader is. Snapshots in the text of PostgreSQL, "xmin:xmax:xip,…". */
export type Position = {
  /** The UUID of the database. */
  readonly databaseId: string;
  /** The snapshot up to which everything was sent. */
  readonly from: string;
  /** Within a batch: the snapshot that bounds it. */
  readonly to: string | undefined;
  /** Within a batch: the last revision sent. */
  readonly revision: bigint;
};

/** Room for 5,000 writers at work, twice; as the schema has it for `cursor`. */
export const maxCursorLength = 32_768;

const version = 2;
const databaseIdBytes = 16;
const maxNumber = 2n ** 63n - 1n;

/** Writes a position. */
export function encodeCursor({ databaseId, from, to, revision }: Position): string {
  return Buffer.concat([
    Buffer.from([version]),
    Buffer.from(databaseId.replaceAll("-", ""), "hex"),
    Buffer.from([
      ...numbersOf(from).flatMap(encodeNumber),
      ...(to === undefined ? [0] : [1, ...numbersOf(to).flatMap(encodeNumber)]),
      ...encodeNumber(revision),
    ]),
  ]).toString("base64url");
}

/** Reads a position; undefined where it is none that encodeCursor could have written. PostgreSQL accepts its snapshots. */
export function decodeCursor(cursor: string): Position | undefined {
  if (cursor.length > maxCursorLength) return undefined;
  const bytes = Buffer.from(cursor, "base64url");
  if (bytes[0] !== version || bytes.length <= 1 + databaseIdBytes) return undefined;
  const numbers = decodeNumbers(bytes.subarray(1 + databaseIdBytes));
  if (numbers === undefined) return undefined;
  const from = takeSnapshot(numbers);
  const isWithin = numbers.next().value;
  const to = isWithin === 1n ? takeSnapshot(numbers) : undefined;
  const revision = numbers.next().value;
  const isWhole = numbers.next().done === true;
  if (from === undefined || revision === undefined || !isWhole) return undefined;
  if (isWithin !== 0n && (isWithin !== 1n || to === undefined)) return undefined;
  const databaseId = bytes
    .subarray(1, 1 + databaseIdBytes)
    .toString("hex")
    .replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
  return { databaseId, from, to, revision };
}

/** xmin, what lies between it and xmax, how many writers there are, and what lies between each and the one before. */
function numbersOf(snapshot: string): bigint[] {
  const [xmin = "", xmax = "", list = ""] = snapshot.split(":");
  const writers = list === "" ? [] : list.split(",").map(BigInt);
  const first = BigInt(xmin);
  const gaps = writers.map((xid, index) => xid - (writers[index - 1] ?? first));
  return [first, BigInt(xmax) - first, BigInt(writers.length), ...gaps];
}

function takeSnapshot(numbers: Iterator<bigint, undefined>): string | undefined {
  const [xmin, span, count] = [numbers.next().value, numbers.next().value, numbers.next().value];
  // A writer takes a byte at least, so that a count is no way to make us count.
  if (xmin === undefined || span === undefined || count === undefined || count > maxCursorLength) return undefined;
  const xmax = xmin + span;
  if (xmin === 0n || xmax > maxNumber) return undefined;
  const writers: bigint[] = [];
  for (let index = 0n; index < count; index += 1n) {
    const gap = numbers.next().value;
    if (gap === undefined) return undefined;
    const xid = (writers.at(-1) ?? xmin) + gap;
    if (xid >= xmax) return undefined;
    writers.push(xid);
  }
  return `${xmin}:${xmax}:${writers.join(",")}`;
}

/** Seven bits a byte, the lowest first; the eighth says that more follow. */
function encodeNumber(value: bigint): number[] {
  const bytes: number[] = [];
  let rest = value;
  for (; rest > 0x7fn; rest >>= 7n) bytes.push(Number(rest & 0x7fn) | 0x80);
  return [...bytes, Number(rest)];
}

function decodeNumbers(bytes: Buffer): Iterator<bigint, undefined> | undefined {
  const numbers: bigint[] = [];
  let value = 0n;
  let shift = 0n;
  for (const byte of bytes) {
    value |= BigInt(byte & 0x7f) << shift;
    shift += 7n;
    if (value > maxNumber || shift > 63n) return undefined;
    if (byte > 0x7f) continue;
    numbers.push(value);
    [value, shift] = [0n, 0n];
  }
  return shift === 0n ? numbers.values() : undefined;
}
