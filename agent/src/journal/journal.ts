// The agent's durable memory, in SQLite: what must be reported and is not acknowledged yet, what shall run, and what
// became of each attempt. Every write is one transaction that is on the disk when it returns.
//
// WAL with synchronous=FULL: one flush a commit (the rollback journal needs three), and durable as well, because FULL
// flushes the WAL at each commit. The locking mode is exclusive: the state folder's lock keeps others out anyway, and
// without a second process SQLite needs no shared-memory file.

import { randomBytes } from "node:crypto";
import { DatabaseSync } from "node:sqlite";
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import {
  AttemptPhase,
  AttemptStatusSchema,
  DesiredSetSchema,
  UsageIntervalSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { AttemptStatus, DesiredSet, UsageInterval } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { InstanceId } from "@clodei/proto/ids";
import { AttemptTable } from "./attempt-table.ts";
import type { AttemptRecord } from "./attempt-table.ts";
import { entryOf, payloadOf } from "./entry.ts";
import type { JournalEntry } from "./entry.ts";
import { schema, schemaVersion } from "./schema.ts";

/** What to write, without the sequence, which the journal gives. */
export type NewStatus = Omit<AttemptStatus, "$typeName" | "$unknown" | "sequence">;
export type NewUsage = Omit<UsageInterval, "$typeName" | "$unknown" | "sequence">;

/** Whether the control plane lets this node work. */
export type Standing = "none" | "quarantined" | "revoked";

/** What one transaction writes. */
export interface JournalWrite {
  readonly statuses?: readonly NewStatus[];
  readonly usage?: readonly NewUsage[];
  readonly attempts?: readonly AttemptRecord[];
}

/** The journal could not be written: the disk is full or broken. Nothing of the write stands. */
export class JournalError extends Error {
  override readonly name = "JournalError";
}

/**
 * From so many entries on the node takes no new work, and no attempt that it has not heard of, not even to say that it
 * is over. What it knows still reports its end: repeated progress and usage take no new rows while nobody listens, so
 * there is an end to that too.
 */
export const maxPendingEntries = 100_000;

/** Acknowledgments are written down at most this often: one that is lost costs a repeated report, nothing else. */
const acknowledgeEveryMs = 250;

/** The journal of one state folder. */
export class Journal implements Disposable {
  readonly #database: DatabaseSync;
  readonly #attempts: AttemptTable;
  readonly #listeners = new Set<() => void>();
  #id: string;
  #lastSequence: bigint;
  #acknowledged: bigint;
  /** Entries up to here may have been sent. After a start nobody knows, so it is the last one. */
  #offered: bigint;
  #acknowledgeTimer: NodeJS.Timeout | undefined;
  #failure: string | undefined;

  private constructor(database: DatabaseSync) {
    this.#database = database;
    this.#attempts = new AttemptTable(database);
    this.#id = this.#readText("journal_id") ?? this.#begin();
    this.#acknowledged = BigInt(this.#readText("acknowledged") ?? "0");
    this.#lastSequence = BigInt(this.#readText("last_sequence") ?? "0");
    this.#offered = this.#lastSequence;
  }

  /** Opens the journal or makes a new one. Throws where it is damaged: that is for a person to judge. */
  static open(path: string): Journal {
    const database = new DatabaseSync(path, { timeout: 0, readBigInts: true });
    try {
      database.exec("pragma locking_mode = exclusive; pragma journal_mode = wal; pragma synchronous = full;");
      const [check] = database.prepare("pragma quick_check(1)").all();
      if (check?.["quick_check"] !== "ok")
        throw new JournalError(`the journal ${path} is damaged: ${String(check?.["quick_check"])}`);
      migrate(database, path);
      return new Journal(database);
    } catch (error) {
      database.close();
      throw error;
    }
  }

  /** Names this journal: its sequence numbers mean something only together with it. */
  get id(): string {
    return this.#id;
  }

  /** The last sequence number that was written; 0 if none. */
  get lastSequence(): bigint {
    return this.#lastSequence;
  }

  /** Everything up to here is committed by the control plane. */
  get acknowledged(): bigint {
    return this.#acknowledged;
  }

  /** Why the last write failed; undefined while the journal can be written. */
  get failure(): string | undefined {
    return this.#failure;
  }

  /** Calls `listener` when there is something new to report. */
  onAppend(listener: () => void): Disposable {
    this.#listeners.add(listener);
    return { [Symbol.dispose]: () => void this.#listeners.delete(listener) };
  }

  /**
   * Writes statuses, usage and attempts in one transaction, and returns the last sequence number. When it returns,
   * all of it is on the disk; when it throws JournalError, none of it is.
   */
  write(write: JournalWrite): bigint {
    const before = this.#lastSequence;
    try {
      this.#database.exec("begin immediate");
      for (const status of write.statuses ?? []) this.#appendStatus(status);
      for (const interval of write.usage ?? []) this.#appendUsage(interval);
      // An attempt that ended is remembered until its end is acknowledged: note where that stands.
      for (const attempt of write.attempts ?? [])
        this.#attempts.save({ ...attempt, reportSequence: this.#lastSequence });
      if (this.#lastSequence !== before) this.#saveText("last_sequence", this.#lastSequence.toString());
      this.#database.exec("commit");
      this.#failure = undefined;
    } catch (error) {
      this.#lastSequence = before;
      this.#fail(error);
    }
    if (write.statuses !== undefined || write.usage !== undefined) for (const listener of this.#listeners) listener();
    return this.#lastSequence;
  }

  /** Entries after `sequence` in order, at most `limit`. They count as sent from now on. */
  pendingAfter(sequence: bigint, limit: number): JournalEntry[] {
    const from = sequence > this.#acknowledged ? sequence : this.#acknowledged;
    const rows = this.#database
      .prepare("select sequence, kind, payload from entries where sequence > ? order by sequence limit ?")
      .all(from, limit);
    const entries = rows.map(entryOf);
    const last = entries.at(-1)?.sequence ?? 0n;
    if (last > this.#offered) this.#offered = last;
    return entries;
  }

  /** How many entries wait for their acknowledgment. */
  pendingCount(): number {
    const row = this.#database.prepare("select count(*) as n from entries where sequence > ?").get(this.#acknowledged);
    return Number(row?.["n"] ?? 0);
  }

  /** Everything up to `sequence` is committed: it is deleted, at the latest a moment later. */
  acknowledge(sequence: bigint): void {
    if (sequence <= this.#acknowledged) return;
    if (sequence > this.#lastSequence)
      throw new JournalError(`acknowledged ${sequence}, but only ${this.#lastSequence} was written`);
    this.#acknowledged = sequence;
    this.#acknowledgeTimer ??= setTimeout(() => this.#truncateQuietly(), acknowledgeEveryMs).unref();
  }

  /**
   * The control plane committed more of this journal than it holds: the state folder is an older copy. What waits is
   * written again under a new name, from 1, so that no number means two things.
   */
  renew(): void {
    const entries = this.pendingAfter(0n, Number.MAX_SAFE_INTEGER);
    const before = this.#lastSequence;
    try {
      this.#transaction(() => this.#beginAnew(entries));
    } catch (error) {
      this.#lastSequence = before;
      throw error;
    }
    this.#id = this.#readText("journal_id") ?? "";
    this.#acknowledged = 0n;
    this.#offered = this.#lastSequence;
  }

  /** The last desired set, or undefined if none ever came. */
  desiredSet(): DesiredSet | undefined {
    const row = this.#database.prepare("select payload from desired_set").get();
    const payload = row?.["payload"];
    return payload instanceof Uint8Array ? fromBinary(DesiredSetSchema, payload) : undefined;
  }

  /** The highest generation of a desired set that was ever kept; 0 if none was. */
  highestGeneration(): bigint {
    // A journal of an earlier agent holds the last set alone, which was the highest.
    return BigInt(this.#readText("highest_generation") ?? this.desiredSet()?.generation ?? 0n);
  }

  /** Keeps the desired set. */
  saveDesiredSet(set: DesiredSet): void {
    this.#transaction(() => {
      const highest = this.highestGeneration();
      this.#saveText("highest_generation", String(set.generation > highest ? set.generation : highest));
      this.#database
        .prepare(
          "insert into desired_set (id, payload) values (1, ?) on conflict (id) do update set payload = excluded.payload",
        )
        .run(toBinary(DesiredSetSchema, set));
    });
  }

  /** Every attempt that is remembered. */
  attempts(): AttemptRecord[] {
    return this.#attempts.all();
  }

  /** Forgets attempts. */
  forget(keys: readonly { readonly instanceId: InstanceId; readonly attempt: number }[]): void {
    if (keys.length > 0) this.#transaction(() => this.#attempts.remove(keys));
  }

  /** The session secret of the last Welcome. */
  sessionSecret(): Uint8Array<ArrayBuffer> {
    return new Uint8Array(Buffer.from(this.#readText("session_secret") ?? "", "base64"));
  }

  /** Keeps the session secret. */
  saveSessionSecret(secret: Uint8Array): void {
    this.#transaction(() => this.#saveText("session_secret", Buffer.from(secret).toString("base64")));
  }

  /** What the control plane last said of this enrollment's standing: a restart must not forget a revocation. */
  standing(enrollmentId: string): Standing {
    const [standing, of] = (this.#readText("standing") ?? "").split(" ");
    return of === enrollmentId && (standing === "revoked" || standing === "quarantined") ? standing : "none";
  }

  /** Keeps the standing. */
  saveStanding(enrollmentId: string, standing: Standing): void {
    if (this.standing(enrollmentId) !== standing)
      this.#transaction(() => this.#saveText("standing", `${standing} ${enrollmentId}`));
  }

  /** The node that wrote here. A journal is one node's: another identity begins a new one. */
  nodeId(): string | undefined {
    return this.#readText("node_id");
  }

  /** Makes the journal this node's. */
  saveNodeId(nodeId: string): void {
    this.#transaction(() => this.#saveText("node_id", nodeId));
  }

  /** Bounds the file, in pages of 4 KiB: what SQLite does at this limit it does on a full disk. */
  limitPages(pages: number): void {
    this.#database.exec(`pragma max_page_count = ${Math.floor(pages)}`);
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#acknowledgeTimer);
    this.#truncateQuietly();
    this.#database.close();
  }

  #appendStatus(status: NewStatus): void {
    const replaced =
      status.phase === AttemptPhase.PULLING ? this.#unsentRow("status", status.instanceId, status.attempt) : undefined;
    const latest = replaced === undefined ? undefined : fromBinary(AttemptStatusSchema, replaced.payload);
    // Progress of a pull that nobody was told about yet is overtaken by later progress.
    if (replaced !== undefined && latest?.phase === AttemptPhase.PULLING) {
      const payload = toBinary(
        AttemptStatusSchema,
        create(AttemptStatusSchema, { ...status, sequence: replaced.sequence }),
      );
      this.#database.prepare("update entries set payload = ? where sequence = ?").run(payload, replaced.sequence);
      return;
    }
    this.#insert(
      "status",
      (sequence) => toBinary(AttemptStatusSchema, create(AttemptStatusSchema, { ...status, sequence })),
      status,
    );
  }

  #appendUsage(interval: NewUsage): void {
    const row = this.#unsentRow("usage", interval.instanceId, interval.attempt);
    const latest = row === undefined ? undefined : fromBinary(UsageIntervalSchema, row.payload);
    // An interval that was never sent grows in place: a week without the control plane is one row, not 60,000.
    if (
      row !== undefined &&
      latest?.bootId === interval.bootId &&
      latest.endMonotonicMs === interval.beginMonotonicMs
    ) {
      const payload = toBinary(
        UsageIntervalSchema,
        create(UsageIntervalSchema, { ...latest, endMonotonicMs: interval.endMonotonicMs }),
      );
      this.#database.prepare("update entries set payload = ? where sequence = ?").run(payload, row.sequence);
      return;
    }
    this.#insert(
      "usage",
      (sequence) => toBinary(UsageIntervalSchema, create(UsageIntervalSchema, { ...interval, sequence })),
      interval,
    );
  }

  #unsentRow(kind: string, instanceId: string, attempt: number): { sequence: bigint; payload: Uint8Array } | undefined {
    const row = this.#database
      .prepare(
        "select sequence, payload from entries where instance_id = ? and attempt = ? and kind = ? and sequence > ? order by sequence desc limit 1",
      )
      .get(instanceId, attempt, kind, this.#offered);
    const sequence = row?.["sequence"];
    const payload = row?.["payload"];
    return typeof sequence === "bigint" && payload instanceof Uint8Array ? { sequence, payload } : undefined;
  }

  #insert(
    kind: JournalEntry["kind"],
    payload: (sequence: bigint) => Uint8Array,
    key?: { instanceId: string; attempt: number },
  ): void {
    this.#lastSequence += 1n;
    this.#database
      .prepare("insert into entries (sequence, kind, instance_id, attempt, payload) values (?, ?, ?, ?, ?)")
      .run(this.#lastSequence, kind, key?.instanceId ?? "", key?.attempt ?? 0, payload(this.#lastSequence));
  }

  #beginAnew(entries: readonly JournalEntry[]): void {
    this.#database.exec("delete from entries");
    this.#lastSequence = 0n;
    for (const entry of entries) this.#insert(entry.kind, (sequence) => payloadOf(entry, sequence));
    this.#saveText("acknowledged", "0");
    this.#saveText("last_sequence", this.#lastSequence.toString());
    this.#attempts.moveReports(this.#lastSequence);
    this.#newId();
  }

  #truncateQuietly(): void {
    this.#acknowledgeTimer = undefined;
    try {
      // Not flushed: if it is lost, what was acknowledged is reported once more.
      this.#database.exec("pragma synchronous = normal");
      this.#transaction(() => {
        this.#database.prepare("delete from entries where sequence <= ?").run(this.#acknowledged);
        this.#saveText("acknowledged", this.#acknowledged.toString());
      });
    } catch {
      // The failure is noted, and the next acknowledgment tries again.
    } finally {
      this.#database.exec("pragma synchronous = full");
    }
  }

  #transaction(work: () => void): void {
    try {
      this.#database.exec("begin immediate");
      work();
      this.#database.exec("commit");
      this.#failure = undefined;
    } catch (error) {
      this.#fail(error);
    }
  }

  #fail(error: unknown): never {
    // A full disk rolls back by itself; then there is no transaction to roll back.
    if (this.#database.isTransaction) this.#database.exec("rollback");
    this.#failure = error instanceof Error ? error.message : "unknown";
    throw new JournalError(`the journal cannot be written: ${this.#failure}`, { cause: error });
  }

  #begin(): string {
    let id = "";
    this.#transaction(() => {
      id = this.#newId();
    });
    return id;
  }

  #newId(): string {
    const id = randomBytes(16).toString("hex");
    this.#saveText("journal_id", id);
    return id;
  }

  #readText(name: string): string | undefined {
    const value = this.#database.prepare("select value from facts where name = ?").get(name)?.["value"];
    return typeof value === "string" ? value : undefined;
  }

  #saveText(name: string, value: string): void {
    this.#database
      .prepare("insert into facts (name, value) values (?, ?) on conflict (name) do update set value = excluded.value")
      .run(name, value);
  }
}

function migrate(database: DatabaseSync, path: string): void {
  const version = Number(database.prepare("pragma user_version").get()?.["user_version"] ?? 0);
  if (version > schemaVersion) throw new JournalError(`the journal ${path} was written by a newer agent`);
  if (version === schemaVersion) return;
  database.exec(`begin immediate; ${schema}; pragma user_version = ${schemaVersion}; commit`);
}
