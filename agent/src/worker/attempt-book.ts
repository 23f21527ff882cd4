// What the agent remembers of its attempts, in memory and in the journal at once: a change is on the disk before
// anybody can see it here. Every status and every usage interval goes through this file.

import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { Timestamp } from "@bufbuild/protobuf/wkt";
import { AttemptPhase } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import type { AttemptRecord } from "../journal/attempt-table.ts";
import type { Journal, NewStatus, NewUsage } from "../journal/journal.ts";
import type { BootClock } from "./boot-clock.ts";
import { keyText } from "./model.ts";
import type { AttemptKey } from "./model.ts";

/** The parts of a status that differ. */
export type StatusPart = Partial<Omit<NewStatus, "instanceId" | "attempt" | "phase" | "time">>;

// The contract's limit on a status' message.
const maxMessageLength = 2048;

/** The attempts that this node knows. */
export class AttemptBook {
  readonly #journal: Journal;
  readonly #clock: BootClock;
  readonly #records = new Map<string, AttemptRecord>();

  constructor(journal: Journal, clock: BootClock) {
    this.#journal = journal;
    this.#clock = clock;
    for (const record of journal.attempts()) this.#records.set(keyText(record), record);
  }

  get(key: AttemptKey): AttemptRecord | undefined {
    return this.#records.get(keyText(key));
  }

  all(): readonly AttemptRecord[] {
    return [...this.#records.values()];
  }

  /** Changes what is remembered, with the statuses that tell it. Throws JournalError, and then nothing changed. */
  change(
    key: AttemptKey,
    part: Partial<AttemptRecord>,
    phase?: AttemptPhase,
    status: StatusPart = {},
    usage: readonly NewUsage[] = [],
  ): void {
    const record: AttemptRecord = { ...(this.get(key) ?? blank(key)), ...part };
    const reportSequence = this.#journal.write({
      attempts: [record],
      ...(phase === undefined ? {} : { statuses: [statusOf(key, phase, status)] }),
      ...(usage.length === 0 ? {} : { usage }),
    });
    this.#records.set(keyText(key), { ...record, reportSequence });
  }

  /** Reports progress without remembering anything. */
  report(key: AttemptKey, phase: AttemptPhase, status: StatusPart): void {
    this.#journal.write({ statuses: [statusOf(key, phase, status)] });
  }

  /** Workspace and logs are gone: every attempt of the instance is over. */
  removeInstance(key: AttemptKey): void {
    const records = this.all().filter(({ instanceId }) => instanceId === key.instanceId);
    const named =
      records.some(({ attempt }) => attempt === key.attempt) || key.attempt === 0 ? records : [...records, blank(key)];
    const removed = named.map((record): AttemptRecord => ({ ...record, phase: "removed" }));
    // Attempt 0 stands for a folder without a known attempt: there is nobody to tell.
    const statuses = key.attempt === 0 ? [] : [statusOf(key, AttemptPhase.REMOVED, {})];
    if (removed.length === 0 && statuses.length === 0) return;
    const reportSequence = this.#journal.write({ attempts: removed, statuses });
    for (const record of removed) this.#records.set(keyText(record), { ...record, reportSequence });
  }

  forget(keys: readonly AttemptKey[]): void {
    this.#journal.forget(keys);
    for (const key of keys) this.#records.delete(keyText(key));
  }

  /** Journals that these attempts ran until the given times of the boot's clock. */
  meter(seen: ReadonlyMap<string, number>): void {
    const usage: NewUsage[] = [];
    const attempts: AttemptRecord[] = [];
    for (const [text, seenMs] of seen) {
      const record = this.#records.get(text);
      if (record?.phase !== "running") continue;
      const interval = this.intervalUntil(record, seenMs);
      if (interval === undefined) continue;
      usage.push(interval);
      attempts.push({ ...record, meteredMs: interval.endMonotonicMs });
    }
    if (usage.length === 0) return;
    const reportSequence = this.#journal.write({ usage, attempts });
    for (const record of attempts) this.#records.set(keyText(record), { ...record, reportSequence });
  }

  /** The interval from where the last one ended; undefined where no time passed or the boot is another. */
  intervalUntil(record: AttemptRecord, endMs: number): NewUsage | undefined {
    const end = BigInt(Math.floor(Math.min(endMs, this.#clock.nowMs())));
    // What another boot measured ended with it: nobody can prove how long it went on after the last interval.
    if (record.bootId !== this.#clock.bootId || end <= record.meteredMs) return undefined;
    return {
      instanceId: record.instanceId,
      attempt: record.attempt,
      bootId: record.bootId,
      beginMonotonicMs: record.meteredMs,
      endMonotonicMs: end,
      beginTime: this.wallTimeOf(Number(record.meteredMs)),
    };
  }

  /** A time of the engine's wall clock on the boot's clock, which the clocks' present difference tells. */
  bootTimeOf(time: Date): number {
    return this.#clock.nowMs() - (Date.now() - time.getTime());
  }

  wallTimeOf(bootMs: number): Timestamp {
    return timestampFromDate(new Date(Date.now() - (this.#clock.nowMs() - bootMs)));
  }
}

function blank(key: AttemptKey): AttemptRecord {
  return {
    instanceId: key.instanceId,
    attempt: key.attempt,
    phase: "preparing",
    stopReason: "none",
    stopTimeMs: 0,
    spec: undefined,
    bootId: "",
    meteredMs: 0n,
    startedMs: 0n,
    reportSequence: 0n,
  };
}

function statusOf(key: AttemptKey, phase: AttemptPhase, part: StatusPart): NewStatus {
  return {
    reason: InstanceReason.UNSPECIFIED,
    imageDigest: "",
    imageId: "",
    ...part,
    message: (part.message ?? "").slice(0, maxMessageLength),
    instanceId: key.instanceId,
    attempt: key.attempt,
    phase,
    time: timestampFromDate(new Date()),
  };
}
