// What agents report, applied in the transaction that advances their journal: the acknowledgement is sent after its
// commit, so an agent never forgets what we do not have. A report that comes again changes nothing.
import { timestampDate } from "@bufbuild/protobuf/wkt";
import type { StatusReport, UsageInterval, UsageReport } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { parseId, type InstanceId, type NodeId } from "@clodei/proto/ids";
import type { AttemptsOnNode, InstancesService } from "../instances/service.ts";
import type { Log } from "../platform/log.ts";
import type { SystemTx } from "../platform/database.ts";
import { dispatchLimits } from "./limits.ts";
import type { DispatchMetrics } from "./metrics.ts";
import { planReport, type ReportPlan } from "./model.ts";
import { advanceWatermark, insertUsageIntervals, lockWatermark, pruneJournals, type UsageRow } from "./store.ts";

/** Whose journal a report belongs to. */
export type JournalOf = { readonly nodeId: NodeId; readonly journalId: string };

/** What came of a report. */
export type ReportOutcome = {
  /** Up to where the journal is committed. */
  readonly watermark: bigint;
  /** Whether the report did not continue the journal. */
  readonly gap: boolean;
  readonly applied: number;
  readonly replayed: number;
  /** Entries about instances that are not the node's. Left out, and past the watermark: they would never become the node's. */
  readonly foreign: number;
};

/** Applies statuses. The caller acknowledges the watermark after the commit. */
export async function applyStatusReport(
  tx: SystemTx,
  instances: InstancesService,
  journal: JournalOf,
  report: StatusReport,
  now: Date,
): Promise<ReportOutcome> {
  return applyEntries(tx, journal, report.statuses, now, async (statuses) => {
    const { foreign } = await instances.applyStatuses(tx, journal.nodeId, statuses);
    return foreign;
  });
}

/** Adds intervals to the record. The caller acknowledges the watermark after the commit. */
export async function applyUsageReport(
  tx: SystemTx,
  instances: InstancesService,
  journal: JournalOf,
  report: UsageReport,
  now: Date,
): Promise<ReportOutcome> {
  return applyEntries(tx, journal, report.intervals, now, async (intervals) => {
    const named = intervals.flatMap(({ instanceId }) => parseId("ins", instanceId) ?? []);
    const owned = await instances.attemptsOnNode(tx, journal.nodeId, [...new Set(named)]);
    const rows = intervals.flatMap((interval) => toUsageRow(journal, interval, owned) ?? []);
    if (rows.length > 0) await insertUsageIntervals(tx, rows, now);
    return intervals.length - rows.length;
  });
}

/** Counts what came of a report, after its commit, and logs what no honest agent does. */
export function noteReport(
  kind: "status" | "usage",
  outcome: ReportOutcome,
  nodeId: NodeId,
  metrics: DispatchMetrics,
  log: Log,
): void {
  metrics.reportEntries.inc({ kind, outcome: "applied" }, outcome.applied);
  metrics.reportEntries.inc({ kind, outcome: "replayed" }, outcome.replayed);
  if (outcome.gap) metrics.reportGaps.inc();
  if (outcome.foreign > 0) {
    metrics.foreignReports.inc({ kind }, outcome.foreign);
    log.warn(
      { security: "foreign_report", nodeId, kind, entries: outcome.foreign },
      "a node reported about instances that are not its own; ignored",
    );
  }
}

async function applyEntries<E extends { readonly sequence: bigint }>(
  tx: SystemTx,
  journal: JournalOf,
  entries: readonly E[],
  now: Date,
  apply: (entries: readonly E[]) => Promise<number>,
): Promise<ReportOutcome> {
  const watermark = await lockWatermark(tx, journal.nodeId, journal.journalId, now);
  const plan: ReportPlan<E> = planReport(watermark, entries);
  let foreign = 0;
  if (plan.apply.length > 0) {
    foreign = await apply(plan.apply);
    await advanceWatermark(tx, journal.nodeId, journal.journalId, plan.watermark, now);
    if (watermark === 0n) await pruneJournals(tx, journal.nodeId, dispatchLimits.maxJournalsPerNode);
  }
  return {
    watermark: plan.watermark,
    gap: plan.gap,
    applied: plan.apply.length - foreign,
    replayed: plan.replayed,
    foreign,
  };
}

/** The row of an interval, or undefined where it is of an instance that never was on this node, or ends before it begins. */
function toUsageRow(
  journal: JournalOf,
  interval: UsageInterval,
  owned: ReadonlyMap<InstanceId, AttemptsOnNode>,
): UsageRow | undefined {
  const instanceId = parseId("ins", interval.instanceId);
  const owner = instanceId === undefined ? undefined : owned.get(instanceId);
  if (instanceId === undefined || owner === undefined || interval.attempt > owner.lastAttempt) return undefined;
  if (interval.endMonotonicMs < interval.beginMonotonicMs) return undefined;
  return {
    nodeId: journal.nodeId,
    journalId: journal.journalId,
    sequence: interval.sequence,
    organizationId: owner.organizationId,
    instanceId,
    attempt: interval.attempt,
    bootId: interval.bootId,
    beginMonotonicMs: interval.beginMonotonicMs,
    endMonotonicMs: interval.endMonotonicMs,
    beginTime: interval.beginTime === undefined ? undefined : timestampDate(interval.beginTime),
  };
}
