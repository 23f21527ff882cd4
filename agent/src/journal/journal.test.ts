import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, open, readFile, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { create } from "@bufbuild/protobuf";
import {
  AttemptPhase,
  ContainerSpecSchema,
  DesiredSetSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { newId } from "@clodei/proto/ids";
import type { InstanceId } from "@clodei/proto/ids";
import type { AttemptRecord } from "./attempt-table.ts";
import { Journal, JournalError } from "./journal.ts";
import type { NewStatus, NewUsage } from "./journal.ts";

const instanceId = newId("ins");

function status(phase: AttemptPhase, message = "", id: InstanceId = instanceId): NewStatus {
  return {
    instanceId: id,
    attempt: 1,
    phase,
    reason: InstanceReason.UNSPECIFIED,
    message,
    imageDigest: "",
    imageId: "",
  };
}

function usage(begin: bigint, end: bigint): NewUsage {
  return { instanceId, attempt: 1, bootId: "boot", beginMonotonicMs: begin, endMonotonicMs: end };
}

function record(part: Partial<AttemptRecord> = {}): AttemptRecord {
  return {
    instanceId,
    attempt: 1,
    phase: "running",
    stopReason: "none",
    stopTimeMs: 0,
    spec: create(ContainerSpecSchema, { image: "docker.io/library/busybox:latest" }),
    bootId: "boot",
    meteredMs: 5n,
    startedMs: 4n,
    reportSequence: 0n,
    ...part,
  };
}

async function withPath(work: (path: string) => Promise<void> | void): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-journal-"));
  try {
    await work(join(folder, "journal.db"));
  } finally {
    await rm(folder, { recursive: true });
  }
}

describe("the journal", () => {
  it("numbers entries without gaps, gives them back in order, and goes on after a restart", async () => {
    await withPath((path) => {
      let id = "";
      {
        using journal = Journal.open(path);
        id = journal.id;
        assert.equal(journal.write({ statuses: [status(AttemptPhase.CREATING), status(AttemptPhase.RUNNING)] }), 2n);
        assert.equal(journal.write({ usage: [usage(0n, 10n)], attempts: [record()] }), 3n);
      }
      using journal = Journal.open(path);
      assert.equal(journal.id, id);
      assert.deepEqual(
        journal.pendingAfter(0n, 10).map(({ sequence, kind }) => [sequence, kind]),
        [
          [1n, "status"],
          [2n, "status"],
          [3n, "usage"],
        ],
      );
      assert.equal(journal.write({ statuses: [status(AttemptPhase.ENDED)] }), 4n);
      assert.deepEqual(journal.attempts(), [record({ reportSequence: 3n })]);
    });
  });

  it("drops what was acknowledged and nothing else, and never uses a number again", async () => {
    await withPath((path) => {
      {
        using journal = Journal.open(path);
        journal.write({
          statuses: [status(AttemptPhase.CREATING), status(AttemptPhase.RUNNING), status(AttemptPhase.ENDED)],
        });
        journal.acknowledge(2n);
        assert.deepEqual(
          journal.pendingAfter(0n, 10).map(({ sequence }) => sequence),
          [3n],
        );
        journal.acknowledge(3n);
      }
      using journal = Journal.open(path);
      assert.equal(journal.acknowledged, 3n);
      assert.equal(journal.pendingCount(), 0);
      assert.equal(journal.write({ statuses: [status(AttemptPhase.CREATING)] }), 4n);
      assert.throws(() => journal.acknowledge(9n), JournalError);
    });
  });

  it("lets progress and usage grow in place until they may have been sent", async () => {
    await withPath((path) => {
      using journal = Journal.open(path);
      journal.write({ statuses: [status(AttemptPhase.PULLING, "1")] });
      journal.write({ statuses: [status(AttemptPhase.PULLING, "2")], usage: [usage(0n, 10n)] });
      journal.write({ usage: [usage(10n, 20n)] });
      const [pulling, ran] = journal.pendingAfter(0n, 10);
      assert.equal(pulling?.kind === "status" && pulling.status.message, "2");
      assert.deepEqual(ran?.kind === "usage" && [ran.interval.beginMonotonicMs, ran.interval.endMonotonicMs], [
        0n,
        20n,
      ]);
      // They were handed out: from here on they stand as they are.
      journal.write({ statuses: [status(AttemptPhase.PULLING, "3")], usage: [usage(20n, 30n)] });
      assert.equal(journal.lastSequence, 4n);
      // A gap in the time, or another boot, is another interval.
      journal.write({ usage: [usage(35n, 40n)] });
      assert.equal(journal.lastSequence, 5n);
    });
  });

  it("does not let progress overtake a status that came after it", async () => {
    await withPath((path) => {
      using journal = Journal.open(path);
      for (const phase of [AttemptPhase.PULLING, AttemptPhase.ENDED, AttemptPhase.PULLING])
        journal.write({ statuses: [status(phase)] });
      assert.equal(journal.lastSequence, 3n);
    });
  });

  it("keeps the desired set, the session secret, the node and its standing", async () => {
    await withPath((path) => {
      {
        using journal = Journal.open(path);
        assert.equal(journal.desiredSet(), undefined);
        journal.saveDesiredSet(
          create(DesiredSetSchema, { generation: 7n, instances: [{ instanceId, attempt: 2, state: 1 }] }),
        );
        assert.equal(journal.highestGeneration(), 7n);
        journal.saveDesiredSet(create(DesiredSetSchema, { generation: 6n }));
        journal.saveSessionSecret(new Uint8Array([1, 2, 3]));
        journal.saveStanding("enrollment-1", "revoked");
        journal.saveNodeId("nod_1");
      }
      using journal = Journal.open(path);
      assert.equal(journal.desiredSet()?.generation, 6n);
      assert.equal(journal.highestGeneration(), 7n);
      assert.deepEqual([...journal.sessionSecret()], [1, 2, 3]);
      assert.equal(journal.standing("enrollment-1"), "revoked");
      assert.equal(journal.standing("enrollment-2"), "none");
      assert.equal(journal.nodeId(), "nod_1");
    });
  });

  it("begins under a new name when the control plane knows more of it than it holds", async () => {
    await withPath((path) => {
      using journal = Journal.open(path);
      const id = journal.id;
      journal.write({
        statuses: [status(AttemptPhase.CREATING), status(AttemptPhase.RUNNING)],
        usage: [usage(0n, 1n)],
        attempts: [record()],
      });
      journal.acknowledge(1n);
      journal.renew();
      assert.notEqual(journal.id, id);
      assert.deepEqual(
        journal.pendingAfter(0n, 10).map(({ sequence, kind }) => [sequence, kind]),
        [
          [1n, "status"],
          [2n, "usage"],
        ],
      );
      assert.equal(journal.attempts()[0]?.reportSequence, 2n);
    });
  });

  it("refuses a damaged file instead of forgetting what it held", async () => {
    await withPath(async (path) => {
      {
        using journal = Journal.open(path);
        for (let index = 0; index < 200; index++)
          journal.write({ statuses: [status(AttemptPhase.RUNNING, "x".repeat(500))] });
      }
      const file = await open(path, "r+");
      await file.write(Buffer.alloc(8192, 0xff), 0, 8192, Math.floor((await stat(path)).size / 2 / 4096) * 4096);
      await file.close();
      assert.throws(() => Journal.open(path));
    });
  });

  it("loses nothing on a full disk, says so, and goes on when there is room", async () => {
    await withPath((path) => {
      using journal = Journal.open(path);
      journal.write({ statuses: [status(AttemptPhase.CREATING)] });
      // A limit of SQLite's own gives the same error as a full disk, at the same places.
      journal.limitPages(16);
      assert.throws(() => {
        for (let index = 0; index < 500; index++)
          journal.write({ statuses: [status(AttemptPhase.RUNNING, "x".repeat(2000))], attempts: [record()] });
      }, JournalError);
      assert.notEqual(journal.failure, undefined);
      const written = journal.lastSequence;
      assert.equal(journal.pendingAfter(0n, 1000).at(-1)?.sequence, written);
      journal.limitPages(1_000_000);
      assert.equal(journal.write({ statuses: [status(AttemptPhase.ENDED)] }), written + 1n);
      assert.equal(journal.failure, undefined);
    });
  });
});

const appender = `
import { Journal } from ${JSON.stringify(import.meta.resolve("./journal.ts"))};
const [path, instanceId] = process.argv.slice(1);
const journal = Journal.open(path);
for (;;) {
  const sequence = journal.write({
    statuses: [{ instanceId, attempt: 1, phase: 3, reason: 0, message: "", imageDigest: "", imageId: "" }],
    attempts: [{ instanceId, attempt: 1, phase: "running", stopReason: "none", stopTimeMs: 0, spec: undefined, bootId: "b", meteredMs: journal.lastSequence, startedMs: 1n, reportSequence: 0n }],
  });
  process.stdout.write(sequence + "\\n");
  if (sequence % 7n === 0n) journal.acknowledge(sequence - 3n);
}
`;

describe("the journal of an agent that is killed", () => {
  it("holds everything that was reported as written, six times over", { timeout: 60_000 }, async () => {
    await withPath(async (path) => {
      let before = 0n;
      for (let round = 0; round < 6; round++) {
        const child = spawn(process.execPath, ["--input-type=module", "-e", appender, path, instanceId], {
          stdio: ["ignore", "pipe", "inherit"],
        });
        let written = before;
        const lines = createInterface({ input: child.stdout });
        lines.on("line", (line) => {
          written = BigInt(line);
          // A seeded moment, different each round, in the middle of the writing.
          if (written === before + BigInt(5 + round * 3)) child.kill("SIGKILL");
        });
        await once(child, "close");
        using journal = Journal.open(path);
        assert.ok(written > before, "the child wrote nothing");
        assert.ok(journal.lastSequence >= written, `${written} was written and ${journal.lastSequence} is there`);
        const entries = journal.pendingAfter(journal.acknowledged, 100_000);
        assert.deepEqual(
          entries.map(({ sequence }) => sequence),
          Array.from({ length: entries.length }, (_, index) => journal.acknowledged + BigInt(index) + 1n),
        );
        assert.equal(journal.acknowledged + BigInt(entries.length), journal.lastSequence);
        // Both parts of a transaction stand, or neither.
        assert.equal(journal.attempts()[0]?.meteredMs, journal.lastSequence - 1n);
        before = journal.lastSequence;
      }
      assert.ok((await readFile(path)).length > 0);
    });
  });
});
