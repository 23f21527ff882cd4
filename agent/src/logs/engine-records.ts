// The records in which Docker's "local" log driver keeps a container's output: the length, a small protobuf message,
// the length again. Read from the files themselves rather than by the API, because only a place in a file names a
// place in the output exactly: the API resumes by time stamps, which the clock repeats and sets back.
import { LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";

/** One of a container's two streams. */
export type OutputStream = Exclude<LogStream, typeof LogStream.UNSPECIFIED>;

/** A line, or a piece of a line of more than 16 KiB, with its line feed where it has one. */
export interface OutputEntry {
  readonly stream: OutputStream;
  /** When the engine read it, in nanoseconds since 1970. */
  readonly timeNs: bigint;
  readonly data: Buffer;
}

/** What a piece of a file holds. */
export interface DecodedRecords {
  readonly entries: readonly OutputEntry[];
  /** Bytes that are done with. What follows them is the beginning of a record. */
  readonly consumedBytes: number;
  /** Bytes that were no records: what an engine left that was killed while it wrote. */
  readonly damagedBytes: number;
}

const lengthBytes = 4;
/** The driver cuts lines at 16 KiB; names and numbers around them take some hundred bytes. */
const maxRecordBytes = 64 * 1024;
const lineFeed = 10;
const stdoutName = Buffer.from("stdout");
const stderrName = Buffer.from("stderr");
const maxNumberBytes = 10;
const lowNumberBytes = 4;
const highFactor = 2n ** 28n;

/** Decodes as many records as are whole. `final` says that no more bytes will come, so that a torn end is damage. */
export function decodeRecords(buffer: Buffer, final: boolean): DecodedRecords {
  const entries: OutputEntry[] = [];
  let offset = 0;
  let damagedBytes = 0;
  while (offset < buffer.length) {
    const record = recordAt(buffer, offset);
    if (record === "incomplete" && !final) break;
    if (typeof record === "object") {
      entries.push(record.entry);
      offset = record.end;
      continue;
    }
    const next = nextRecord(buffer, offset + 1, final);
    damagedBytes += next - offset;
    offset = next;
    if (typeof recordAt(buffer, offset) !== "object") break;
  }
  return { entries, consumedBytes: offset, damagedBytes };
}

function recordAt(buffer: Buffer, offset: number): { entry: OutputEntry; end: number } | "incomplete" | "damaged" {
  if (offset + lengthBytes > buffer.length) return "incomplete";
  const length = buffer.readUInt32BE(offset);
  if (length === 0 || length > maxRecordBytes) return "damaged";
  const end = offset + lengthBytes + length + lengthBytes;
  if (end > buffer.length) return "incomplete";
  if (buffer.readUInt32BE(end - lengthBytes) !== length) return "damaged";
  const entry = parseMessage(buffer, offset + lengthBytes, end - lengthBytes);
  return entry === undefined ? "damaged" : { entry, end };
}

/** Where the next whole record begins; without one, how far the bytes can be given up. */
function nextRecord(buffer: Buffer, from: number, final: boolean): number {
  for (let offset = from; offset < buffer.length; offset += 1) {
    if (typeof recordAt(buffer, offset) === "object") return offset;
  }
  // The beginning of a record may stand at the end.
  return final ? buffer.length : Math.max(from, buffer.length - maxRecordBytes);
}

/** The driver's message: source = 1, time_nano = 2, line = 3, partial = 4, partial_log_metadata = 5 with last = 1. */
function parseMessage(buffer: Buffer, begin: number, end: number): OutputEntry | undefined {
  const fields = new FieldReader(buffer, begin, end);
  let stream: OutputStream | undefined;
  let timeNs: bigint | undefined;
  let lineBegin = 0;
  let lineEnd = 0;
  let partial = false;
  let last = false;
  while (fields.next()) {
    if (fields.number === 1) stream = streamOf(buffer, fields.begin, fields.end);
    else if (fields.number === 2) timeNs = BigInt(fields.high) * highFactor + BigInt(fields.low);
    else if (fields.number === 3) [lineBegin, lineEnd] = [fields.begin, fields.end];
    else if (fields.number === 4) partial = fields.low === 1;
    else if (fields.number === 5) last = isLast(buffer, fields.begin, fields.end);
  }
  if (fields.malformed || stream === undefined || timeNs === undefined) return undefined;
  // The driver takes line feeds off. A piece of a line has none, unless it is the line's last one.
  const whole = !partial || last;
  if (!whole) return { stream, timeNs, data: buffer.subarray(lineBegin, lineEnd) };
  const data = Buffer.allocUnsafe(lineEnd - lineBegin + 1);
  buffer.copy(data, 0, lineBegin, lineEnd);
  data[data.length - 1] = lineFeed;
  return { stream, timeNs, data };
}

function isLast(buffer: Buffer, begin: number, end: number): boolean {
  const fields = new FieldReader(buffer, begin, end);
  while (fields.next()) if (fields.number === 1) return fields.low === 1;
  return false;
}

function streamOf(buffer: Buffer, begin: number, end: number): OutputStream | undefined {
  // Told apart without making a text of each: "stdout" and "stderr" have the same length.
  if (end - begin !== stdoutName.length) return undefined;
  if (buffer.compare(stdoutName, 0, stdoutName.length, begin, end) === 0) return LogStream.STDOUT;
  return buffer.compare(stderrName, 0, stderrName.length, begin, end) === 0 ? LogStream.STDERR : undefined;
}

/** Walks over a protobuf message's fields. One object and no garbage: it sees a hundred thousand lines a second. */
class FieldReader {
  readonly #buffer: Buffer;
  readonly #end: number;
  #at: number;
  number = 0;
  /** A number's lower 28 bits, and what is above them. */
  low = 0;
  high = 0;
  /** Where a field of bytes stands. */
  begin = 0;
  end = 0;
  malformed = false;

  constructor(buffer: Buffer, begin: number, end: number) {
    this.#buffer = buffer;
    this.#at = begin;
    this.#end = end;
  }

  /** Goes to the next field; false at the end, and at bytes that are none. */
  next(): boolean {
    if (this.#at >= this.#end) return false;
    if (!this.#readNumber()) return this.#fail();
    this.number = this.low >> 3;
    const kind = this.low & 7;
    if (this.number === 0 || (kind !== 0 && kind !== 2) || !this.#readNumber()) return this.#fail();
    if (kind === 0) return true;
    this.begin = this.#at;
    this.end = this.#at + this.low;
    if (this.high !== 0 || this.end > this.#end) return this.#fail();
    this.#at = this.end;
    return true;
  }

  #fail(): false {
    this.malformed = true;
    return false;
  }

  /** Up to 64 bits, seven to a byte, the lowest first. What is above the 28th stays exact: it has 36 bits. */
  #readNumber(): boolean {
    this.low = 0;
    this.high = 0;
    let factor = 1;
    for (let index = 0; index < maxNumberBytes; index += 1) {
      if (this.#at >= this.#end) return false;
      const byte = this.#buffer[this.#at] ?? 0;
      this.#at += 1;
      if (index < lowNumberBytes) {
        this.low |= (byte & 127) << (7 * index);
      } else {
        this.high += (byte & 127) * factor;
        factor *= 128;
      }
      if (byte < 128) return true;
    }
    return false;
  }
}
