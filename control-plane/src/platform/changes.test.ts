import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { newId, type OrganizationId } from "@clodei/proto/ids";
import fc from "fast-check";
import {
  type Change,
  type ChangeBatch,
  currentCursor,
  maxChangesPerFeed,
  pruneChanges,
  readChanges,
  recordChange,
} from "./changes.ts";
import { decodeCursor, encodeCursor, maxCursorLength } from "./change-cursor.ts";
import { Database, type TenantTx } from "./database.ts";
import { DomainError } from "./errors.ts";
import { startTestDatabase, type TestDatabase } from "./test-database.ts";

describe("the change feed", () => {
  let db: TestDatabase;
  before(async () => {
    db = await startTestDatabase();
  });
  after(async () => {
    await db[Symbol.asyncDispose]();
  });

  const payload = (text: string): Uint8Array => Buffer.from(text);
  const record = (tx: TenantTx, subjectId: string, text: string): Promise<void> =>
    recordChange(tx, { organizationId: tx.organizationId, kind: "instance", subjectId, payload: payload(text) });
  const write = (organizationId: OrganizationId, subjectId: string, text: string): Promise<void> =>
    db.database.tenant(organizationId, (tx) => record(tx, subjectId, text));
  const start = (organizationId: OrganizationId): Promise<string> =>
    db.database.tenant(organizationId, currentCursor, { isolation: "repeatable read" });
  const read = (organizationId: OrganizationId, cursor: string, limit = 100): Promise<ChangeBatch> =>
    db.database.tenant(organizationId, (tx) => readChanges(tx, "instance", cursor, limit));
  const texts = (changes: readonly Change[]): string[] => changes.map((change) => change.payload.toString());
  const drain = async (
    organizationId: OrganizationId,
    from: string,
    limit: number,
  ): Promise<{ seen: string[]; cursor: string }> => {
    const seen: string[] = [];
    let cursor = from;
    for (let more = true; more;) {
      const batch = await read(organizationId, cursor, limit);
      seen.push(...texts(batch.changes));
      ({ cursor, more } = batch);
    }
    return { seen, cursor };
  };

  test("a batch of large objects ends early, and the next one goes on where it ended", async () => {
    const organizationId = newId("org");
    const cursor = await start(organizationId);
    const texts5 = ["1", "2", "3", "4", "5"].map((text) => text.repeat(400 * 1024));
    for (const text of texts5) await write(organizationId, "a", text);
    const first = await read(organizationId, cursor);
    assert.deepEqual([first.changes.length, first.more], [3, true]);
    assert.deepEqual((await drain(organizationId, cursor, 100)).seen, texts5);
    // One that is larger than a batch comes alone.
    await write(organizationId, "b", "6".repeat(2 * 1024 * 1024));
    await write(organizationId, "b", "7");
    const large = await read(organizationId, (await drain(organizationId, cursor, 100)).cursor);
    assert.deepEqual([large.changes.length, large.more], [0, false], "all of it was read");
  });

  test("an older transaction that commits after a newer one was seen is not skipped", async () => {
    const organizationId = newId("org");
    const cursor = await start(organizationId);
    const mayCommit = Promise.withResolvers<void>();
    const recorded = Promise.withResolvers<void>();
    const older = db.database.tenant(organizationId, async (tx) => {
      await record(tx, "a", "older");
      recorded.resolve();
      await mayCommit.promise;
    });
    await recorded.promise;
    await write(organizationId, "b", "newer");

    const first = await read(organizationId, cursor);
    assert.deepEqual(texts(first.changes), ["newer"]);
    mayCommit.resolve();
    await older;
    const second = await read(organizationId, first.cursor);
    assert.deepEqual(texts(second.changes), ["older"]);
    const [newer] = first.changes;
    const [late] = second.changes;
    assert.ok(newer !== undefined && late !== undefined && late.revision < newer.revision, "its number is lower");

    // From the middle of the first batch, too.
    assert.deepEqual((await drain(organizationId, newer.cursor, 10)).seen, ["older"]);
    const third = await read(organizationId, second.cursor);
    assert.deepEqual(third.changes, []);
  });

  test("a rollback leaves nothing, and a batch that is read in pieces loses and repeats nothing", async () => {
    const organizationId = newId("org");
    const cursor = await start(organizationId);
    for (let n = 0; n < 25; n += 1) {
      await write(organizationId, `s${n % 3}`, String(n));
      await assert.rejects(
        db.database.tenant(organizationId, async (tx) => {
          await record(tx, "s0", `rolled back ${n}`);
          throw new Error("no");
        }),
      );
    }
    const expected = Array.from({ length: 25 }, (_, n) => String(n));
    for (const limit of [1, 7, 25, 100]) {
      assert.deepEqual((await drain(organizationId, cursor, limit)).seen, expected, `limit ${limit}`);
    }
  });

  test("whatever is written between the pieces of a batch comes after it, once", async () => {
    const organizationId = newId("org");
    const cursor = await start(organizationId);
    for (let n = 0; n < 4; n += 1) await write(organizationId, "s", `early ${n}`);
    const first = await read(organizationId, cursor, 2);
    assert.equal(first.more, true);
    for (let n = 0; n < 4; n += 1) await write(organizationId, "s", `late ${n}`);
    const rest = await drain(organizationId, first.cursor, 3);
    assert.deepEqual(
      [...texts(first.changes), ...rest.seen],
      [...[0, 1, 2, 3].map((n) => `early ${n}`), ...[0, 1, 2, 3].map((n) => `late ${n}`)],
    );
  });

  test("a snapshot and the changes behind its cursor are the whole story", async () => {
    const organizationId = newId("org");
    await write(organizationId, "s", "before");
    const cursor = await db.database.tenant(
      organizationId,
      async (tx) => {
        const position = await currentCursor(tx);
        // Committed by another while our snapshot stands: a change, because the snapshot does not show it.
        await write(organizationId, "s", "meanwhile");
        const visible = await tx.query("select 1 from changes");
        assert.equal(visible.length, 1);
        return position;
      },
      { isolation: "repeatable read" },
    );
    assert.deepEqual((await drain(organizationId, cursor, 10)).seen, ["meanwhile"]);
  });

  test("any interleaving of writers is seen exactly once, in order for each subject", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ holdMs: fc.nat(8), subject: fc.nat(2) }), { minLength: 1, maxLength: 12 }),
        fc.integer({ min: 1, max: 5 }),
        async (writers, limit) => {
          const organizationId = newId("org");
          let cursor = await start(organizationId);
          const seen: Change[] = [];
          const writing = new AbortController();
          const poll = async (): Promise<boolean> => {
            const batch = await read(organizationId, cursor, limit);
            seen.push(...batch.changes);
            ({ cursor } = batch);
            return batch.more;
          };
          const reader = (async () => {
            while (!writing.signal.aborted) await poll();
            while (await poll());
          })();
          await Promise.all(
            writers.map(({ holdMs, subject }, index) =>
              db.database.tenant(organizationId, async (tx) => {
                // What a slice's row lock does: writers of one subject follow each other.
                await tx.query("select pg_advisory_xact_lock(hashtext($1))", [`${organizationId}${subject}`]);
                await record(tx, `s${subject}`, String(index));
                await new Promise((resolve) => setTimeout(resolve, holdMs));
              }),
            ),
          );
          writing.abort();
          await reader;
          assert.deepEqual(
            texts(seen).toSorted((a, b) => Number(a) - Number(b)),
            writers.map((_, index) => String(index)),
          );
          for (const subject of ["s0", "s1", "s2"]) {
            const revisions = seen.filter(({ subjectId }) => subjectId === subject).map(({ revision }) => revision);
            assert.deepEqual(
              revisions,
              revisions.toSorted((a, b) => (a < b ? -1 : 1)),
            );
          }
        },
      ),
      { numRuns: 15 },
    );
  });

  test("an organization's feed holds nothing of another's, and the fleet's feed nothing of either", async () => {
    const [mine, other] = [newId("org"), newId("org")];
    const [cursor, fleet] = [await start(mine), await db.database.system(currentCursor)];
    await write(other, "s", "theirs");
    await db.database.system((tx) =>
      recordChange(tx, { organizationId: undefined, kind: "node", subjectId: "n", payload: payload("node") }),
    );
    assert.deepEqual((await drain(mine, cursor, 10)).seen, []);
    const nodes = await db.database.system((tx) => readChanges(tx, "node", fleet, 10));
    assert.deepEqual(texts(nodes.changes), ["node"]);
  });

  test("a cursor from before what was pruned is too old, and a later one is not", async () => {
    const organizationId = newId("org");
    const old = await start(organizationId);
    for (let n = 0; n < 5; n += 1) await write(organizationId, "s", String(n));
    const fresh = await start(organizationId);
    await write(organizationId, "s", "5");
    assert.equal(await pruneChanges(db.database, new Date(), { maxPerFeed: maxChangesPerFeed }), 0);
    assert.deepEqual((await drain(organizationId, old, 10)).seen, ["0", "1", "2", "3", "4", "5"]);
    await pruneChanges(db.database, new Date(), { maxPerFeed: 1 });
    await assert.rejects(read(organizationId, old), isReason(ErrorReason.CURSOR_EXPIRED));
    assert.deepEqual((await drain(organizationId, fresh, 10)).seen, ["5"]);
    await pruneChanges(db.database, new Date(Date.now() + 25 * 60 * 60 * 1_000));
    await assert.rejects(read(organizationId, fresh), isReason(ErrorReason.CURSOR_EXPIRED));
    assert.deepEqual((await read(organizationId, await start(organizationId))).changes, []);
  });

  test("a cursor that is not of this database, or forged, is refused and never reaches a cast", async () => {
    const organizationId = newId("org");
    const cursor = await start(organizationId);
    const other = decodeCursor(cursor);
    assert.ok(other);
    const forged = [
      "",
      "x",
      Buffer.from(JSON.stringify([1, other.databaseId, other.from, "", "0"])).toString("base64url"),
      cursor.slice(0, -2),
      `${cursor}AA`,
      encodeCursor({ ...other, databaseId: "00000000-0000-0000-0000-000000000000" }),
      encodeCursor({ ...other, from: "0:5:" }),
      encodeCursor({ ...other, from: "3:5:5" }),
      encodeCursor({ ...other, from: `5:${2n ** 63n}:` }),
      encodeCursor({ ...other, revision: 2n ** 63n }),
      "A".repeat(40_000),
    ];
    for (const cursor of forged) {
      await assert.rejects(read(organizationId, cursor), isReason(ErrorReason.CURSOR_INVALID), cursor.slice(0, 80));
    }
  });

  test("a cursor of thousands of writers at work is one that is accepted", async () => {
    const organizationId = newId("org");
    const position = decodeCursor(await start(organizationId));
    assert.ok(position);
    // The database of a test has a hundred connections: the snapshot is made up, and PostgreSQL reads it as its own.
    const xids = Array.from({ length: 5_000 }, (_, index) => 4_000_000_000n + BigInt(index * 1_000));
    const busy = `4000000000:4009000000:${xids.join(",")}`;
    const cursor = encodeCursor({ ...position, from: busy, to: busy, revision: 2n ** 62n });
    assert.ok(cursor.length <= maxCursorLength, `${cursor.length} characters`);
    assert.equal(decodeCursor(cursor)?.to, busy);
    assert.deepEqual((await read(organizationId, cursor)).changes, []);
  });

  test("a cursor comes back as it went out, whatever writers were at work", async () => {
    const writers = 40;
    const begun = Array.from({ length: writers }, () => Promise.withResolvers<void>());
    const mayEnd = Promise.withResolvers<void>();
    const organizationId = newId("org");
    await using busy = new Database({ ...db.server, maxConnectionsPerPool: writers, log: db.log });
    const working = begun.map((one, index) =>
      busy.tenant(organizationId, async (tx) => {
        await record(tx, `s${index}`, String(index));
        one.resolve();
        await mayEnd.promise;
      }),
    );
    await Promise.all(begun.map(({ promise }) => promise));
    // One that is done after them: a snapshot names who was at work before the newest that was done.
    await write(newId("org"), "s", "");
    const cursor = await start(organizationId);
    mayEnd.resolve();
    await Promise.all(working);
    const position = decodeCursor(cursor);
    assert.ok(position);
    assert.equal(position.from.split(",").length, writers);
    assert.equal(encodeCursor(position), cursor);
    assert.ok(cursor.length < 160, cursor);
    const { seen } = await drain(organizationId, cursor, 7);
    assert.deepEqual(
      seen.toSorted((a, b) => Number(a) - Number(b)),
      working.map((_, index) => String(index)),
    );
  });

  test("whatever a cursor is changed to is refused, or a snapshot that PostgreSQL takes", async () => {
    const position = { databaseId: newUuid, from: "700:9000:700,701,850,8999", to: "800:9000:", revision: 77n };
    const bytes = Buffer.from(encodeCursor(position), "base64url");
    const accepted = new Set<string>();
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.nat(bytes.length - 1), fc.nat(255)), { maxLength: 4 }), (changes) => {
        const forged = Buffer.from(bytes);
        for (const [at, value] of changes) forged[at] = value;
        const decoded = decodeCursor(forged.toString("base64url"));
        for (const snapshot of [decoded?.from, decoded?.to]) if (snapshot !== undefined) accepted.add(snapshot);
      }),
      { numRuns: 500 },
    );
    assert.ok(accepted.size > 10);
    for (const snapshot of accepted) {
      await db.database.system((tx) => tx.query("select $1::pg_snapshot", [snapshot]));
    }
  });

  const newUuid = "8d1c2f9e-6a57-4a3e-9f1d-0c5b7e2a4f60";

  function isReason(reason: ErrorReason): (error: unknown) => boolean {
    return (error) => error instanceof DomainError && error.reason === reason;
  }
});
