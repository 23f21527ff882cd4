import { describe, it } from "node:test";
import assert from "node:assert/strict";
import fc from "fast-check";
import { newId } from "@clodei/proto/ids";
import type { InstanceId } from "@clodei/proto/ids";
import { forgettable, isOver, keyText, plan } from "./model.ts";
import type {
  Action,
  AttemptKey,
  DesiredAttempt,
  ObservedAttempt,
  RememberedAttempt,
  Situation,
  WorkMode,
  Capacity,
  Needs,
} from "./model.ts";

const ids = Array.from({ length: 3 }, (_, index) => newId("ins", index + 1)) as InstanceId[];
const gpuNames = ["GPU-SIM-a", "GPU-SIM-b"];

function first(): InstanceId {
  const [id] = ids;
  assert.ok(id !== undefined);
  return id;
}

/** Two of the three instances of a world have room side by side. */
const capacity: Capacity = { cpuMillis: 2000, memoryMib: 4096 };

function needs(gpuUuids: readonly string[], cpuMillis = 1000, memoryMib = 64): Needs {
  return { gpuUuids, cpuMillis, memoryMib };
}

function memory(part: Partial<RememberedAttempt> = {}): RememberedAttempt {
  return {
    instanceId: first(),
    attempt: 1,
    phase: "running",
    stopReason: "none",
    needs: undefined,
    runDeadlineMs: undefined,
    attended: true,
    reportSequence: 1n,
    ...part,
  };
}

function situation(part: Partial<Situation> & { wanted?: Partial<DesiredAttempt> }): Situation {
  const desired = new Map<InstanceId, DesiredAttempt>();
  if (part.wanted !== undefined) {
    desired.set(first(), {
      instanceId: first(),
      attempt: 1,
      state: "running",
      notBeforeMs: 0,
      needs: needs([]),
      ...part.wanted,
    });
  }
  return {
    desired,
    observed: [],
    remembered: [],
    starting: [],
    leftovers: new Set(),
    keepsUnnamed: false,
    capacity,
    journalFull: false,
    mode: "normal",
    nowMs: 1000,
    ...part,
  };
}

function only(value: Situation): Action | undefined {
  const { actions } = plan(value);
  assert.ok(actions.length <= 1);
  return actions[0];
}

const container = (state: ObservedAttempt["state"], attempt = 1): ObservedAttempt => ({
  instanceId: first(),
  attempt,
  state,
});

describe("the plan of one instance", () => {
  it("starts what shall run and goes on from a container that was created", () => {
    assert.equal(only(situation({ wanted: {} }))?.kind, "start");
    assert.equal(
      only(situation({ wanted: {}, observed: [container("created")], remembered: [memory({ phase: "starting" })] }))
        ?.kind,
      "start",
    );
  });

  it("waits until the time before which it must not start, and says when that is", () => {
    const result = plan(situation({ wanted: { notBeforeMs: 5000 } }));
    assert.deepEqual(result, { actions: [], wakeAtMs: 5000 });
  });

  it("adopts a container that runs and does nothing more", () => {
    const running = { wanted: {}, observed: [container("running")] };
    assert.equal(only(situation({ ...running, remembered: [memory({ attended: false })] }))?.kind, "attend");
    assert.equal(only(situation({ ...running }))?.kind, "attend");
    assert.equal(only(situation({ ...running, remembered: [memory()] })), undefined);
  });

  it("never starts a finished attempt again", () => {
    for (const phase of ["ended", "removed"] as const)
      assert.equal(only(situation({ wanted: {}, remembered: [memory({ phase })] })), undefined);
  });

  it("ends an attempt whose container vanished after its start was marked, and starts one that was only prepared", () => {
    for (const phase of ["starting", "running"] as const) {
      assert.deepEqual(only(situation({ wanted: {}, remembered: [memory({ phase })] })), {
        kind: "end",
        instanceId: first(),
        attempt: 1,
        cause: "vanished",
      });
    }
    assert.equal(only(situation({ wanted: {}, remembered: [memory({ phase: "preparing" })] }))?.kind, "start");
  });

  it("stops a container whose time is up, and names when it will be", () => {
    const at = (runDeadlineMs: number) =>
      situation({ wanted: {}, observed: [container("running")], remembered: [memory({ runDeadlineMs })] });
    assert.deepEqual(plan(at(1500)), { actions: [], wakeAtMs: 1500 });
    assert.deepEqual(only(at(1000)), { kind: "stop", instanceId: first(), attempt: 1, reason: "max_run_time" });
  });

  it("reports the end of a stopped attempt that never came to a container", () => {
    assert.deepEqual(only(situation({ wanted: { state: "stopped" } })), {
      kind: "end",
      instanceId: first(),
      attempt: 1,
      cause: "never_started",
    });
  });

  it("stops, finishes and removes a container that nobody knows, then workspace and logs", () => {
    assert.deepEqual(only(situation({ observed: [container("running")] })), {
      kind: "stop",
      instanceId: first(),
      attempt: 1,
      reason: "gone",
    });
    assert.equal(only(situation({ observed: [container("exited")] }))?.kind, "finish");
    assert.equal(
      only(situation({ observed: [container("exited")], remembered: [memory({ phase: "ended" })] }))?.kind,
      "remove_container",
    );
    assert.equal(only(situation({ remembered: [memory({ phase: "ended" })] }))?.kind, "remove_instance");
    assert.equal(only(situation({ leftovers: new Set([first()]) }))?.kind, "remove_instance");
  });

  it("stops what an older set does not name, and keeps its workspace and logs", () => {
    const older = { keepsUnnamed: true, leftovers: new Set([first()]) };
    assert.equal(only(situation({ ...older, observed: [container("running")] }))?.kind, "stop");
    const ended = [memory({ phase: "ended" })];
    assert.equal(
      only(situation({ ...older, observed: [container("exited")], remembered: ended }))?.kind,
      "remove_container",
    );
    assert.equal(only(situation({ ...older, remembered: ended })), undefined);
    assert.equal(
      only(situation({ ...older, wanted: { state: "removed" }, remembered: ended }))?.kind,
      "remove_instance",
    );
  });

  it("touches nothing before the first desired set, but reports what ended", () => {
    const unknown = { ...situation({}), desired: undefined };
    assert.equal(only({ ...unknown, observed: [container("running")], leftovers: new Set([first()]) }), undefined);
    assert.equal(only({ ...unknown, observed: [container("exited")], remembered: [memory()] })?.kind, "finish");
    assert.equal(only({ ...unknown, remembered: [memory({ phase: "ended" })] }), undefined);
  });

  it("takes no new work where it may not, and lets run what runs", () => {
    assert.equal(only(situation({ wanted: {}, mode: "no_new_work" })), undefined);
    assert.equal(
      only(
        situation({
          wanted: {},
          mode: "no_new_work",
          observed: [container("created")],
          remembered: [memory({ phase: "preparing" })],
        }),
      ),
      undefined,
    );
    assert.equal(
      only(situation({ wanted: {}, mode: "no_new_work", observed: [container("running")], remembered: [memory()] })),
      undefined,
    );
    assert.equal(
      only(
        situation({
          wanted: { state: "stopped" },
          mode: "no_new_work",
          observed: [container("running")],
          remembered: [memory()],
        }),
      )?.kind,
      "stop",
    );
  });

  it("takes up no attempt that it has not heard of while the journal is full, and ends what it knows", () => {
    const full = { journalFull: true, mode: "no_new_work" as const };
    assert.equal(only(situation({ ...full, wanted: { state: "stopped" } })), undefined);
    assert.equal(only(situation({ ...full, wanted: { state: "removed" } })), undefined);
    const ended = [memory({ phase: "ended" })];
    assert.equal(only(situation({ ...full, wanted: { state: "removed", attempt: 2 }, remembered: ended })), undefined);
    assert.equal(
      only(situation({ ...full, wanted: { state: "removed" }, remembered: ended }))?.kind,
      "remove_instance",
    );
    assert.equal(only(situation({ ...full, remembered: ended }))?.kind, "remove_instance");
    const running = { ...full, observed: [container("running")], remembered: [memory()] };
    assert.equal(only(situation({ ...running, wanted: { state: "stopped" } }))?.kind, "stop");
  });

  it("stops everything in order after a revocation and keeps workspaces", () => {
    assert.equal(
      only(situation({ wanted: {}, mode: "revoked", observed: [container("running")], remembered: [memory()] }))?.kind,
      "stop",
    );
    assert.equal(
      only(situation({ mode: "revoked", remembered: [memory({ phase: "ended" })], leftovers: new Set([first()]) })),
      undefined,
    );
  });

  it("ends an attempt that asks for a GPU which another keeps, and waits for one that another leaves", () => {
    const [one, two] = ids;
    assert.ok(one !== undefined && two !== undefined);
    const want = (instanceId: InstanceId, state: DesiredAttempt["state"]): [InstanceId, DesiredAttempt] => [
      instanceId,
      { instanceId, attempt: 1, state, notBeforeMs: 0, needs: needs(["GPU-SIM-a"]) },
    ];
    const base = {
      ...situation({}),
      observed: [{ instanceId: one, attempt: 1, state: "running" as const }],
      remembered: [memory({ needs: needs(["GPU-SIM-a"]) })],
    };
    const kept = plan({ ...base, desired: new Map([want(one, "running"), want(two, "running")]) });
    assert.deepEqual(kept.actions, [{ kind: "end", instanceId: two, attempt: 1, cause: "gpu_in_use" }]);
    const leaving = plan({ ...base, desired: new Map([want(one, "stopped"), want(two, "running")]) });
    assert.deepEqual(leaving.actions, [{ kind: "stop", instanceId: one, attempt: 1, reason: "requested" }]);
    const starting = [{ instanceId: two, attempt: 1, needs: needs(["GPU-SIM-a"]) }];
    const early = plan({ ...situation({}), starting, desired: new Map([want(one, "running"), want(two, "running")]) });
    assert.deepEqual(early.actions[0], { kind: "end", instanceId: one, attempt: 1, cause: "gpu_in_use" });
    const cutOff = plan({ ...situation({}), starting, desired: new Map([want(one, "running"), want(two, "stopped")]) });
    assert.ok(!cutOff.actions.some(({ kind }) => kind === "start"), "a start that is being cut off still has its GPUs");
    const both = plan({ ...situation({}), desired: new Map([want(one, "running"), want(two, "running")]) });
    assert.deepEqual(
      both.actions.map(({ kind, instanceId }) => [kind, instanceId]),
      [
        ["start", one],
        ["end", two],
      ],
    );
  });

  it("ends an attempt for which the node is too small beside those that stay, and waits for those that leave", () => {
    const [one, two] = ids;
    assert.ok(one !== undefined && two !== undefined);
    const plans = (
      held: Needs,
      asked: Needs,
      state: DesiredAttempt["state"] = "running",
      part: Partial<Situation> = {},
    ) => {
      const want = (
        instanceId: InstanceId,
        value: Needs,
        of: DesiredAttempt["state"],
      ): [InstanceId, DesiredAttempt] => [
        instanceId,
        { instanceId, attempt: 1, state: of, notBeforeMs: 0, needs: value },
      ];
      const { actions } = plan({
        ...situation({}),
        observed: [{ instanceId: one, attempt: 1, state: "running" }],
        remembered: [memory({ needs: held })],
        desired: new Map([want(one, held, state), want(two, asked, "running")]),
        ...part,
      });
      const action = actions.find(({ instanceId }) => instanceId === two);
      return action?.kind === "end" ? action.cause : action?.kind;
    };
    assert.equal(plans(needs([], 1500), needs([], 500)), "start", "what just fits is started");
    assert.equal(plans(needs([], 1500), needs([], 501)), "cpu_in_use");
    assert.equal(plans(needs([], 1, 4000), needs([], 1, 97)), "memory_in_use");
    assert.equal(plans(needs([], 1500), needs([], 501), "stopped"), undefined, "it waits");
    assert.equal(plans(needs([], 1500), needs([], 2001)), "start", "the judge refuses it, and says why");
    const begins = {
      observed: [],
      remembered: [],
      starting: [{ instanceId: one, attempt: 1, needs: needs([], 1500) }],
    };
    assert.equal(plans(needs([], 1500), needs([], 501), "running", begins), undefined, "the other may be refused yet");
    // A container that nobody remembers has what is wanted of it.
    assert.equal(plans(needs([], 1500), needs([], 501), "running", { remembered: [] }), "cpu_in_use");
    // An end that was reported while the container is still there.
    const over = { remembered: [memory({ needs: needs([], 1500), phase: "ended" as const })] };
    assert.equal(plans(needs([], 1500), needs([], 501), "running", over), undefined);
    // What was validated counts, not what a later set says of the same attempt.
    const prepared = memory({ instanceId: two, phase: "preparing", needs: needs([], 1900) });
    const lied = { remembered: [memory({ needs: needs([], 500) }), prepared] };
    assert.equal(plans(needs([], 500), needs([], 1), "running", lied), "cpu_in_use");
  });

  it("forgets an attempt only when its end is committed, its container gone and the desired set past it", () => {
    const ended = memory({ phase: "ended", reportSequence: 7n });
    const past = situation({ wanted: { attempt: 2 }, remembered: [ended] });
    assert.deepEqual(forgettable(past, 6n), []);
    assert.equal(forgettable(past, 7n).length, 1);
    assert.deepEqual(forgettable({ ...past, observed: [container("exited")] }, 7n), []);
    assert.deepEqual(forgettable(situation({ wanted: {}, remembered: [ended] }), 7n), []);
    assert.deepEqual(forgettable(situation({ remembered: [ended] }), 7n), []);
    assert.equal(forgettable(situation({ remembered: [memory({ phase: "removed" })] }), 7n).length, 1);
  });
});

/**
 * A node in small: an engine, a journal and a process that dies. It takes the same steps in the same order as the
 * executor, so a crash can fall between any two of them.
 */
class World {
  readonly containers = new Map<string, ObservedAttempt>();
  readonly memories = new Map<string, RememberedAttempt>();
  readonly starts = new Map<string, number>();
  readonly everEnded = new Set<string>();
  readonly leftovers = new Set<InstanceId>();
  desired: Map<InstanceId, DesiredAttempt> | undefined;
  generation = 0;
  mode: WorkMode = "normal";
  nowMs = 0;
  attended = new Set<string>();
  acknowledged = 0n;
  sequence = 0n;

  situation(): Situation {
    return {
      desired: this.desired,
      observed: [...this.containers.values()],
      remembered: [...this.memories.values()].map((value) => ({
        ...value,
        attended: this.attended.has(keyText(value)),
      })),
      starting: [],
      leftovers: this.leftovers,
      keepsUnnamed: false,
      capacity,
      journalFull: false,
      mode: this.mode,
      nowMs: this.nowMs,
    };
  }

  remember(key: AttemptKey, part: Partial<RememberedAttempt>): void {
    this.sequence += 1n;
    const old = this.memories.get(keyText(key)) ?? {
      ...memory({ phase: "preparing", attended: false }),
      instanceId: key.instanceId,
      attempt: key.attempt,
    };
    this.memories.set(keyText(key), { ...old, ...part, reportSequence: this.sequence });
    if (part.phase === "ended") this.everEnded.add(keyText(key));
  }

  observe(key: AttemptKey, state: ObservedAttempt["state"]): void {
    this.containers.set(keyText(key), { instanceId: key.instanceId, attempt: key.attempt, state });
    const ofInstance = [...this.containers.values()].filter(({ instanceId }) => instanceId === key.instanceId);
    assert.ok(ofInstance.length <= 1, `two containers of ${key.instanceId}`);
  }

  /** The steps of an action, each of which is atomic. */
  steps(action: Action): (() => void)[] {
    const text = keyText(action);
    const key = { instanceId: action.instanceId, attempt: action.attempt };
    switch (action.kind) {
      case "start":
        return [
          () => {
            if (!this.memories.has(text)) this.remember(key, { phase: "preparing", needs: action.needs });
          },
          () => {
            this.leftovers.add(key.instanceId);
            // A container that is there is adopted.
            if (!this.containers.has(text)) this.observe(key, "created");
          },
          () => this.remember(key, { phase: "starting" }),
          () => {
            this.starts.set(text, (this.starts.get(text) ?? 0) + 1);
            assert.ok(!this.everEnded.has(text), `${text} was started after its end`);
            this.observe(key, "running");
            const held = [...this.containers.values()]
              .filter(({ state }) => state === "running")
              .flatMap((other) => this.memories.get(keyText(other))?.needs ?? []);
            const uuids = held.flatMap(({ gpuUuids }) => gpuUuids);
            assert.equal(new Set(uuids).size, uuids.length, "one GPU in two containers");
            const cpuMillis = held.reduce((sum, other) => sum + other.cpuMillis, 0);
            assert.ok(cpuMillis <= capacity.cpuMillis, `${cpuMillis} CPU millis in use`);
          },
          () => this.remember(key, { phase: "running" }),
          () => void this.attended.add(text),
        ];
      case "attend":
        return [() => this.remember(key, { phase: "running" }), () => void this.attended.add(text)];
      case "stop":
        return [() => this.remember(key, { stopReason: action.reason }), () => this.observe(key, "exited")];
      case "finish":
      case "end":
        return [() => this.remember(key, { phase: "ended" })];
      case "remove_container":
        return [() => void this.containers.delete(text)];
      case "remove_instance":
        return [
          () => void this.leftovers.delete(key.instanceId),
          () => {
            for (const old of this.memories.values())
              if (old.instanceId === key.instanceId) this.remember(old, { phase: "removed" });
            if (key.attempt > 0) this.remember(key, { phase: "removed" });
          },
        ];
    }
  }

  /** Takes the planned steps, and dies after some of them. */
  work(stepsUntilDeath: number): void {
    let left = stepsUntilDeath;
    const { actions } = plan(this.situation());
    assert.equal(
      new Set(actions.map(({ instanceId }) => instanceId)).size,
      actions.length,
      "two actions of an instance",
    );
    for (const action of actions) {
      if (action.kind === "start") {
        const others = [...this.containers.values()].filter(
          (other) => other.instanceId === action.instanceId && other.attempt !== action.attempt,
        );
        assert.deepEqual(others, [], "lower attempts are removed first");
      }
      for (const step of this.steps(action)) {
        if (left-- <= 0) {
          this.attended = new Set();
          return;
        }
        step();
      }
    }
  }

  converge(): void {
    for (let round = 0; round < 60; round++) {
      const { actions, wakeAtMs } = plan(this.situation());
      if (actions.length === 0 && wakeAtMs === undefined) return;
      if (actions.length === 0 && wakeAtMs !== undefined) this.nowMs = wakeAtMs;
      this.work(Number.POSITIVE_INFINITY);
    }
    assert.fail("does not converge");
  }
}

type Event =
  | { readonly kind: "work"; readonly steps: number }
  | {
      readonly kind: "desire";
      readonly index: number;
      readonly state: DesiredAttempt["state"] | "absent" | "next";
      readonly gpu: number;
      readonly delay: number;
    }
  | { readonly kind: "late"; readonly index: number }
  | { readonly kind: "exit" | "vanish" | "acknowledge" | "restart"; readonly index: number }
  | { readonly kind: "mode"; readonly mode: WorkMode };

const events = fc.oneof(
  { weight: 6, arbitrary: fc.record({ kind: fc.constant("work" as const), steps: fc.integer({ min: 0, max: 12 }) }) },
  {
    weight: 4,
    arbitrary: fc.record({
      kind: fc.constant("desire" as const),
      index: fc.nat({ max: 2 }),
      state: fc.constantFrom(
        "running" as const,
        "stopped" as const,
        "removed" as const,
        "absent" as const,
        "next" as const,
      ),
      gpu: fc.integer({ min: -1, max: 1 }),
      delay: fc.constantFrom(0, 500),
    }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constantFrom("exit" as const, "vanish" as const, "acknowledge" as const, "restart" as const),
      index: fc.nat({ max: 2 }),
    }),
  },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("late" as const), index: fc.nat({ max: 2 }) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant("mode" as const),
      mode: fc.constantFrom("normal" as const, "no_new_work" as const),
    }),
  },
);

function happen(world: World, event: Event, attempts: Map<InstanceId, number>): void {
  switch (event.kind) {
    case "work":
      return world.work(event.steps);
    case "mode":
      world.mode = event.mode;
      return;
    case "desire":
      return desire(world, event, attempts);
    case "restart":
      world.attended = new Set();
      return;
    case "acknowledge":
      world.acknowledged = world.sequence;
      for (const key of forgettable(world.situation(), world.acknowledged)) world.memories.delete(keyText(key));
      return;
    case "exit":
    case "vanish":
    case "late": {
      const hit = [...world.containers.values()].find(({ instanceId }) => instanceId === ids[event.index]);
      if (hit === undefined) return;
      if (event.kind === "exit" && hit.state === "running") world.observe(hit, "exited");
      if (event.kind === "vanish") world.containers.delete(keyText(hit));
      return;
    }
  }
}

function desire(world: World, event: Extract<Event, { kind: "desire" }>, attempts: Map<InstanceId, number>): void {
  const instanceId = ids[event.index];
  assert.ok(instanceId !== undefined);
  const next = new Map(world.desired ?? []);
  const current = next.get(instanceId);
  if (event.state === "absent") next.delete(instanceId);
  else {
    // As the control plane does it: an instance that ran is only started again as a new attempt.
    const fresh =
      event.state === "next" || current === undefined || (event.state === "running" && current.state !== "running");
    const attempt = (attempts.get(instanceId) ?? 0) + (fresh ? 1 : 0);
    attempts.set(instanceId, attempt);
    const gpu = gpuNames[event.gpu];
    next.set(instanceId, {
      instanceId,
      attempt,
      state: event.state === "next" ? "running" : event.state,
      notBeforeMs: world.nowMs + event.delay,
      needs: fresh || current === undefined ? needs(gpu === undefined ? [] : [gpu]) : current.needs,
    });
  }
  world.desired = next;
}

describe("the plan under every order of events and every crash", () => {
  it("starts an attempt once, never after its end, never beside another of the instance, and converges", () => {
    fc.assert(
      fc.property(fc.array(events, { minLength: 10, maxLength: 80, size: "max" }), (history) => {
        const world = new World();
        const attempts = new Map<InstanceId, number>();
        for (const event of history) happen(world, event, attempts);
        world.mode = "normal";
        world.converge();
        for (const [key, count] of world.starts) assert.equal(count, 1, `${key} was started ${count} times`);
        assertAsDesired(world);
      }),
      { numRuns: 1500 },
    );
  });

  it("comes to the same end whatever the desired set repeats", () => {
    fc.assert(
      fc.property(fc.array(events, { maxLength: 30 }), (history) => {
        const world = new World();
        const attempts = new Map<InstanceId, number>();
        for (const event of history) happen(world, event, attempts);
        world.mode = "normal";
        world.converge();
        const before = JSON.stringify([...world.containers], undefined, 0);
        world.desired = new Map(world.desired);
        world.converge();
        assert.equal(JSON.stringify([...world.containers], undefined, 0), before);
      }),
      { numRuns: 100 },
    );
  });
});

function assertAsDesired(world: World): void {
  if (world.desired === undefined) return;
  for (const container of world.containers.values()) {
    const wanted = world.desired.get(container.instanceId);
    assert.equal(wanted?.state, "running", `${keyText(container)} shall not be there`);
    assert.equal(wanted?.attempt, container.attempt);
  }
  for (const wanted of world.desired.values()) {
    const text = keyText(wanted);
    const memory = world.memories.get(text);
    if (wanted.state === "running") {
      assert.ok(
        world.containers.get(text)?.state === "running" || (memory !== undefined && isOver(memory.phase)),
        `${text} neither runs nor ended`,
      );
    } else {
      assert.ok(memory !== undefined && isOver(memory.phase), `the end of ${text} is not reported`);
    }
    if (wanted.state === "removed") assert.ok(!world.leftovers.has(wanted.instanceId));
  }
  for (const leftover of world.leftovers)
    assert.ok(world.desired.has(leftover), "the workspace of an unknown instance is left");
}
