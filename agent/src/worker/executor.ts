// Takes the steps that the plan names. Each step can be cut off anywhere, by a crash or by a new wish, and be planned
// again from what is there: what must not happen twice is written down before it is done, what happened is written
// down before it is told.

import { durationMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import { AttemptPhase } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { ContainerSpec, Isolation } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import type { InstanceId } from "@clodei/proto/ids";
import type { Logger } from "pino";
import { EngineError } from "../containers/engine-error.ts";
import type { CreatedContainer } from "../containers/container-creation.ts";
import type { ContainerEngine } from "../containers/engine.ts";
import type { ObservedContainer } from "../containers/observed.ts";
import { messageOf } from "../error-reason.ts";
import type { AttemptRecord, StopReason } from "../journal/attempt-table.ts";
import type { AttemptBook, StatusPart } from "./attempt-book.ts";
import type { BootClock } from "./boot-clock.ts";
import { describeEnd } from "./end.ts";
import { maxStopGraceSeconds } from "./judge.ts";
import type { Judge, Refusal } from "./judge.ts";
import type { LogCollectors } from "./log-collectors.ts";
import { keyText } from "./model.ts";
import type { Action, AttemptKey, EndCause } from "./model.ts";

/** Progress of a pull is journaled at most this often. */
const progressEveryMs = 500;

/** The contract's default time between SIGTERM and SIGKILL, for a container whose specification is not known. */
const defaultStopGraceMs = 10_000;

/** What the control plane asks for now. */
export interface Wish {
  readonly spec: ContainerSpec | undefined;
  readonly generation: bigint;
}

/** What the executor works with. */
export interface ExecutorOptions {
  readonly engine: ContainerEngine;
  readonly book: AttemptBook;
  readonly collectors: LogCollectors;
  readonly judge: Judge;
  readonly clock: BootClock;
  readonly wishFor: (key: AttemptKey) => Wish | undefined;
  readonly observed: (key: AttemptKey) => ObservedContainer | undefined;
  /** Whether the instance's logs shall be there after its container is gone. */
  readonly keepsLogs: (instanceId: InstanceId) => boolean;
  readonly log: Logger;
}

/** Takes steps, each for one instance. Two steps of one instance never run at once: the worker sees to that. */
export class Executor {
  readonly #options: ExecutorOptions;
  /** Running containers that this process looks after. */
  readonly #attended = new Set<string>();

  constructor(options: ExecutorOptions) {
    this.#options = options;
  }

  isAttended(key: AttemptKey): boolean {
    return this.#attended.has(keyText(key));
  }

  /** Takes a step. Throws where it must be tried again. */
  async take(action: Action, signal: AbortSignal): Promise<void> {
    switch (action.kind) {
      case "start":
        return await this.#start(action, signal);
      case "attend":
        return await this.#attend(action, signal);
      case "stop":
        return await this.#stop(action, action.reason, signal);
      case "finish":
        return this.#finish(action);
      case "end":
        return this.#endWithoutContainer(action, action.cause);
      case "remove_container":
        return await this.#removeContainer(action, signal);
      case "remove_instance":
        return await this.#removeInstance(action, signal);
    }
  }

  /** Gives an attempt up: what was tried again and again does not work. */
  giveUp(key: AttemptKey, error: unknown): void {
    this.#end(key, { reason: InstanceReason.NODE_ERROR, message: messageOf(error) });
  }

  async #start(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const { book, judge, wishFor, observed } = this.#options;
    const wish = wishFor(key);
    // What was validated and created is what runs, whatever a later set says about the same attempt.
    const spec = book.get(key)?.spec ?? wish?.spec;
    if (wish === undefined) return;
    if (spec === undefined) {
      return this.#end(key, {
        reason: InstanceReason.POLICY_VIOLATION,
        message: "container: there is no specification",
      });
    }
    const refusal = judge.refusalOf(spec);
    if (refusal !== undefined) return this.#end(key, refusal);
    try {
      if (observed(key) !== undefined) await this.#clearUnstarted(key, signal);
      const { image, container } = await this.#create(key, spec, wish.generation, signal);
      await this.#run(key, image, container, signal);
    } catch (error) {
      if (!(error instanceof EngineError) || !isFinal(error)) throw error;
      this.#options.log.debug({ instanceId: key.instanceId, cause: messageOf(error.cause) }, "the engine's own words");
      this.#end(key, { reason: error.reason, message: error.message });
    }
  }

  /**
   * A container that an earlier step made gives way to a new one: what a start that was cut off left of it would make
   * the next start fail. Throws start_unknown where its program may have run.
   */
  async #clearUnstarted(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const { engine, book } = this.#options;
    if (book.get(key)?.phase !== "preparing") {
      const trace = await engine.startTrace(key, signal);
      if (trace !== "not_begun") {
        throw new EngineError(
          "start_unknown",
          "the container engine was killed while it started the container, and nobody knows whether the program ran: it is not run again",
        );
      }
      // Before anything is taken away: without its traces nobody could tell any more that it did not run.
      book.change(key, { phase: "preparing" });
    }
    await engine.discard(key, signal);
  }

  async #create(
    key: AttemptKey,
    spec: ContainerSpec,
    generation: bigint,
    signal: AbortSignal,
  ): Promise<{ readonly image: StatusPart; readonly container: CreatedContainer }> {
    const { engine, book } = this.#options;
    // Whoever follows the logs from now on waits for them instead of being told that there are none.
    await this.#options.collectors.expect(key);
    const image = await engine.ensureImage(spec.image, spec.pullPolicy, this.#progressOf(key), signal);
    const part: StatusPart = { imageId: image.imageId, imageDigest: image.digest ?? "" };
    book.change(key, { spec }, AttemptPhase.CREATING, part);
    return { image: part, container: await engine.create(key, generation, spec, image, signal) };
  }

  async #run(key: AttemptKey, image: StatusPart, container: CreatedContainer, signal: AbortSignal): Promise<void> {
    const { engine, book, clock } = this.#options;
    const beforeMs = BigInt(Math.floor(clock.nowMs()));
    // The mark of the start, on the disk before the engine is asked: from now on a missing container is a lost one.
    book.change(key, { phase: "starting", bootId: clock.bootId, meteredMs: beforeMs });
    const { startTime, isolation } = await engine.start(key, signal, container);
    this.#markRunning(key, startTime, { ...image, ...isolationPart(isolation) });
  }

  #markRunning(key: AttemptKey, startTime: Date, status: StatusPart): void {
    const { book, clock, collectors } = this.#options;
    const record = book.get(key);
    const meteredMs = this.#startedMs(record, startTime);
    book.change(
      key,
      { phase: "running", bootId: clock.bootId, startedMs: meteredMs, meteredMs },
      // Without a read-back there was no process left to look at: RUNNING is not claimed, and the end follows.
      status.isolation === undefined ? undefined : AttemptPhase.RUNNING,
      { ...status, startTime: timestampFromDate(startTime) },
    );
    this.#attended.add(keyText(key));
    collectors.begin(key);
  }

  /** When the container started, on the boot's clock. */
  #startedMs(record: AttemptRecord | undefined, startTime: Date): bigint {
    const { book, clock } = this.#options;
    const nowMs = BigInt(Math.floor(clock.nowMs()));
    // The engine's wall clock may have been set since: the start lies between its mark and now, whatever it says.
    const told = BigInt(Math.max(0, Math.floor(book.bootTimeOf(startTime))));
    const least = record?.bootId === clock.bootId ? record.meteredMs : 0n;
    return told < least ? least : told > nowMs ? nowMs : told;
  }

  async #attend(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const { engine, book, collectors, wishFor, clock, log } = this.#options;
    try {
      const { startTime, isolation } = await engine.adopt(key, signal);
      const record = book.get(key);
      if (record?.phase === "running" && record.bootId === clock.bootId) {
        // Metering goes on where the last interval ended.
        this.#attended.add(keyText(key));
        collectors.begin(key);
      } else {
        const spec = record?.spec ?? wishFor(key)?.spec;
        if (record?.spec === undefined && spec !== undefined) book.change(key, { spec });
        this.#markRunning(key, startTime, isolationPart(isolation));
      }
      log.info({ instanceId: key.instanceId, attempt: key.attempt }, "adopted a running container");
    } catch (error) {
      if (!(error instanceof EngineError) || error.kind !== "policy") throw error;
      this.#end(key, { reason: error.reason, message: error.message });
    }
  }

  async #stop(key: AttemptKey, reason: Exclude<StopReason, "none">, signal: AbortSignal): Promise<void> {
    const { engine, book } = this.#options;
    const record = book.get(key);
    if (
      record === undefined ||
      (record.stopReason === "none" && record.phase !== "ended" && record.phase !== "removed")
    ) {
      book.change(
        key,
        { stopReason: reason, stopTimeMs: Date.now(), phase: record?.phase ?? "running" },
        AttemptPhase.STOPPING,
      );
    }
    await engine.stop(key, graceMsOf(record?.spec), signal);
  }

  #finish(key: AttemptKey): void {
    const { book, observed, clock } = this.#options;
    const container = observed(key);
    const record = book.get(key);
    const end = describeEnd(container, record, clock);
    const usage = [];
    // Where the engine lost the exit code it does not know the time either: what was seen until then is metered already.
    const known = container?.exitCode !== undefined;
    if (record !== undefined && known && container.startTime !== undefined && container.finishTime !== undefined) {
      // Where the start itself was not seen, its mark stands before it: that time is nobody's.
      const meteredMs = record.phase === "starting" ? this.#startedMs(record, container.startTime) : record.meteredMs;
      const interval = book.intervalUntil({ ...record, meteredMs }, book.bootTimeOf(container.finishTime));
      if (interval !== undefined) usage.push(interval);
    }
    this.#attended.delete(keyText(key));
    book.change(key, { phase: "ended" }, AttemptPhase.ENDED, end, usage);
  }

  #endWithoutContainer(key: AttemptKey, cause: EndCause): void {
    switch (cause) {
      case "never_started":
        return this.#end(key, { reason: InstanceReason.STOPPED_BY_REQUEST, message: "" });
      case "vanished":
        return this.#end(key, {
          reason: InstanceReason.NODE_ERROR,
          message: "the container is gone: somebody or something on the node removed it",
        });
      case "gpu_in_use":
        return this.#end(key, {
          reason: InstanceReason.POLICY_VIOLATION,
          message: "gpu_uuids: a GPU is in use by another instance of this node",
        });
      case "cpu_in_use":
        return this.#end(key, {
          reason: InstanceReason.POLICY_VIOLATION,
          message: "cpu_millis: all instances of this node together would have more than the node has",
        });
      case "memory_in_use":
        return this.#end(key, {
          reason: InstanceReason.POLICY_VIOLATION,
          message: "memory_mib: all instances of this node together would have more than the node has",
        });
    }
  }

  #end(key: AttemptKey, refusal: Refusal): void {
    const { book, collectors, log } = this.#options;
    this.#attended.delete(keyText(key));
    book.change(key, { phase: "ended" }, AttemptPhase.ENDED, refusal);
    if (this.#options.observed(key) === undefined) collectors.finish(key);
    log.info({ instanceId: key.instanceId, attempt: key.attempt, reason: refusal.reason }, "attempt ended");
  }

  async #removeContainer(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const { collectors, keepsLogs, observed } = this.#options;
    // The engine's copy of the output goes with the container: ours must be whole first.
    const started = observed(key)?.startTime !== undefined;
    if (keepsLogs(key.instanceId) && started) await collectors.settle(key, signal);
    await this.#options.engine.remove(key, signal);
    if (keepsLogs(key.instanceId) && !started) collectors.finish(key);
  }

  async #removeInstance(key: AttemptKey, signal: AbortSignal): Promise<void> {
    const { engine, book, collectors } = this.#options;
    await collectors.remove(key.instanceId);
    signal.throwIfAborted();
    await engine.removeWorkspace(key.instanceId);
    book.removeInstance(key);
  }

  #progressOf(key: AttemptKey): (progress: { readonly bytesDone: number; readonly bytesTotal: number }) => void {
    let lastMs = Number.NEGATIVE_INFINITY;
    return ({ bytesDone, bytesTotal }) => {
      const nowMs = performance.now();
      if (nowMs - lastMs < progressEveryMs && bytesDone !== bytesTotal) return;
      lastMs = nowMs;
      const pullProgress = {
        $typeName: "clodei.v1.PullProgress" as const,
        bytesDone: BigInt(Math.max(0, Math.floor(bytesDone))),
        bytesTotal: BigInt(Math.max(0, Math.floor(bytesTotal))),
      };
      try {
        this.#options.book.report(key, AttemptPhase.PULLING, { pullProgress });
      } catch (error) {
        // Progress may be lost; the callback's caller is the pull, which must not fail of it.
        this.#options.log.warn({ error: messageOf(error) }, "progress of a pull was not journaled");
      }
    };
  }
}

/** Whether the attempt has failed. Where the engine is away or stumbles it has not: the step is taken again. */
function isFinal(error: EngineError): boolean {
  switch (error.kind) {
    case "away":
    case "failed":
    case "not_found":
      return false;
    case "image_not_found":
    case "unauthorized":
    case "unreachable":
    case "interrupted":
    case "stalled":
    case "damaged":
    case "pull_failed":
    case "start_failed":
    case "start_unknown":
    case "policy":
      return true;
  }
}

function isolationPart(isolation: Isolation | undefined): StatusPart {
  return isolation === undefined ? {} : { isolation };
}

/** Bounded, because the specification of an adopted container is what the control plane says now, and was not judged. */
function graceMsOf(spec: ContainerSpec | undefined): number {
  const grace = spec?.stopGrace;
  if (grace === undefined) return defaultStopGraceMs;
  return Math.min(Math.max(0, durationMs(grace)), maxStopGraceSeconds * 1000);
}
