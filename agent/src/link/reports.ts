// Sends what the journal holds, in order, and again after every reconnect until it is acknowledged. At most a window
// of entries is on its way, so a control plane that cannot commit does not collect a queue in its memory.

import { create } from "@bufbuild/protobuf";
import { StatusReportSchema, UsageReportSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { JournalEntry } from "../journal/entry.ts";
import type { Journal } from "../journal/journal.ts";
import type { Outbox, SessionMessage } from "./outbox.ts";

/** The contract's limit on one report. */
const maxEntriesPerReport = 256;
/** Entries on their way without an acknowledgment. */
const maxUnacknowledged = 1024n;
/** So many messages may wait to be written before reports wait in the journal instead. */
const maxQueued = 8;

/** The reports of one session. */
export class Reports {
  readonly #journal: Journal;
  readonly #outbox: Outbox;
  #sent: bigint;

  constructor(journal: Journal, outbox: Outbox) {
    this.#journal = journal;
    this.#outbox = outbox;
    this.#sent = journal.acknowledged;
  }

  /** Sends what there is room for. Called when there is something new, more room, or an acknowledgment. */
  send(): void {
    while (this.#outbox.length < maxQueued && this.#sent - this.#journal.acknowledged < maxUnacknowledged) {
      const entries = this.#journal.pendingAfter(this.#sent, maxEntriesPerReport);
      if (entries.length === 0) return;
      for (const message of reportsOf(entries)) {
        if (!this.#outbox.push(message)) return;
        if (message.case === "statusReport" || message.case === "usageReport") this.#sent = message.value.sequence;
      }
    }
  }
}

/** Entries as reports: neighbors of one kind together, the order as it was. */
export function reportsOf(entries: readonly JournalEntry[]): SessionMessage[] {
  const messages: SessionMessage[] = [];
  for (let begin = 0; begin < entries.length;) {
    const kind = entries[begin]?.kind;
    let end = begin + 1;
    while (end < entries.length && entries[end]?.kind === kind) end += 1;
    messages.push(reportOf(entries.slice(begin, end)));
    begin = end;
  }
  return messages;
}

function reportOf(entries: readonly JournalEntry[]): SessionMessage {
  const sequence = entries.at(-1)?.sequence ?? 0n;
  const statuses = entries.flatMap((entry) => (entry.kind === "status" ? [entry.status] : []));
  if (statuses.length > 0) return { case: "statusReport", value: create(StatusReportSchema, { sequence, statuses }) };
  const intervals = entries.flatMap((entry) => (entry.kind === "usage" ? [entry.interval] : []));
  return { case: "usageReport", value: create(UsageReportSchema, { sequence, intervals }) };
}
