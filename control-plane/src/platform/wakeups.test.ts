import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import pg from "pg";
import { startReconciler } from "./reconciler.ts";
import { startTestDatabase, type TestDatabase } from "./test-database.ts";
import { type Topic, Wakeups } from "./wakeups.ts";

describe("hints and reconcilers", () => {
  let db: TestDatabase;
  before(async () => {
    db = await startTestDatabase({ migrated: false });
  });
  after(async () => {
    await db[Symbol.asyncDispose]();
  });

  const counter = (wakeups: Wakeups, topics: Topic[]): { count: number } => {
    const seen = { count: 0 };
    wakeups.subscribe(topics, () => {
      seen.count += 1;
    });
    return seen;
  };
  const until = async (condition: () => boolean): Promise<void> => {
    for (let n = 0; n < 500 && !condition(); n += 1) await sleep(10);
    assert.ok(condition());
  };

  test("a hint reaches this process at once, and another process soon, once", async () => {
    await using other = new Wakeups({ connection: db.server.system, log: db.log });
    await other.start();
    const [here, there, elsewhere] = [
      counter(db.wakeups, ["node:nod_1"]),
      counter(other, ["node:nod_1"]),
      counter(other, ["node:nod_2"]),
    ];
    db.wakeups.notify("node:nod_1");
    assert.equal(here.count, 1);
    await until(() => there.count === 1);
    await sleep(50);
    assert.deepEqual([here.count, there.count, elsewhere.count], [1, 1, 0]);
  });

  test("many hints of one moment travel as few messages, and none is lost", async () => {
    await using other = new Wakeups({ connection: db.server.system, log: db.log });
    await other.start();
    const topics = Array.from({ length: 250 }, (_, n): Topic => `node:nod_${n}`);
    const seen = topics.map((topic) => counter(other, [topic]));
    for (const topic of topics) for (let n = 0; n < 4; n += 1) db.wakeups.notify(topic);
    await until(() => seen.every(({ count }) => count >= 1));
    assert.ok(seen.every(({ count }) => count <= 2));
  });

  test("a connection that breaks comes back, and everybody looks again", async () => {
    const seen = counter(db.wakeups, ["instances"]);
    const client = new pg.Client(db.administrator);
    await client.connect();
    await client.query(
      "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'clodei-wakeups'",
    );
    await client.end();
    await until(() => seen.count >= 1);
    await using other = new Wakeups({ connection: db.server.system, log: db.log });
    await other.start();
    const before = seen.count;
    other.notify("instances");
    await until(() => seen.count > before);
  });

  test("a wait ends by a hint, by time, and by its signal", async () => {
    const hinted = db.wakeups.wait(["placement"], 10_000);
    db.wakeups.notify("placement");
    await hinted;
    await db.wakeups.wait(["placement"], 10);
    await db.wakeups.wait(["placement"], 10_000, AbortSignal.timeout(10));
    await db.wakeups.wait(["placement"], 10_000, AbortSignal.abort());
  });

  test("a reconciler runs at start, by hint and by time, never twice at once, and again after an error", async () => {
    let [passes, running, most] = [0, 0, 0];
    let intervalMs = 60_000;
    const start = (): AsyncDisposable =>
      startReconciler({
        name: "test",
        topics: ["placement"],
        intervalMs,
        log: db.log,
        wakeups: db.wakeups,
        run: async () => {
          passes += 1;
          running += 1;
          most = Math.max(most, running);
          await sleep(15);
          running -= 1;
          if (passes === 2) throw new Error("a pass that fails");
        },
      });
    {
      await using _reconciler = start();
      await until(() => passes === 1 && running === 0);
      db.wakeups.notify("placement");
      await until(() => passes === 2 && running === 1);
      // During the pass: what it hints at may not have been seen.
      for (let n = 0; n < 10; n += 1) db.wakeups.notify("placement");
      await until(() => passes === 3 && running === 0);
      await sleep(60);
      assert.equal(passes, 3);
    }
    assert.equal(running, 0);
    intervalMs = 10;
    {
      await using _reconciler = start();
      await until(() => passes >= 6);
    }
    assert.equal(most, 1);
    const after = passes;
    db.wakeups.notify("placement");
    await sleep(40);
    assert.equal(passes, after);
  });
});
