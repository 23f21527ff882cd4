// Instances as rows, and back. The database's checks and these functions say the same: what only one state has is
// null in every other.
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { type InstanceSpec, InstanceSpecSchema } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceId, type NodeId, type OrganizationId, parseId } from "@clodei/proto/ids";
import {
  messageOf,
  reasonOf,
  type AfterStop,
  type FailedReason,
  type Instance,
  type InstanceGpu,
  type Isolation,
  type Place,
  type State,
  type Status,
  type StoppedReason,
} from "./model.ts";

/** A row of `instances`. */
export type InstanceRow = {
  readonly id: string;
  readonly organization_id: string;
  readonly spec: Uint8Array;
  readonly created_by: string;
  readonly create_time: Date;
  readonly update_time: Date;
  readonly version: bigint;
  readonly event_count: bigint;
  readonly attempt: number;
  readonly restart_count: number;
  readonly state: State;
  readonly reason: string;
  readonly message: string;
  readonly queue_time: Date | null;
  readonly placement_deadline: Date | null;
  readonly not_before_time: Date | null;
  readonly pull_bytes_done: bigint | null;
  readonly pull_bytes_total: bigint | null;
  readonly stop_then: AfterStop | null;
  readonly attempt_ended: boolean | null;
  readonly delete_time: Date | null;
  readonly start_time: Date | null;
  readonly finish_time: Date | null;
  readonly exit_code: number | null;
  readonly image_digest: string;
  readonly image_id: string;
  readonly isolation: Isolation | null;
  readonly node_id: string | null;
  readonly placed_attempt: number | null;
  readonly node_lost: boolean;
  readonly node_reachable: boolean | null;
  readonly country: string | null;
  readonly region: string | null;
  readonly datacenter: string | null;
  readonly tier: number | null;
  readonly gpus: readonly InstanceGpu[];
};

/** The columns of InstanceRow, for select lists. */
export const instanceColumns = `id, organization_id, spec, created_by, create_time, update_time, version, event_count,
  attempt, restart_count, state, reason, message, queue_time, placement_deadline, not_before_time, pull_bytes_done,
  pull_bytes_total, stop_then, attempt_ended, delete_time, start_time, finish_time, exit_code, image_digest, image_id,
  isolation, node_id, placed_attempt, node_lost, node_reachable, country, region, datacenter, tier, gpus`;

/** Reads a row. */
export function fromRow(row: InstanceRow): Instance {
  return {
    id: instanceIdOf(row.id),
    organizationId: organizationIdOf(row.organization_id),
    spec: specFromRow(row),
    createdBy: row.created_by,
    createTime: row.create_time,
    updateTime: row.update_time,
    version: row.version,
    eventCount: row.event_count,
    attempt: row.attempt,
    restartCount: row.restart_count,
    status: statusFromRow(row),
    place: placeFromRow(row),
    gpus: row.gpus,
    startTime: row.start_time ?? undefined,
    finishTime: row.finish_time ?? undefined,
    exitCode: row.exit_code ?? undefined,
    imageDigest: row.image_digest,
    imageId: row.image_id,
    isolation: row.isolation ?? undefined,
  };
}

/** Reads the specification of a row. */
export function specFromRow({ spec }: Pick<InstanceRow, "spec">): InstanceSpec {
  return fromBinary(InstanceSpecSchema, spec);
}

/** Writes a row. */
export function toRow(instance: Instance): InstanceRow {
  const { status, place } = instance;
  const pending = status.state === "PENDING" ? status : undefined;
  const stopping = status.state === "STOPPING" ? status : undefined;
  const progress = status.state === "PULLING" ? status.progress : undefined;
  return {
    id: instance.id,
    organization_id: instance.organizationId,
    spec: toBinary(InstanceSpecSchema, instance.spec),
    created_by: instance.createdBy,
    create_time: instance.createTime,
    update_time: instance.updateTime,
    version: instance.version,
    event_count: instance.eventCount,
    attempt: instance.attempt,
    restart_count: instance.restartCount,
    state: status.state,
    reason: reasonOf(status),
    message: messageOf(status),
    queue_time: pending?.queueTime ?? null,
    placement_deadline: pending?.deadline ?? null,
    not_before_time: (status.state === "SCHEDULED" ? status.notBeforeTime : undefined) ?? null,
    pull_bytes_done: progress?.bytesDone ?? null,
    pull_bytes_total: progress?.bytesTotal ?? null,
    stop_then: stopping?.after ?? null,
    attempt_ended: stopping?.ended ?? null,
    delete_time: status.state === "DELETED" ? status.deleteTime : null,
    start_time: instance.startTime ?? null,
    finish_time: instance.finishTime ?? null,
    exit_code: instance.exitCode ?? null,
    image_digest: instance.imageDigest,
    image_id: instance.imageId,
    isolation: instance.isolation ?? null,
    node_id: place?.nodeId ?? null,
    placed_attempt: place?.attempt ?? null,
    node_lost: place?.lost ?? false,
    node_reachable: place?.reachable ?? null,
    country: place?.location.country ?? null,
    region: place?.location.region ?? null,
    datacenter: place?.location.datacenter ?? null,
    tier: place?.location.tier ?? null,
    gpus: instance.gpus,
  };
}

/** An id out of our own database. */
export function instanceIdOf(text: string): InstanceId {
  return must(parseId("ins", text), text);
}

/** An id out of our own database. */
export function nodeIdOf(text: string): NodeId {
  return must(parseId("nod", text), text);
}

/** An id out of our own database. */
export function organizationIdOf(text: string): OrganizationId {
  return must(parseId("org", text), text);
}

function statusFromRow(row: InstanceRow): Status {
  const { state, message } = row;
  switch (state) {
    case "PENDING":
      return {
        state,
        queueTime: must(row.queue_time, row.id),
        deadline: must(row.placement_deadline, row.id),
        message,
      };
    case "SCHEDULED":
      return { state, notBeforeTime: row.not_before_time ?? undefined, message };
    case "PULLING": {
      const { pull_bytes_done: bytesDone, pull_bytes_total: bytesTotal } = row;
      return { state, progress: bytesDone === null || bytesTotal === null ? undefined : { bytesDone, bytesTotal } };
    }
    case "CREATING":
    case "RUNNING":
      return { state };
    case "STOPPING":
      return { state, after: must(row.stop_then, row.id), ended: must(row.attempt_ended, row.id), message };
    case "STOPPED":
      return {
        state,
        reason: must(
          stoppedReasons.find((name) => name === row.reason),
          row.id,
        ),
        message,
      };
    case "FAILED":
      return {
        state,
        reason: must(
          failedReasons.find((name) => name === row.reason),
          row.id,
        ),
        message,
      };
    case "DELETED":
      return { state, deleteTime: must(row.delete_time, row.id) };
  }
}

function placeFromRow(row: InstanceRow): Place | undefined {
  if (row.node_id === null) return undefined;
  return {
    nodeId: nodeIdOf(row.node_id),
    location: {
      country: must(row.country, row.id),
      region: must(row.region, row.id),
      datacenter: must(row.datacenter, row.id),
      tier: must(row.tier, row.id),
    },
    attempt: must(row.placed_attempt, row.id),
    lost: row.node_lost,
    reachable: must(row.node_reachable, row.id),
  };
}

const stoppedReasons: readonly StoppedReason[] = ["COMPLETED", "STOPPED_BY_REQUEST", "MAX_RUN_TIME_REACHED"];
const failedReasons: readonly FailedReason[] = [
  "PLACEMENT_TIMED_OUT",
  "IMAGE_NOT_ALLOWED",
  "IMAGE_NOT_FOUND",
  "PULL_FAILED",
  "START_FAILED",
  "OUT_OF_MEMORY",
  "EXITED_NONZERO",
  "NODE_LOST",
  "POLICY_VIOLATION",
  "NODE_ERROR",
  "PULL_UNAUTHORIZED",
  "PULL_INTERRUPTED",
  "PULL_STALLED",
  "IMAGE_DAMAGED",
  "REGISTRY_UNREACHABLE",
];

function must<T>(value: T | null | undefined, id: string): T {
  if (value === null || value === undefined) throw new Error(`the row of ${id} is not one that we wrote`);
  return value;
}
