import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { LogChunkSchema, LogGapSchema, LogStream, type LogChunk } from "@clodei/proto/gen/clodei/v1/instance_service";
import fc from "fast-check";
import { decideHello, LogCursor, planReport, type SessionRecord } from "./model.ts";

const now = new Date("2026-01-01T00:00:00Z");
const leaseMs = 30_000;
const [current, previous, foreign] = [Buffer.from("current"), Buffer.from("previous"), Buffer.from("foreign")];

function standing(change: Partial<SessionRecord> = {}): SessionRecord {
  return {
    sessionId: "s",
    secretHash: current,
    previousSecretHash: previous,
    heartbeatTime: now,
    endTime: undefined,
    ...change,
  };
}

test("a Hello takes the session where nobody stands against it, and asks otherwise", () => {
  const decide = (session: SessionRecord | undefined, shown: Buffer) => decideHello(session, shown, now, leaseMs);
  assert.equal(decide(undefined, foreign), "take", "there is none");
  assert.equal(decide(standing({ endTime: now }), foreign), "take", "it ended");
  assert.equal(decide(standing(), current), "take", "it shows the secret");
  assert.equal(decide(standing(), previous), "take", "the new secret may never have arrived");
  assert.equal(decide(standing({ previousSecretHash: undefined }), previous), "probe", "the new secret was in use");
  assert.equal(decide(standing(), foreign), "probe");
  const silentSince = (ms: number) => standing({ heartbeatTime: new Date(now.getTime() - ms) });
  assert.equal(decide(silentSince(leaseMs), foreign), "probe", "the lease stands");
  assert.equal(decide(silentSince(leaseMs + 1), foreign), "take", "the lease is over");
});

test("a report continues the journal exactly: nothing is skipped, nothing is applied twice", () => {
  const report = fc.tuple(fc.bigInt(0n, 20n), fc.array(fc.bigInt(1n, 30n), { maxLength: 20 }));
  fc.assert(
    fc.property(report, ([watermark, sequences]) => {
      const plan = planReport(
        watermark,
        sequences.map((sequence) => ({ sequence })),
      );
      const applied = plan.apply.map(({ sequence }) => sequence);
      assert.deepEqual(
        applied,
        applied.map((_, index) => watermark + BigInt(index) + 1n),
      );
      assert.equal(plan.watermark, watermark + BigInt(applied.length));
      assert.equal(plan.gap, plan.apply.length + plan.replayed < sequences.length);
      // Whatever was not applied and is not old comes again, and then fits.
      const again = planReport(
        plan.watermark,
        applied.map((sequence) => ({ sequence })),
      );
      assert.equal(again.apply.length, 0);
    }),
  );
});

test("a journal whose link breaks anywhere, and that is sent again from its acknowledgement, arrives whole and once", () => {
  fc.assert(
    fc.property(fc.nat(40), fc.array(fc.tuple(fc.nat(40), fc.nat(40)), { maxLength: 30 }), (length, sends) => {
      const entries = Array.from({ length }, (_, index) => ({ sequence: BigInt(index) + 1n }));
      const applied: bigint[] = [];
      let watermark = 0n;
      for (const [from, to] of [...sends, [Number(watermark), length] as const, [0, length] as const]) {
        const plan = planReport(watermark, entries.slice(from, to));
        applied.push(...plan.apply.map(({ sequence }) => sequence));
        watermark = plan.watermark;
      }
      assert.deepEqual(
        applied,
        entries.map(({ sequence }) => sequence),
      );
    }),
  );
});

test("a log that is sent again from any earlier place reaches the reader once", () => {
  const text = Buffer.from(Array.from({ length: 50 }, (_, line) => `line ${line}\n`).join(""));
  const slices = fc.array(fc.tuple(fc.nat(text.length), fc.nat(40)), { maxLength: 40 });
  fc.assert(
    fc.property(slices, (cuts) => {
      const cursor = new LogCursor([{ $typeName: "clodei.v1.LogPosition", stream: LogStream.STDOUT, offset: 0n }]);
      const read: Buffer[] = [];
      let sent = 0;
      const send = (from: number, to: number): void => {
        const chunk: LogChunk = create(LogChunkSchema, {
          stream: LogStream.STDOUT,
          offset: BigInt(from),
          data: text.subarray(from, to),
        });
        const taken = cursor.takeChunk(chunk);
        if (taken !== undefined) read.push(Buffer.from(taken.data));
        sent = Math.max(sent, to);
      };
      for (const [from, length] of cuts)
        send(Math.min(from, sent), Math.min(text.length, Math.min(from, sent) + length));
      send(sent, text.length);
      assert.equal(Buffer.concat(read).toString(), text.toString());
    }),
  );
});

test("a gap moves its own stream alone, and is told once", () => {
  const cursor = new LogCursor([]);
  const gap = create(LogGapSchema, { stream: LogStream.STDOUT, offset: 0n, lengthBytes: 10n });
  assert.equal(cursor.takeGap(gap)?.lengthBytes, 10n);
  assert.equal(cursor.takeGap(gap), undefined);
  const longer = cursor.takeGap(create(LogGapSchema, { stream: LogStream.STDOUT, offset: 4n, lengthBytes: 10n }));
  assert.deepEqual([longer?.offset, longer?.lengthBytes], [10n, 4n]);
  assert.deepEqual(
    cursor.positions().map(({ stream, offset }) => [stream, offset]),
    [[LogStream.STDOUT, 14n]],
  );
});

test("a reader of the last lines gets no older ones when the link breaks before a stream said anything", () => {
  const chunk = (stream: LogStream, offset: bigint, seconds: bigint): LogChunk =>
    create(LogChunkSchema, { stream, offset, time: { seconds }, data: Buffer.from("line\n") });
  const cursor = new LogCursor([], true);
  assert.ok(cursor.takeChunk(chunk(LogStream.STDOUT, 500n, 100n)));
  cursor.again();
  // The agent begins stderr, of which it was told nothing, at its start.
  assert.equal(
    cursor.takeGap(create(LogGapSchema, { stream: LogStream.STDERR, offset: 0n, lengthBytes: 20n })),
    undefined,
  );
  assert.equal(cursor.takeChunk(chunk(LogStream.STDERR, 20n, 50n)), undefined, "older than the last lines");
  assert.ok(cursor.takeChunk(chunk(LogStream.STDERR, 25n, 101n)), "new");
  assert.equal(cursor.takeChunk(chunk(LogStream.STDERR, 25n, 101n)), undefined, "and once");
  const whole = new LogCursor([], false);
  assert.ok(whole.takeChunk(chunk(LogStream.STDOUT, 0n, 100n)));
  whole.again();
  assert.ok(whole.takeChunk(chunk(LogStream.STDERR, 0n, 50n)), "a reader of everything gets the older ones too");
});

test("a loss of unknown length is told once, also after a broken link", () => {
  const cursor = new LogCursor([]);
  const loss = create(LogGapSchema, { stream: LogStream.STDOUT, offset: 7n, lengthBytes: 0n });
  assert.ok(cursor.takeGap(loss));
  cursor.again();
  assert.equal(cursor.takeGap(loss), undefined);
  assert.equal(cursor.positions().length, 0);
});
