import assert from "node:assert/strict";
import { mkdtemp, readdir, readFile, rename, rm, stat, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { create } from "@bufbuild/protobuf";
import { LogPositionSchema, LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";
import fc from "fast-check";
import { decodeEntries, decodeHeader, encodeBlock } from "./block.ts";
import { EngineOutput } from "./engine-output.ts";
import { decodeRecords, type OutputEntry } from "./engine-records.ts";
import { Spool } from "./spool.ts";
import { type LogEvent, type LogRequest, readSpool } from "./spool-reader.ts";

const signal = new AbortController().signal;
const place = { file: Buffer.alloc(22, 1), offset: 1 };
const mib = 1024 * 1024;

const entryArbitrary: fc.Arbitrary<OutputEntry> = fc.record(
  {
    stream: fc.constantFrom(LogStream.STDOUT, LogStream.STDERR),
    timeNs: fc.bigInt({ min: 0n, max: 2n ** 62n }),
    data: fc.uint8Array({ minLength: 1, maxLength: 40 }).map((bytes) => Buffer.from(bytes)),
  },
  { noNullPrototype: true },
);

/** A record as Docker's driver writes it. */
function record(entry: OutputEntry): Buffer {
  const number = (value: bigint): number[] => {
    const bytes: number[] = [];
    for (let rest = value; ; rest >>= 7n) {
      if (rest < 128n) return [...bytes, Number(rest)];
      bytes.push(Number(rest & 127n) | 128);
    }
  };
  const name = entry.stream === LogStream.STDOUT ? "stdout" : "stderr";
  const isLine = entry.data.at(-1) === 10;
  const line = isLine ? entry.data.subarray(0, -1) : entry.data;
  const message = Buffer.concat([
    Buffer.from([0x0a, 6, ...Buffer.from(name), 0x10, ...number(entry.timeNs)]),
    line.length === 0 ? Buffer.alloc(0) : Buffer.from([0x1a, ...number(BigInt(line.length)), ...line]),
    isLine ? Buffer.alloc(0) : Buffer.from([0x20, 1, 0x2a, 2, 0x18, 1]),
  ]);
  const length = Buffer.alloc(4);
  length.writeUInt32BE(message.length);
  return Buffer.concat([length, message, length]);
}

describe("the engine's records", () => {
  it("are read whole, in whatever pieces they come", () => {
    fc.assert(
      fc.property(fc.array(entryArbitrary, { maxLength: 20 }), fc.nat(), (entries, cut) => {
        const bytes = Buffer.concat(entries.map(record));
        const at = bytes.length === 0 ? 0 : cut % bytes.length;
        const first = decodeRecords(bytes.subarray(0, at), false);
        const second = decodeRecords(bytes.subarray(first.consumedBytes), true);
        assert.deepEqual([...first.entries, ...second.entries], entries);
        assert.equal(first.damagedBytes + second.damagedBytes, 0);
      }),
    );
  });

  it("that follow a torn one are found", () => {
    fc.assert(
      fc.property(
        entryArbitrary,
        fc.array(entryArbitrary, { minLength: 1, maxLength: 5 }),
        fc.nat(),
        (torn, entries, cut) => {
          // Longer than the others: one of the same length that lacks just its last four bytes takes its successor's first.
          const whole = record({ ...torn, data: Buffer.concat([Buffer.alloc(64), torn.data]) });
          const part = whole.subarray(0, 1 + (cut % (whole.length - 1)));
          const decoded = decodeRecords(Buffer.concat([part, ...entries.map(record)]), true);
          assert.deepEqual(decoded.entries, entries);
          assert.equal(decoded.damagedBytes, part.length);
        },
      ),
    );
  });
});

describe("the spool", () => {
  let root: string;
  let count = 0;

  before(async () => {
    root = await mkdtemp(join(tmpdir(), "clodei-spool-"));
  });
  after(async () => rm(root, { recursive: true, force: true }));

  const newFolder = (): string => join(root, String((count += 1)));

  const lines = (stream: OutputEntry["stream"], from: number, to: number): OutputEntry[] =>
    Array.from({ length: to - from }, (_, index) => ({
      stream,
      // A second apart, so that none shares a chunk.
      timeNs: BigInt(from + index) * 1_000_000_000n,
      data: Buffer.from(`${stream === LogStream.STDOUT ? "out" : "err"}${from + index}\n`),
    }));

  async function read(spool: Spool, request: Partial<LogRequest> = {}): Promise<LogEvent[]> {
    const events: LogEvent[] = [];
    for await (const event of readSpool(spool, 1, { follow: false, ...request }, signal)) events.push(event);
    return events;
  }

  const text = (events: readonly LogEvent[]): string =>
    events
      .map((event) => (event.kind === "chunk" ? Buffer.from(event.chunk.data).toString("latin1") : `<${event.kind}>`))
      .join("");

  it("gives back what a block was given", () => {
    fc.assert(
      fc.property(fc.array(entryArbitrary, { minLength: 1, maxLength: 20 }), (entries) => {
        // Times as a clock gives them: near each other, and now and then set back.
        const near = entries.map((entry) => ({ ...entry, timeNs: 10n ** 18n + (entry.timeNs % 10n ** 13n) }));
        const block = encodeBlock(near, {
          end: false,
          lostBefore: true,
          before: { stdout: 5, stderr: 2 ** 40 },
          position: place,
        });
        const header = decodeHeader(block, 0) ?? assert.fail("a header");
        assert.deepEqual(decodeEntries(block, 0, header), near);
        assert.deepEqual([header.before, header.lostBefore, header.end], [{ stdout: 5, stderr: 2 ** 40 }, true, false]);
        assert.deepEqual(header.position, place);
      }),
    );
  });

  it("is repaired after a write that was cut at any byte, and goes on from the place before it", async () => {
    const folder = newFolder();
    const spool = await Spool.open(folder, mib);
    await spool.append(lines(LogStream.STDOUT, 0, 3), { ...place, offset: 10 }, false);
    const path = join(folder, (await readdir(folder))[0] ?? "");
    const whole = (await stat(path)).size;
    await spool.append(lines(LogStream.STDERR, 3, 6), { ...place, offset: 20 }, false);
    await spool.close();
    const bytes = await readFile(path);
    for (let size = whole; size < bytes.length; size += 7) {
      await writeFile(path, bytes);
      await truncate(path, size);
      const repaired = await Spool.open(folder, mib);
      assert.equal(repaired.position?.offset, 10, `cut at ${size}`);
      await repaired.append(lines(LogStream.STDERR, 3, 6), { ...place, offset: 20 }, false);
      assert.equal(text(await read(repaired)), "out0\nout1\nout2\nerr3\nerr4\nerr5\n");
      await repaired.close();
    }
    // Not only the length: a byte that is wrong.
    bytes[bytes.length - 2] = (bytes.at(-2) ?? 0) ^ 1;
    await writeFile(path, bytes);
    assert.equal((await Spool.open(folder, mib)).position?.offset, 10);
  });

  it("goes on after every place without loss or doubling", async () => {
    const spool = await Spool.open(newFolder(), mib);
    for (let index = 0; index < 10; index += 1) {
      const both = [...lines(LogStream.STDOUT, index, index + 1), ...lines(LogStream.STDERR, index, index + 1)];
      await spool.append(both, place, false);
    }
    await spool.end();
    const all = await read(spool);
    assert.equal(all.at(-1)?.kind, "end");
    for (let stop = 0; stop < all.length; stop += 1) {
      const first = all.slice(0, stop);
      const positions = [LogStream.STDOUT, LogStream.STDERR].map((stream) => {
        const own = first.flatMap((event) =>
          event.kind === "chunk" && event.chunk.stream === stream ? [event.chunk] : [],
        );
        return create(LogPositionSchema, {
          stream,
          offset: own.reduce((sum, chunk) => sum + BigInt(chunk.data.length), 0n),
        });
      });
      assert.equal(text(first) + text(await read(spool, { positions })), text(all));
    }
    const inside = [create(LogPositionSchema, { stream: LogStream.STDOUT, offset: 2n })];
    assert.match(text(await read(spool, { positions: inside })), /^t0\nerr0\nout1\n/);
    await spool.close();
  });

  it("gives the last lines of both streams together, and pieces of a long line as one", async () => {
    const spool = await Spool.open(newFolder(), mib);
    await spool.append([...lines(LogStream.STDOUT, 0, 3), ...lines(LogStream.STDERR, 3, 5)], place, false);
    const piece = (data: string): OutputEntry => ({
      stream: LogStream.STDOUT,
      timeNs: 9_000_000_000n,
      data: Buffer.from(data),
    });
    await spool.append([piece("long "), piece("line\n"), piece("open")], place, false);
    const expected = ["", "open", "long lineopen", "err4\nlong lineopen", "err3\nerr4\nlong lineopen"];
    for (const [tailLines, end] of expected.entries()) {
      assert.equal(text(await read(spool, { tailLines })), end.replace("lineopen", "line\nopen"), `${tailLines}`);
    }
    assert.equal(text(await read(spool, { tailLines: 7 })), text(await read(spool)));
    assert.equal(text(await read(spool, { tailLines: 1000 })), text(await read(spool)));
    const sinceTime = { $typeName: "google.protobuf.Timestamp", seconds: 3n, nanos: 1 } as const;
    assert.equal(text(await read(spool, { sinceTime })), "err4\nlong line\nopen");
    await spool.close();
  });

  it("stays within its bound and tells each reader exactly what is gone", async () => {
    const maxBytes = 16 * 1024;
    const spool = await Spool.open(newFolder(), maxBytes);
    const slow = readSpool(spool, 1, { follow: false }, signal);
    await spool.append(lines(LogStream.STDERR, 0, 1), place, false);
    await slow.next();
    for (let index = 0; index < 400; index += 1)
      await spool.append(lines(LogStream.STDOUT, index * 5, index * 5 + 5), place, false);
    await spool.end();
    assert.ok(spool.segments.reduce((sum, segment) => sum + segment.bytes, 0) <= maxBytes);
    for (const reader of [slow, readSpool(spool, 1, { follow: false }, signal)]) {
      let next = 0n;
      const kinds = new Set<string>();
      for await (const event of reader) {
        kinds.add(event.kind);
        const piece = event.kind === "chunk" ? event.chunk : event.kind === "gap" ? event.gap : undefined;
        if (piece?.stream !== LogStream.STDOUT) continue;
        assert.equal(piece.offset, next);
        next += "data" in piece ? BigInt(piece.data.length) : piece.lengthBytes;
      }
      assert.equal(next, BigInt(spool.offsets.stdout));
      assert.deepEqual([...kinds].toSorted(), ["chunk", "end", "gap"]);
    }
    assert.equal((await read(spool, { tailLines: 3 })).filter((event) => event.kind === "gap").length, 0);
    await spool.close();
  });

  it("wakes readers that follow, reads nothing ahead for a slow one, and ends with the signal", async () => {
    const spool = await Spool.open(newFolder(), mib);
    const stop = new AbortController();
    const reader = readSpool(spool, 1, { follow: true }, stop.signal);
    const first = reader.next();
    await spool.append(lines(LogStream.STDOUT, 0, 1), place, false);
    const event = await first;
    assert.ok(event.done !== true && event.value.kind === "chunk");
    const second = reader.next();
    stop.abort(new Error("enough"));
    await assert.rejects(second, /enough/);
    await spool.close();
  });
});

describe("the engine's files", () => {
  let folder: string;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), "clodei-output-"));
  });
  after(async () => rm(folder, { recursive: true, force: true }));

  const entry = (index: number): OutputEntry => ({
    stream: LogStream.STDOUT,
    timeNs: 10n ** 18n + BigInt(index),
    data: Buffer.from(`${index}\n`),
  });

  async function drain(output: EngineOutput, final = false) {
    const found: string[] = [];
    let lost = false;
    let position;
    for (;;) {
      const batch = await output.read(final);
      if (batch === undefined) return { found, lost, position };
      found.push(...batch.entries.map(({ data }) => data.toString().trim()));
      lost ||= batch.lostBefore;
      position = batch.position;
    }
  }

  it("are followed across rotations, also when the reader comes late", async () => {
    const current = join(folder, "container.log");
    const older = join(folder, "container.log.1");
    await writeFile(current, Buffer.concat([record(entry(1)), record(entry(2))]));
    await using output = new EngineOutput(folder, undefined);
    const first = await drain(output);
    assert.deepEqual(first.found, ["1", "2"]);
    await writeFile(current, record(entry(3)), { flag: "a" });
    await rename(current, older);
    await writeFile(current, record(entry(4)));
    assert.deepEqual(await drain(output).then(({ found, lost }) => [found, lost]), [["3", "4"], false]);
    // Another reader goes on from the first one's place, in a file that has another name now.
    await using second = new EngineOutput(folder, first.position);
    assert.deepEqual(await drain(second).then(({ found, lost }) => [found, lost]), [["3", "4"], false]);
    // The file of that place is gone.
    await rename(current, older);
    await writeFile(current, record(entry(5)));
    await using third = new EngineOutput(folder, first.position);
    assert.deepEqual(await drain(third).then(({ found, lost }) => [found, lost]), [["4", "5"], true]);
    assert.deepEqual(await drain(output).then(({ found, lost }) => [found, lost]), [["5"], false]);
  });
});
