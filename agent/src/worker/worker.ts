// Makes the node be as the last desired set says: looks at the engine, plans, takes the planned steps, looks again.
// It is woken by a new set, by the engine's events and by a timer behind both, so a lost hint costs time and nothing
// else. One lane an instance: a step is planned only for an instance of which none is under way, and only from a look
// at the engine that began after the instance's last step was done.

import { readdir } from "node:fs/promises";
import { DesiredState } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { DesiredInstance, DesiredSet } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { parseId } from "@clodei/proto/ids";
import type { InstanceId } from "@clodei/proto/ids";
import type { Logger } from "pino";
import type { ContainerEngine } from "../containers/engine.ts";
import type { ObservedContainer } from "../containers/observed.ts";
import { messageOf } from "../error-reason.ts";
import { ignoreMissing } from "../identity/state-folder.ts";
import type { StatePaths } from "../identity/state-folder.ts";
import { freeMib } from "../inventory/host.ts";
import { maxPendingEntries } from "../journal/journal.ts";
import type { Journal } from "../journal/journal.ts";
import type { LogStore } from "../logs/log-store.ts";
import { sleep } from "../sleep.ts";
import { AttemptBook } from "./attempt-book.ts";
import type { BootClock } from "./boot-clock.ts";
import { desiredAttempt, needsOf, runDeadlineMs } from "./desired.ts";
import { EngineUpkeep } from "./engine-upkeep.ts";
import { Executor } from "./executor.ts";
import type { Judge } from "./judge.ts";
import { Lanes } from "./lanes.ts";
import { LogCollectors } from "./log-collectors.ts";
import { forgettable, keyText, plan } from "./model.ts";
import type { AttemptKey, Situation, WorkMode } from "./model.ts";
import { UsageMeter } from "./usage-meter.ts";

/** The engine's events wake the worker; this is the timer behind them. */
const lookEveryMs = 5000;
/** While the engine is away. */
const lookWhenAwayMs = 1000;
/** So long an ending worker waits for the engine to let go of what was asked of it. */
const shutdownMs = 10_000;
/** An event storm (a container that writes its health each millisecond) must not make a storm of looks. */
const leastLookGapMs = 20;

const notAskedYet = "the container engine was not asked yet";

/** What a worker works with. */
export interface WorkerOptions {
  readonly engine: ContainerEngine;
  readonly logs: LogStore;
  readonly journal: Journal;
  readonly judge: Judge;
  readonly clock: BootClock;
  readonly paths: StatePaths;
  readonly minFreeMib: number;
  readonly usageIntervalMs: number;
  readonly log: Logger;
}

/** Why the node takes no work; empty where it does. */
export interface Acceptance {
  readonly accepting: boolean;
  readonly message: string;
}

/** The part of the agent that runs containers. */
export class Worker {
  readonly #options: WorkerOptions;
  readonly #book: AttemptBook;
  readonly #collectors: LogCollectors;
  readonly #executor: Executor;
  readonly #lanes: Lanes;
  readonly #meter: UsageMeter;
  readonly #upkeep: EngineUpkeep;
  #set: DesiredSet | undefined;
  /** Sets below this one are ignored; undefined at the beginning of a session, whose first set may be any. */
  #leastGeneration: bigint | undefined;
  #highestGeneration: bigint;
  /** Why the last set that came was refused; undefined where it was not. */
  #setMessage: string | undefined;
  #desired: ReadonlyMap<InstanceId, DesiredInstance> | undefined;
  #observed: readonly ObservedContainer[] = [];
  /** Instances of which a step was under way when the last look began, or began since: it says nothing of them. */
  #unseen = new Set<InstanceId>();
  #engineVersion = "";
  #engineMessage: string | undefined = notAskedYet;
  #diskMessage: string | undefined;
  #hold: "none" | "quarantined" | "revoked" = "none";
  readonly #acceptanceListeners = new Set<() => void>();
  /** What was told of the acceptance last. */
  #toldAcceptance = "";
  /** The control plane's clock less ours. */
  #clockOffsetMs = 0;
  #wake = Promise.withResolvers<void>();

  constructor(options: WorkerOptions) {
    this.#options = options;
    this.#book = new AttemptBook(options.journal, options.clock);
    this.#collectors = new LogCollectors(options.logs, options.log);
    this.#executor = new Executor({
      ...options,
      book: this.#book,
      collectors: this.#collectors,
      wishFor: (key) => this.#wishFor(key),
      keepsLogs: (instanceId) => this.#keepsLogs(instanceId),
      observed: (key) => this.#observed.find((container) => keyText(container) === keyText(key)),
    });
    this.#lanes = new Lanes({
      executor: this.#executor,
      log: options.log,
      onDone: () => this.wake(),
      isWanted: (key) => this.#wishFor(key) !== undefined,
    });
    this.#meter = new UsageMeter({ book: this.#book, intervalMs: options.usageIntervalMs, log: options.log });
    this.#upkeep = new EngineUpkeep(options.engine, options.log);
    this.#highestGeneration = options.journal.highestGeneration();
    this.#use(options.journal.desiredSet());
    this.#leastGeneration = this.#set?.generation;
  }

  /** Version of the container engine as it last answered; empty while it does not. */
  get engineVersion(): string {
    return this.#engineMessage === undefined ? this.#engineVersion : "";
  }

  /** Generation of the last desired set that is journaled. */
  get observedGeneration(): bigint {
    return this.#set?.generation ?? 0n;
  }

  /**
   * A session begins. Its first set is taken whatever its generation is: sets of one session come in order, and a
   * control plane that was restored from a backup begins with a lower one than it had reached.
   */
  beginSession(): void {
    this.#leastGeneration = undefined;
  }

  /**
   * Takes a desired set over. A set with a lower generation than one of the session is ignored; false then. Throws where
   * it cannot be understood.
   */
  applyDesiredSet(set: DesiredSet): boolean {
    const { judge, journal, log } = this.#options;
    if (this.#leastGeneration !== undefined && set.generation < this.#leastGeneration) return false;
    const fault = judge.faultOf(set, this.#highestGeneration);
    this.#setMessage = fault === undefined ? undefined : `the desired set cannot be understood: ${fault}`;
    if (this.#setMessage !== undefined) {
      log.error({ generation: set.generation.toString() }, this.#setMessage);
      throw new Error(this.#setMessage);
    }
    if (set.generation < this.observedGeneration) {
      log.error(
        { generation: set.generation.toString(), highest: this.#highestGeneration.toString() },
        "the control plane's desired set is older than the last: it was restored from a backup. What the set does not name is stopped, and its data is kept until a set is newer than all before",
      );
    }
    journal.saveDesiredSet(set);
    this.#highestGeneration = journal.highestGeneration();
    this.#leastGeneration = set.generation;
    this.#use(set);
    this.#lanes.abortUnwanted();
    // An instance that nobody here has heard of needs no look at the engine: its container cannot be there, and if it
    // is, because the state folder was lost, the name is taken and the container is adopted.
    const known = new Set<string>([...this.#observed, ...this.#book.all()].map(({ instanceId }) => instanceId));
    const { actions } = plan(this.#situation(new Set()));
    const starts = actions.filter(({ kind, instanceId }) => kind === "start" && !known.has(instanceId));
    for (const { instanceId } of starts) this.#unseen.add(instanceId);
    this.#lanes.take(starts);
    this.wake();
    return true;
  }

  /** Tells the worker how far the control plane's clock is ahead. */
  setServerTime(serverMs: number): void {
    this.#clockOffsetMs = serverMs - Date.now();
  }

  /** Quarantine: what runs goes on, nothing is started. Revocation: everything stops, what is on the disk stays. */
  hold(hold: "none" | "quarantined" | "revoked"): void {
    if (this.#hold === "revoked" || this.#hold === hold) return;
    this.#hold = hold;
    this.wake();
  }

  /** Whether the node takes new work, and if not, why. */
  acceptance(): Acceptance {
    const { journal } = this.#options;
    const reasons = [
      this.#hold === "revoked" ? "the node was revoked" : undefined,
      this.#hold === "quarantined" ? "the node is in quarantine" : undefined,
      this.#engineMessage,
      this.#diskMessage,
      this.#setMessage,
      journal.failure === undefined ? undefined : `the journal cannot be written: ${journal.failure}`,
      this.#isJournalFull() ? "the journal is full of reports that nobody acknowledged" : undefined,
    ].filter((reason) => reason !== undefined);
    return { accepting: reasons.length === 0, message: reasons.join("; ").slice(0, 512) };
  }

  /** Calls `listener` when the node begins to take new work, or stops to, or does not for another reason. */
  onAcceptance(listener: () => void): Disposable {
    this.#acceptanceListeners.add(listener);
    return { [Symbol.dispose]: () => void this.#acceptanceListeners.delete(listener) };
  }

  /**
   * The attempts whose containers exist as far as is known: seen at the last look, or started and not reported as
   * ended. While the engine is away the second kind counts: nobody can say yet that they are gone.
   */
  containers(): AttemptKey[] {
    const started = this.#book.all().filter(({ phase }) => phase === "starting" || phase === "running");
    const keys = new Map<string, AttemptKey>();
    for (const { instanceId, attempt } of [...this.#observed, ...started])
      keys.set(keyText({ instanceId, attempt }), { instanceId, attempt });
    return [...keys.values()];
  }

  /** Whether no container of this node exists any more. */
  get isEmpty(): boolean {
    return this.#engineMessage === undefined && this.#observed.length === 0 && this.#lanes.isIdle;
  }

  /** Looks and plans again soon. */
  wake(): void {
    this.#wake.resolve();
  }

  /** Works until the signal. Containers go on afterwards: the next process adopts them. */
  async run(signal: AbortSignal): Promise<void> {
    const upkeep = Promise.all([
      this.#upkeep.listen(signal, () => this.wake()),
      this.#upkeep.keepNetworks(signal, shutdownMs, () => this.acceptance().accepting),
    ]);
    while (!signal.aborted) {
      const wake = Promise.withResolvers<void>();
      this.#wake = wake;
      const again = await this.#tickSafely(signal);
      this.#tellAcceptance();
      const pause = new AbortController();
      const onAbort = (): void => pause.abort();
      signal.addEventListener("abort", onAbort, { once: true });
      await Promise.race([wake.promise, sleep(again, pause.signal)]);
      signal.removeEventListener("abort", onAbort);
      pause.abort();
      if (!signal.aborted) await sleep(leastLookGapMs, signal);
    }
    const ended = new AbortController();
    const ending = Promise.all([this.#lanes.close(), this.#collectors.close(), upkeep]).finally(() => ended.abort());
    // An engine that hangs must not hang the agent's end: what is cut off here is found again at the next start.
    await Promise.race([ending, sleep(shutdownMs, ended.signal)]);
    this.#meter.flush();
  }

  #tellAcceptance(): void {
    const { accepting, message } = this.acceptance();
    const text = `${accepting} ${message}`;
    if (text === this.#toldAcceptance) return;
    this.#toldAcceptance = text;
    for (const listener of this.#acceptanceListeners) listener();
  }

  async #tickSafely(signal: AbortSignal): Promise<number> {
    try {
      return await this.#tick(signal);
    } catch (error) {
      // A disk that gives errors, for one. Nothing was decided; the next look begins anew.
      if (!signal.aborted) this.#options.log.error({ error: messageOf(error) }, "a look at the node failed");
      return lookWhenAwayMs;
    }
  }

  /** Looks, plans and takes steps. Returns after how many milliseconds to do so again at the latest. */
  async #tick(signal: AbortSignal): Promise<number> {
    this.#unseen = this.#lanes.busy();
    if (!(await this.#look(signal))) return lookWhenAwayMs;
    await this.#checkDisk();
    const situation = this.#situation(await this.#leftovers());
    const { actions, wakeAtMs } = plan(situation);
    const retryMs = this.#lanes.take(actions.filter(({ instanceId }) => !this.#unseen.has(instanceId)));
    this.#forget(situation);
    // Before the first set there is nothing to tell what is needed from what is not.
    if (this.#desired !== undefined) await this.#upkeep.sweep(signal);
    this.#meter.meterWhenDue();
    const wakeInMs = wakeAtMs === undefined ? lookEveryMs : Math.max(1, wakeAtMs - situation.nowMs);
    return Math.min(lookEveryMs, this.#options.usageIntervalMs, wakeInMs, retryMs);
  }

  async #look(signal: AbortSignal): Promise<boolean> {
    const beforeMs = this.#options.clock.nowMs();
    try {
      // An engine that was away may have come back as another one: it must be fit to be trusted with containers.
      if (this.#engineMessage !== undefined) await this.#greet(signal);
      const observed = await this.#options.engine.list(signal);
      this.#engineMessage = undefined;
      this.#observed = observed;
      for (const container of observed) {
        if (container.state === "running" && !this.#unseen.has(container.instanceId))
          this.#meter.saw(container, beforeMs);
      }
      return true;
    } catch (error) {
      if (signal.aborted) return false;
      if (this.#engineMessage === undefined || this.#engineMessage === notAskedYet)
        this.#options.log.warn({ error: messageOf(error) }, "the node's containers cannot be looked at");
      this.#engineMessage = `the node's containers cannot be looked at: ${messageOf(error)}`;
      return false;
    }
  }

  async #greet(signal: AbortSignal): Promise<void> {
    const { version, storageDriver, securityOptions } = await this.#options.engine.check(signal);
    this.#engineVersion = version;
    // Where the machine has no AppArmor, a profile is ignored in silence.
    const appArmor = securityOptions.includes("name=apparmor");
    this.#options.log.info({ version, storageDriver, appArmor }, "the container engine answers");
  }

  #situation(leftovers: ReadonlySet<InstanceId>): Situation {
    const nowMs = this.#options.clock.nowMs();
    const wallMs = Date.now() + this.#clockOffsetMs;
    const desired =
      this.#desired === undefined
        ? undefined
        : new Map([...this.#desired].map(([id, instance]) => [id, desiredAttempt(id, instance, nowMs - wallMs)]));
    return {
      desired,
      observed: this.#observed.map(({ instanceId, attempt, state }) => ({ instanceId, attempt, state })),
      remembered: this.#book.all().map((record) => ({
        ...record,
        needs: needsOf(record.spec),
        runDeadlineMs: runDeadlineMs(record.spec?.maxRunTime, record.startedMs),
        attended: this.#executor.isAttended(record),
      })),
      starting: this.#lanes.starts(),
      leftovers,
      keepsUnnamed: this.#keepsUnnamed,
      capacity: this.#options.judge.capacity(),
      journalFull: this.#isJournalFull(),
      mode: this.#mode(),
      nowMs,
    };
  }

  #isJournalFull(): boolean {
    return this.#options.journal.pendingCount() >= maxPendingEntries;
  }

  #mode(): WorkMode {
    if (this.#hold === "revoked") return "revoked";
    return this.acceptance().accepting ? "normal" : "no_new_work";
  }

  #wishFor(key: AttemptKey): { spec: DesiredInstance["container"]; generation: bigint } | undefined {
    const instance = this.#desired?.get(key.instanceId);
    if (this.#hold === "revoked" || instance?.state !== DesiredState.RUNNING || instance.attempt !== key.attempt)
      return undefined;
    return { spec: instance.container, generation: this.observedGeneration };
  }

  #keepsLogs(instanceId: InstanceId): boolean {
    const state = this.#desired?.get(instanceId)?.state;
    if (state === undefined) return this.#desired === undefined || this.#keepsUnnamed;
    return state !== DesiredState.REMOVED;
  }

  /** An older set than one seen cannot name what came after it. */
  get #keepsUnnamed(): boolean {
    return this.observedGeneration < this.#highestGeneration;
  }

  #use(set: DesiredSet | undefined): void {
    this.#set = set;
    if (set === undefined) return;
    const desired = new Map<InstanceId, DesiredInstance>();
    for (const instance of set.instances) {
      const instanceId = parseId("ins", instance.instanceId);
      if (instanceId !== undefined) desired.set(instanceId, instance);
    }
    this.#desired = desired;
  }

  #forget(situation: Situation): void {
    const keys = forgettable(situation, this.#options.journal.acknowledged).filter(
      (key) => !this.#lanes.busy().has(key.instanceId),
    );
    if (keys.length === 0) return;
    try {
      this.#book.forget(keys);
    } catch (error) {
      this.#options.log.warn({ error: messageOf(error) }, "the journal cannot be written");
    }
  }

  async #checkDisk(): Promise<void> {
    const { paths, minFreeMib } = this.#options;
    const free = await freeMib(paths.folder);
    this.#diskMessage =
      free !== undefined && free < minFreeMib
        ? `the disk is full: ${free} MiB are free, ${minFreeMib} are needed`
        : undefined;
  }

  /** Instances of which a workspace or logs are on the disk. */
  async #leftovers(): Promise<ReadonlySet<InstanceId>> {
    const names = await Promise.all(
      [this.#options.paths.workspaces, this.#options.paths.logs].map((folder) => readdir(folder).catch(ignoreMissing)),
    );
    const ids = names.flatMap((list) => list ?? []).map((name) => parseId("ins", name));
    return new Set(ids.filter((id) => id !== undefined));
  }
}
