// What customers may do with instances, and what dispatch asks of them. A call takes the transaction, so that a use
// case owns one; the tenant's transaction shows no other organization's rows, so that what is another's and what is
// nowhere cannot be told apart.
import { create } from "@bufbuild/protobuf";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import {
  type AttemptRef,
  type AttemptStatus,
  type DesiredSet,
  DesiredSetSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { InstanceSpec } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceId, newId, type NodeId, type OrganizationId, parseId } from "@clodei/proto/ids";
import type { NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { SystemTx, TenantTx } from "../platform/database.ts";
import { DomainError, quotaExceeded } from "../platform/errors.ts";
import { type CommandOutcome, placementTimeoutMs } from "./attempts.ts";
import { remove, restart, start, stop } from "./commands.ts";
import type { Instance, State } from "./model.ts";
import { Recorder, type RecorderOptions } from "./recorder.ts";
import { acceptSpec, type SpecPolicy } from "./spec.ts";
import {
  type InstanceFilter,
  type InstancePage,
  lockInstance,
  lockInstances,
  selectDesired,
  selectEvents,
  selectInstance,
  selectInstances,
  selectOwners,
  selectRunning,
  selectShares,
  selectSpecs,
  type Shares,
} from "./store.ts";
import { applyReport, loseContainer } from "./transitions.ts";
import { type Actor, type InstanceEvent, toAttemptReport, toDesiredInstance } from "./wire.ts";

export type { Instance } from "./model.ts";

/** What a customer may ask of an instance. */
export type Command = "stop" | "start" | "restart" | "delete";

/** Whose an instance is, and up to which attempt it was on the node. */
export type AttemptsOnNode = { readonly organizationId: OrganizationId; readonly lastAttempt: number };

/** Where an instance's logs are. */
export type LogTarget = {
  readonly attempt: number;
  /** The last attempt that got a node; 0 if none did. */
  readonly placedAttempt: number;
  /** Whether its node was lost for good, with all output that it held. */
  readonly lost: boolean;
  /** Undefined: no node has anything of it. */
  readonly nodeId: NodeId | undefined;
  readonly state: State;
  /** Whether the current attempt's container ever started. */
  readonly started: boolean;
};

/** What the service is made of. */
export type InstancesOptions = Omit<RecorderOptions, "nodes"> &
  SpecPolicy & {
    readonly nodes: Pick<NodesService, "bumpDesiredGeneration">;
    readonly clock: Clock;
  };

/**
 * As many as a desired set holds. A set that left one out would have its node remove that one's workspace: there is
 * no answer rather than a short one, and the scheduler keeps nodes well below it.
 */
const maxInstancesPerNode = 4096;

/** The scheduler looks at so many thousand waiting instances: no organization is to fill its view alone. */
const maxPendingPerOrganization = 1_000;

/**
 * Desired sets and the scheduler read specifications whole, and one can have 1 MiB. A usual one has less than 1 KiB,
 * so this is room for 60,000 instances.
 */
const maxSpecBytesPerOrganization = 64 * 1024 * 1024;

/**
 * A deleted instance can be read for 30 days, and keeps its specification. Without this, an organization that creates
 * and deletes could fill the disk; with it, it keeps at most 46 GiB, and usually 65,000 instances an hour are possible.
 */
const maxSpecBytesPerHour = 64 * 1024 * 1024;
const hourMs = 3_600_000;

/** Instances of all organizations. */
export class InstancesService {
  readonly #options: InstancesOptions;

  constructor(options: InstancesOptions) {
    this.#options = options;
  }

  // ---- for customers ------------------------------------------------------------------------------------------

  /**
   * Creates an instance. It waits in PENDING until the scheduler, who is told at once, finds its place.
   *
   * @throws DomainError NOT_SUPPORTED_YET, LOCATION_NOT_ALLOWED, IMAGE_NOT_ALLOWED, INVALID_ARGUMENT, QUOTA_EXCEEDED.
   */
  async create(tx: TenantTx, given: InstanceSpec, callerId: string): Promise<Instance> {
    const spec = acceptSpec(given, this.#options);
    const now = this.#options.clock();
    const shares = await readShares(tx, now);
    checkQueue(tx, shares);
    checkSpecBytes(tx, shares);
    const deadline = new Date(now.getTime() + placementTimeoutMs({ spec }));
    const instance: Instance = {
      id: newId("ins", now.getTime()),
      organizationId: tx.organizationId,
      spec,
      createdBy: callerId,
      createTime: now,
      updateTime: now,
      version: 1n,
      eventCount: 1n,
      attempt: 1,
      restartCount: 0,
      status: { state: "PENDING", queueTime: now, deadline, message: "" },
      place: undefined,
      gpus: [],
      startTime: undefined,
      finishTime: undefined,
      exitCode: undefined,
      imageDigest: "",
      imageId: "",
      isolation: undefined,
    };
    await new Recorder(this.#options, tx, now).create(instance, { kind: "CUSTOMER", id: callerId });
    return instance;
  }

  /** One instance, deleted ones too. @throws DomainError NOT_FOUND. */
  async get(tx: TenantTx, id: string): Promise<Instance> {
    const instanceId = parseId("ins", id);
    const instance = instanceId && (await selectInstance(tx, instanceId));
    return instance ?? notFound();
  }

  /** A page of instances, the newest first, before an id. */
  list(tx: TenantTx, filter: InstanceFilter, beforeId: string | undefined, limit: number): Promise<InstancePage> {
    return selectInstances(tx, filter, beforeId, limit);
  }

  /** Specifications in the order given: the first, and as many more as are small enough to be read at once. */
  specs(tx: TenantTx, ids: readonly InstanceId[]): Promise<ReadonlyMap<InstanceId, InstanceSpec>> {
    return selectSpecs(tx, ids);
  }

  /** A page of an instance's events, the oldest first, after a sequence number. @throws DomainError NOT_FOUND. */
  async events(tx: TenantTx, id: string, afterSequence: bigint, limit: number): Promise<InstanceEvent[]> {
    const instance = await this.get(tx, id);
    return selectEvents(tx, instance.id, afterSequence, limit);
  }

  /**
   * Does what a customer asks, in every state; concurrent calls follow one another under the row's lock.
   *
   * @throws DomainError NOT_FOUND; FAILED_PRECONDITION to start what is deleted or being deleted.
   */
  async command(tx: TenantTx, command: Command, id: string, callerId: string): Promise<Instance> {
    const instanceId = parseId("ins", id);
    const instance = (instanceId && (await lockInstance(tx, instanceId))) ?? notFound();
    const now = this.#options.clock();
    const outcome = decide(command, instance, now);
    if (outcome === "refused") {
      const state = instance.status.state === "DELETED" ? "deleted" : "being deleted";
      throw new DomainError(ErrorReason.FAILED_PRECONDITION, `the instance is ${state}: it cannot be started`);
    }
    if (outcome !== "unchanged" && outcome.next.status.state === "PENDING") checkQueue(tx, await readShares(tx, now));
    const recorder = new Recorder(this.#options, tx, now);
    const next = await recorder.apply(instance, outcome, { kind: "CUSTOMER", id: callerId });
    await recorder.finish();
    return next;
  }

  // ---- for dispatch -------------------------------------------------------------------------------------------

  /**
   * What a node shall run and keep: the whole set, of a state of the database no older than its generation.
   *
   * @param generation As `tx` read it before: what commits in between makes the set newer than it says, and is sent
   * again.
   */
  async desiredSet(tx: SystemTx, nodeId: NodeId, generation: bigint): Promise<DesiredSet> {
    const instances = await selectDesired(tx, nodeId, maxInstancesPerNode + 1);
    if (instances.length > maxInstancesPerNode) throw new Error(`node ${nodeId} has more instances than a set holds`);
    return create(DesiredSetSchema, {
      generation,
      instances: instances.flatMap((instance) => toDesiredInstance(instance) ?? []),
    });
  }

  /**
   * Applies what a node reports, in the order given. A report that came before, or is of an attempt that is over,
   * changes nothing.
   *
   * @returns how many reports are about instances that never were on this node. They are left out.
   */
  async applyStatuses(
    tx: SystemTx,
    nodeId: NodeId,
    statuses: readonly AttemptStatus[],
  ): Promise<{ readonly foreign: number }> {
    const ids = new Set(statuses.flatMap(({ instanceId }) => parseId("ins", instanceId) ?? []));
    const locked = await lockInstances(tx, [...ids]);
    const instances = new Map<string, Instance>(locked.map((instance) => [instance.id, instance]));
    const now = this.#options.clock();
    const recorder = new Recorder(this.#options, tx, now);
    const actor: Actor = { kind: "NODE", id: nodeId };
    let foreign = 0;
    for (const status of statuses) {
      const instance = instances.get(status.instanceId);
      if (instance?.place?.nodeId !== nodeId || status.attempt > instance.place.attempt) {
        foreign += 1;
        continue;
      }
      const report = toAttemptReport(status);
      if (report === undefined) continue;
      const next = await recorder.apply(instance, applyReport(instance, nodeId, report, now), actor);
      instances.set(status.instanceId, next);
    }
    await recorder.finish();
    return { foreign };
  }

  /**
   * Takes in which containers a node has at its Hello: what ran there and is gone is NODE_LOST. Call it when all
   * that the node's journal held at the Hello is applied, and before the node gets a desired set: a job that ended
   * while the link was down has its end in the journal, and is not lost.
   */
  async reconcileHello(
    tx: SystemTx,
    nodeId: NodeId,
    bootChanged: boolean,
    containers: readonly AttemptRef[],
  ): Promise<void> {
    const present = new Set(containers.map(({ instanceId, attempt }) => `${instanceId}-${attempt}`));
    const running = await selectRunning(tx, nodeId);
    const missing = running.filter(({ id, attempt }) => !present.has(`${id}-${attempt}`));
    if (missing.length === 0) return;
    const now = this.#options.clock();
    const recorder = new Recorder(this.#options, tx, now);
    const locked = await lockInstances(
      tx,
      missing.map(({ id }) => id),
    );
    const attempts = new Map(missing.map(({ id, attempt }) => [id, attempt]));
    for (const instance of locked) {
      // It may have moved on before it was locked.
      if (instance.place?.nodeId !== nodeId || instance.attempt !== attempts.get(instance.id)) continue;
      await recorder.apply(instance, loseContainer(instance, bootChanged, now), { kind: "NODE", id: nodeId });
    }
    await recorder.finish();
  }

  /** Of these instances, those that are or were on the node. */
  async attemptsOnNode(
    tx: SystemTx,
    nodeId: NodeId,
    instanceIds: readonly InstanceId[],
  ): Promise<ReadonlyMap<InstanceId, AttemptsOnNode>> {
    const owners = await selectOwners(tx, nodeId, instanceIds);
    return new Map(owners.map(({ id, organizationId, lastAttempt }) => [id, { organizationId, lastAttempt }]));
  }

  /** Where an instance's logs are; undefined where the caller has no such instance. */
  async logTarget(tx: TenantTx, instanceId: InstanceId): Promise<LogTarget | undefined> {
    const instance = await selectInstance(tx, instanceId);
    if (instance === undefined) return undefined;
    const { attempt, place, status } = instance;
    const lost = place?.lost === true;
    const nodeId = lost ? undefined : place?.nodeId;
    const started = instance.startTime !== undefined;
    return { attempt, placedAttempt: place?.attempt ?? 0, lost, nodeId, state: status.state, started };
  }
}

function decide(command: Command, instance: Instance, now: Date): CommandOutcome {
  switch (command) {
    case "stop":
      return stop(instance);
    case "start":
      return start(instance, now);
    case "restart":
      return restart(instance, now);
    case "delete":
      return remove(instance, now);
  }
}

/** @throws DomainError QUOTA_EXCEEDED where the organization has its share of the queue. */
function checkQueue(tx: TenantTx, { pending }: Shares): void {
  if (pending < maxPendingPerOrganization) return;
  const what = "instances of an organization wait for capacity at a time";
  throw quotaExceeded(tx.organizationId, "pending_instances", maxPendingPerOrganization, what);
}

/** @throws DomainError QUOTA_EXCEEDED where the organization's specifications take their share of memory, or of disk. */
function checkSpecBytes(tx: TenantTx, { specBytes, recentSpecBytes }: Shares): void {
  if (specBytes >= maxSpecBytesPerOrganization) {
    const what = "bytes of specifications of an organization's instances are kept: delete some that are not needed";
    throw quotaExceeded(tx.organizationId, "specification_bytes", maxSpecBytesPerOrganization, what);
  }
  if (recentSpecBytes >= maxSpecBytesPerHour) {
    const what = "bytes of specifications of an organization's instances are taken an hour, deleted ones included";
    throw quotaExceeded(tx.organizationId, "specification_bytes_per_hour", maxSpecBytesPerHour, what);
  }
}

function readShares(tx: TenantTx, now: Date): Promise<Shares> {
  return selectShares(tx, new Date(now.getTime() - hourMs));
}

/** The same for what is nowhere and for what is another organization's. */
function notFound(): never {
  throw new DomainError(
    ErrorReason.NOT_FOUND,
    "there is no such instance: ListInstances shows those that there are, and with show_deleted those that were",
  );
}
