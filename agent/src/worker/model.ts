// Desired set → actions, as a pure function: what shall be, what the engine shows and what the journal remembers go
// in, the next step of each instance comes out. It is asked again after every step and every change, so it plans one
// step at a time and never has to undo one. No clock, no engine, no journal in here.

import type { InstanceId } from "@clodei/proto/ids";
import type { RememberedPhase, StopReason } from "../journal/attempt-table.ts";

/** Names an attempt of an instance. */
export interface AttemptKey {
  readonly instanceId: InstanceId;
  readonly attempt: number;
}

/** What an attempt takes of the node. */
export interface Needs {
  readonly gpuUuids: readonly string[];
  readonly cpuMillis: number;
  readonly memoryMib: number;
}

/** What all attempts together may take of the node; each GPU is one attempt's. */
export type Capacity = Pick<Needs, "cpuMillis" | "memoryMib">;

/** What shall be with an instance. */
export interface DesiredAttempt extends AttemptKey {
  readonly state: "running" | "stopped" | "removed";
  /** Not to be started before, on the clock of `nowMs`. */
  readonly notBeforeMs: number;
  readonly needs: Needs;
}

/** What the engine shows of a container. */
export interface ObservedAttempt extends AttemptKey {
  readonly state: "created" | "running" | "exited";
}

/** What the journal remembers of an attempt. */
export interface RememberedAttempt extends AttemptKey {
  readonly phase: RememberedPhase;
  readonly stopReason: StopReason;
  /** Of the specification that was validated; undefined where it never came to that. */
  readonly needs: Needs | undefined;
  /** When its time is up, on the clock of `nowMs`; undefined without a limit. */
  readonly runDeadlineMs: number | undefined;
  /** Whether this process has looked after the running container: read its isolation back, meters it, keeps its logs. */
  readonly attended: boolean;
  /** Where the report of its end stands in the journal. */
  readonly reportSequence: bigint;
}

/**
 * How far the agent may go. `no_new_work`: what runs goes on, nothing is started (engine away, disk full, quarantine).
 * `revoked`: everything stops in order, and what belongs to customers stays on the disk.
 */
export type WorkMode = "normal" | "no_new_work" | "revoked";

/** A start that is under way, and what it takes: until its container is journaled nothing else tells of it. */
export interface StartingAttempt extends AttemptKey {
  readonly needs: Needs;
}

/** What a plan is made from. */
export interface Situation {
  /** The last desired set; undefined while none ever came: then nothing is started, stopped or removed. */
  readonly desired: ReadonlyMap<InstanceId, DesiredAttempt> | undefined;
  readonly observed: readonly ObservedAttempt[];
  readonly remembered: readonly RememberedAttempt[];
  readonly starting: readonly StartingAttempt[];
  /** Instances of which a workspace or logs are on the disk. */
  readonly leftovers: ReadonlySet<InstanceId>;
  /** Whether workspace and logs stay of an instance that the desired set does not name: the set is older than one seen. */
  readonly keepsUnnamed: boolean;
  readonly capacity: Capacity;
  /** Whether so many reports wait that no attempt is taken up of which nobody here has heard. */
  readonly journalFull: boolean;
  readonly mode: WorkMode;
  readonly nowMs: number;
}

/** The next step of an instance. */
export type Action = AttemptKey &
  (
    | {
        /** Check, pull, create, start; goes on from a container that was created. */ readonly kind: "start";
        readonly needs: Needs;
      }
    | { /** Look after a container that runs. */ readonly kind: "attend" }
    | { readonly kind: "stop"; readonly reason: Exclude<StopReason, "none"> }
    | { /** The container ended: report how. */ readonly kind: "finish" }
    | { /** There is no container: report the end. */ readonly kind: "end"; readonly cause: EndCause }
    | { readonly kind: "remove_container" }
    | {
        /** Workspace and logs go. `attempt` 0: none is known, so nothing is reported. */ readonly kind: "remove_instance";
      }
  );

/** Why an attempt without a container is over. */
export type EndCause = "never_started" | "vanished" | "gpu_in_use" | "cpu_in_use" | "memory_in_use";

/** The next steps, at most one an instance. */
export interface Plan {
  readonly actions: readonly Action[];
  /** When to plan again even if nothing happens, on the clock of `nowMs`. */
  readonly wakeAtMs: number | undefined;
}

/** Plans the next step of every instance. */
export function plan(situation: Situation): Plan {
  const holdings = new Holdings(situation);
  const views = viewsOf(situation);
  const actions: Action[] = [];
  let wakeAtMs: number | undefined;
  for (const view of views) {
    const step = nextStep(view, situation, holdings);
    if (typeof step === "number") wakeAtMs = Math.min(step, wakeAtMs ?? step);
    else if (step !== undefined) actions.push(step);
  }
  return { actions, wakeAtMs };
}

/**
 * Attempts that need not be remembered any more: their end is committed, no container is left, and the desired set
 * has gone past them, so that no set with a later generation can ask for them again.
 */
export function forgettable(situation: Situation, acknowledged: bigint): AttemptKey[] {
  const { desired } = situation;
  if (desired === undefined) return [];
  const present = new Set(situation.observed.map(keyText));
  return situation.remembered.filter((attempt) => {
    if (attempt.reportSequence > acknowledged || present.has(keyText(attempt))) return false;
    const wanted = desired.get(attempt.instanceId);
    if (wanted === undefined) return attempt.phase === "removed";
    return wanted.attempt > attempt.attempt && isOver(attempt.phase);
  });
}

/** Whether the attempt's end is written down. */
export function isOver(phase: RememberedPhase): boolean {
  return phase === "ended" || phase === "removed";
}

/** A text that is the key's alone. */
export function keyText(key: AttemptKey): string {
  return `${key.instanceId}/${key.attempt}`;
}

interface InstanceView {
  readonly instanceId: InstanceId;
  readonly wanted: DesiredAttempt | undefined;
  /** Ascending by attempt. */
  readonly containers: readonly ObservedAttempt[];
  readonly remembered: readonly RememberedAttempt[];
  readonly leftover: boolean;
}

function viewsOf(situation: Situation): InstanceView[] {
  const ids = new Set<InstanceId>(situation.leftovers);
  for (const { instanceId } of situation.observed) ids.add(instanceId);
  for (const { instanceId } of situation.remembered) ids.add(instanceId);
  for (const instanceId of situation.desired?.keys() ?? []) ids.add(instanceId);
  const containers = Map.groupBy(situation.observed, ({ instanceId }) => instanceId);
  const remembered = Map.groupBy(situation.remembered, ({ instanceId }) => instanceId);
  // Sorted, so that two instances that ask for one GPU are judged the same way at every start.
  return [...ids].toSorted().map((instanceId) => ({
    instanceId,
    wanted: situation.desired?.get(instanceId),
    containers: (containers.get(instanceId) ?? []).toSorted(byAttempt),
    remembered: (remembered.get(instanceId) ?? []).toSorted(byAttempt),
    leftover: situation.leftovers.has(instanceId),
  }));
}

function byAttempt(left: AttemptKey, right: AttemptKey): number {
  return left.attempt - right.attempt;
}

/** The next step, or when to ask again, or undefined where everything is as it shall be. */
function nextStep(view: InstanceView, situation: Situation, holdings: Holdings): Action | number | undefined {
  if (situation.desired === undefined) return stepWithoutDesired(view);
  const wanted = view.wanted?.state === "running" && situation.mode !== "revoked" ? view.wanted : undefined;
  for (const container of view.containers) {
    if (container.attempt !== wanted?.attempt)
      return stepToRemove(container, memoryOf(view, container.attempt), view.wanted);
  }
  for (const memory of view.remembered) {
    if (memory.attempt === wanted?.attempt || isOver(memory.phase) || containerOf(view, memory.attempt) !== undefined)
      continue;
    return { kind: "end", ...keyOf(memory), cause: memory.phase === "preparing" ? "never_started" : "vanished" };
  }
  if (wanted !== undefined) return stepToRun(view, wanted, situation, holdings);
  if (situation.mode === "revoked" || (view.wanted === undefined && situation.keepsUnnamed)) return undefined;
  if (situation.journalFull && view.wanted !== undefined && memoryOf(view, view.wanted.attempt) === undefined)
    return undefined;
  return stepWithoutContainer(view);
}

/** Nobody has said yet what shall be: look after what runs, report what ended, touch nothing else. */
function stepWithoutDesired(view: InstanceView): Action | undefined {
  for (const container of view.containers) {
    const memory = memoryOf(view, container.attempt);
    if (memory === undefined || isOver(memory.phase)) continue;
    if (container.state === "running" && !memory.attended) return { kind: "attend", ...keyOf(container) };
    if (container.state === "exited") return { kind: "finish", ...keyOf(container) };
  }
  return undefined;
}

function stepToRemove(
  container: ObservedAttempt,
  memory: RememberedAttempt | undefined,
  wanted: DesiredAttempt | undefined,
): Action {
  const key = keyOf(container);
  if (container.state === "running")
    return { kind: "stop", ...key, reason: wanted === undefined ? "gone" : "requested" };
  // A container that nobody remembers is reported as well: its exit code is known here alone.
  if (memory === undefined || !isOver(memory.phase)) return { kind: "finish", ...key };
  return { kind: "remove_container", ...key };
}

function stepToRun(
  view: InstanceView,
  wanted: DesiredAttempt,
  situation: Situation,
  holdings: Holdings,
): Action | number | undefined {
  const key = keyOf(wanted);
  const memory = memoryOf(view, wanted.attempt);
  const container = containerOf(view, wanted.attempt);
  if (memory !== undefined && isOver(memory.phase)) {
    if (container === undefined) return undefined;
    return container.state === "running"
      ? { kind: "stop", ...key, reason: "policy" }
      : { kind: "remove_container", ...key };
  }
  // An attempt never goes backwards, whatever a set says.
  if (view.remembered.some((other) => other.attempt > wanted.attempt)) return undefined;
  if (container?.state === "exited") return { kind: "finish", ...key };
  if (memory !== undefined && memory.stopReason !== "none" && container !== undefined) {
    return container.state === "running"
      ? { kind: "stop", ...key, reason: memory.stopReason }
      : { kind: "finish", ...key };
  }
  if (container?.state === "running") return stepWhileRunning(key, memory, situation.nowMs);
  // The mark of a start without a container: it was there and is gone. It is not made again.
  if (container === undefined && (memory?.phase === "starting" || memory?.phase === "running")) {
    return { kind: "end", ...key, cause: "vanished" };
  }
  if (situation.mode !== "normal") return undefined;
  if (wanted.notBeforeMs > situation.nowMs) return wanted.notBeforeMs;
  // What was validated and created is what runs, whatever a later set says about the same attempt.
  const needs = memory?.needs ?? wanted.needs;
  const verdict = holdings.claim(key, needs);
  switch (verdict) {
    case "free":
      return { kind: "start", ...key, needs };
    case "wait":
      return undefined;
    case "gpu_in_use":
    case "cpu_in_use":
    case "memory_in_use":
      return container === undefined ? { kind: "end", ...key, cause: verdict } : undefined;
  }
}

function stepWhileRunning(
  key: AttemptKey,
  memory: RememberedAttempt | undefined,
  nowMs: number,
): Action | number | undefined {
  if (memory?.attended !== true) return { kind: "attend", ...key };
  if (memory.runDeadlineMs === undefined) return undefined;
  return memory.runDeadlineMs > nowMs ? memory.runDeadlineMs : { kind: "stop", ...key, reason: "max_run_time" };
}

/** Nothing runs and nothing shall: report what was asked for, and clear away what shall not be kept. */
function stepWithoutContainer(view: InstanceView): Action | undefined {
  const { wanted } = view;
  const newest = view.remembered.at(-1);
  if (wanted?.state === "stopped") {
    if (newest !== undefined && newest.attempt >= wanted.attempt) return undefined;
    return { kind: "end", ...keyOf(wanted), cause: "never_started" };
  }
  if (newest?.phase === "removed" && newest.attempt >= (wanted?.attempt ?? 0) && !view.leftover) return undefined;
  return {
    kind: "remove_instance",
    instanceId: view.instanceId,
    attempt: Math.max(wanted?.attempt ?? 0, newest?.attempt ?? 0),
  };
}

function memoryOf(view: InstanceView, attempt: number): RememberedAttempt | undefined {
  return view.remembered.find((memory) => memory.attempt === attempt);
}

function containerOf(view: InstanceView, attempt: number): ObservedAttempt | undefined {
  return view.containers.find((container) => container.attempt === attempt);
}

function keyOf(key: AttemptKey): AttemptKey {
  return { instanceId: key.instanceId, attempt: key.attempt };
}

/**
 * Who holds what of the node: whoever has a container, or is about to. The control plane places by the same numbers
 * (`createFleet` of its placement, which leaves some memory to the system besides) and frees them when an attempt's end
 * was reported: what it places fits here, and its capacity must never be more than this one.
 */
class Holdings {
  readonly #holders = new Map<string, Holder>();
  readonly #capacity: Capacity;

  constructor(situation: Situation) {
    this.#capacity = situation.capacity;
    const wantedOf = (key: AttemptKey): DesiredAttempt | undefined => {
      const desired = situation.desired?.get(key.instanceId);
      return desired?.state === "running" && desired.attempt === key.attempt ? desired : undefined;
    };
    const hold = (key: AttemptKey, needs: Needs | undefined, standing: Holder["standing"]): void => {
      if (needs === undefined) return;
      this.#holders.set(keyText(key), {
        ...keyOf(key),
        needs,
        standing: wantedOf(key) === undefined ? "leaves" : standing,
      });
    };
    for (const start of situation.starting) hold(start, start.needs, "begins");
    const alive = situation.observed.filter(({ state }) => state !== "exited");
    // Of a container that nobody remembers, all that is known is what is wanted of it.
    for (const container of alive) hold(container, wantedOf(container)?.needs, "stays");
    const present = new Set(alive.map(keyText));
    for (const memory of situation.remembered) {
      if (!isOver(memory.phase)) hold(memory, memory.needs, "stays");
      else if (present.has(keyText(memory))) hold(memory, memory.needs, "leaves");
    }
  }

  /** Takes what the attempt needs, unless others have it: for good, or perhaps not for long. */
  claim(key: AttemptKey, needs: Needs): "free" | "wait" | "gpu_in_use" | "cpu_in_use" | "memory_in_use" {
    // The judge refuses what is too large for the node, and says all that is wrong with it. It takes nothing.
    if (this.#lackBeside([], needs) !== undefined) return "free";
    const others = [...this.#holders.values()].filter(({ instanceId }) => instanceId !== key.instanceId);
    if (others.some((other) => other.standing !== "leaves" && shareGpu(other.needs, needs))) return "gpu_in_use";
    const staying = others.filter(({ standing }) => standing === "stays");
    const lack = this.#lackBeside(staying, needs);
    if (lack !== undefined) return lack;
    if (others.some((other) => shareGpu(other.needs, needs))) return "wait";
    if (this.#lackBeside(others, needs) !== undefined) return "wait";
    this.#holders.set(keyText(key), { ...keyOf(key), needs, standing: "begins" });
    return "free";
  }

  #lackBeside(holders: readonly Holder[], needs: Needs): "cpu_in_use" | "memory_in_use" | undefined {
    let { cpuMillis, memoryMib } = needs;
    for (const { needs: held } of holders) {
      cpuMillis += held.cpuMillis;
      memoryMib += held.memoryMib;
    }
    if (cpuMillis > this.#capacity.cpuMillis) return "cpu_in_use";
    return memoryMib > this.#capacity.memoryMib ? "memory_in_use" : undefined;
  }
}

/** `begins`: its specification may still be refused, so nobody is refused for the sake of its CPU and memory. */
interface Holder extends AttemptKey {
  readonly needs: Needs;
  readonly standing: "stays" | "leaves" | "begins";
}

function shareGpu(one: Needs, other: Needs): boolean {
  return one.gpuUuids.some((uuid) => other.gpuUuids.includes(uuid));
}
