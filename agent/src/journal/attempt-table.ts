// What the agent remembers of each attempt. It is what makes "one start an attempt" hold across crashes: the mark that
// a start was about to be made is on the disk before the engine is asked for it, and an attempt that ended stays
// known until the control plane committed its end and wants nothing of it any more.

import type { DatabaseSync } from "node:sqlite";
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { ContainerSpecSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { ContainerSpec } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { parseId } from "@clodei/proto/ids";
import type { InstanceId } from "@clodei/proto/ids";

/** How far an attempt came. Only ever moves forward. */
export type RememberedPhase = "preparing" | "starting" | "running" | "ended" | "removed";

/** Why an attempt is being stopped. */
export type StopReason = "none" | "requested" | "max_run_time" | "policy" | "gone";

/** What is remembered of an attempt. */
export interface AttemptRecord {
  readonly instanceId: InstanceId;
  readonly attempt: number;
  readonly phase: RememberedPhase;
  readonly stopReason: StopReason;
  /** When the stop began, by the wall clock; 0 if it did not. */
  readonly stopTimeMs: number;
  /** What was validated and created: an attempt's specification never changes. Absent: it never came to that. */
  readonly spec: ContainerSpec | undefined;
  /** The boot whose clock `meteredMs` is of; empty before the start. */
  readonly bootId: string;
  /** Where the next usage interval begins, on the boot's clock. */
  readonly meteredMs: bigint;
  /** When the container started, on the boot's clock; 0 before. */
  readonly startedMs: bigint;
  /** Where the journal stood when this was written; the journal sets it. */
  readonly reportSequence: bigint;
}

/** The table `attempts`. */
export class AttemptTable {
  readonly #database: DatabaseSync;

  constructor(database: DatabaseSync) {
    this.#database = database;
  }

  all(): AttemptRecord[] {
    return this.#database
      .prepare(
        "select instance_id, attempt, phase, stop_reason, stop_time_ms, spec, boot_id, metered_ms, started_ms, report_sequence from attempts order by instance_id, attempt",
      )
      .all()
      .map(recordOf);
  }

  save(record: AttemptRecord): void {
    this.#database
      .prepare(
        `insert into attempts (instance_id, attempt, phase, stop_reason, stop_time_ms, spec, boot_id, metered_ms, started_ms, report_sequence)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
         on conflict (instance_id, attempt) do update set phase = excluded.phase, stop_reason = excluded.stop_reason,
           stop_time_ms = excluded.stop_time_ms, spec = excluded.spec, boot_id = excluded.boot_id,
           metered_ms = excluded.metered_ms, started_ms = excluded.started_ms, report_sequence = excluded.report_sequence`,
      )
      .run(
        record.instanceId,
        record.attempt,
        record.phase,
        record.stopReason,
        record.stopTimeMs,
        record.spec === undefined ? new Uint8Array() : toBinary(ContainerSpecSchema, record.spec),
        record.bootId,
        record.meteredMs,
        record.startedMs,
        record.reportSequence,
      );
  }

  remove(keys: readonly { readonly instanceId: InstanceId; readonly attempt: number }[]): void {
    const statement = this.#database.prepare("delete from attempts where instance_id = ? and attempt = ?");
    for (const { instanceId, attempt } of keys) statement.run(instanceId, attempt);
  }

  /** The journal's numbers began anew: every attempt counts as reported at `sequence`. */
  moveReports(sequence: bigint): void {
    this.#database.prepare("update attempts set report_sequence = ?").run(sequence);
  }
}

const phases: readonly RememberedPhase[] = ["preparing", "starting", "running", "ended", "removed"];
const stopReasons: readonly StopReason[] = ["none", "requested", "max_run_time", "policy", "gone"];

function recordOf(row: Record<string, unknown>): AttemptRecord {
  const text = (name: string): string => {
    const value = row[name];
    if (typeof value !== "string") throw new Error(`the journal's column ${name} is malformed`);
    return value;
  };
  const integer = (name: string): bigint => {
    const value = row[name];
    if (typeof value !== "bigint") throw new Error(`the journal's column ${name} is malformed`);
    return value;
  };
  const instanceId = parseId("ins", text("instance_id"));
  const phase = phases.find((candidate) => candidate === text("phase"));
  const stopReason = stopReasons.find((candidate) => candidate === text("stop_reason"));
  const spec = row["spec"];
  if (instanceId === undefined || phase === undefined || stopReason === undefined || !(spec instanceof Uint8Array)) {
    throw new Error("the journal holds a malformed attempt");
  }
  return {
    instanceId,
    attempt: Number(integer("attempt")),
    phase,
    stopReason,
    stopTimeMs: Number(integer("stop_time_ms")),
    spec: spec.length === 0 ? undefined : fromBinary(ContainerSpecSchema, spec),
    bootId: text("boot_id"),
    meteredMs: integer("metered_ms"),
    startedMs: integer("started_ms"),
    reportSequence: integer("report_sequence"),
  };
}
