// What the journal holds to be reported, and how it lies in a row.

import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { AttemptStatusSchema, UsageIntervalSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { AttemptStatus, UsageInterval } from "@clodei/proto/gen/clodei/node/v1/node_link_service";

/** Something to report. */
export type JournalEntry =
  | { readonly kind: "status"; readonly sequence: bigint; readonly status: AttemptStatus }
  | { readonly kind: "usage"; readonly sequence: bigint; readonly interval: UsageInterval };

/** Reads a row of `entries`. */
export function entryOf(row: Record<string, unknown>): JournalEntry {
  const { sequence, kind, payload } = row;
  if (typeof sequence !== "bigint" || !(payload instanceof Uint8Array))
    throw new Error("the journal holds a malformed row");
  return kind === "usage"
    ? { kind: "usage", sequence, interval: fromBinary(UsageIntervalSchema, payload) }
    : { kind: "status", sequence, status: fromBinary(AttemptStatusSchema, payload) };
}

/** An entry's payload under another number. */
export function payloadOf(entry: JournalEntry, sequence: bigint): Uint8Array {
  return entry.kind === "status"
    ? toBinary(AttemptStatusSchema, { ...entry.status, sequence })
    : toBinary(UsageIntervalSchema, { ...entry.interval, sequence });
}
