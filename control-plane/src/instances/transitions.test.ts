import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { create } from "@bufbuild/protobuf";
import { InstanceSpecSchema, RestartPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { newId } from "@clodei/proto/ids";
import fc from "fast-check";
import type { CommandOutcome, EventDraft, Outcome } from "./attempts.ts";
import { remove, restart, start, stop } from "./commands.ts";
import { desiredOf, holdsAllocation, type Instance, pinnedNodeOf, type Reason, type State } from "./model.ts";
import {
  applyReport,
  type AttemptReport,
  expire,
  explainPending,
  loseContainer,
  loseNode,
  noteGpuHealth,
  noteReachability,
  schedule,
} from "./transitions.ts";

const nodeId = newId("nod", 1);
const otherNodeId = newId("nod", 2);
const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
const gpu = { uuid: "GPU-SIM-1", model: "H100-SXM", memoryMib: 81559, simulated: true };
const zero = new Date(1_700_000_000_000);

function after(seconds: number): Date {
  return new Date(zero.getTime() + seconds * 1000);
}

function pending(restartPolicy: RestartPolicy = RestartPolicy.NEVER): Instance {
  return {
    id: newId("ins", 1),
    organizationId: newId("org", 1),
    spec: create(InstanceSpecSchema, { image: "docker.io/library/busybox:latest", memoryMib: 1024, restartPolicy }),
    createdBy: "key_1",
    createTime: zero,
    updateTime: zero,
    version: 1n,
    eventCount: 1n,
    attempt: 1,
    restartCount: 0,
    status: { state: "PENDING", queueTime: zero, deadline: after(600), message: "" },
    place: undefined,
    gpus: [],
    startTime: undefined,
    finishTime: undefined,
    exitCode: undefined,
    imageDigest: "",
    imageId: "",
    isolation: undefined,
  };
}

function report(attempt: number, phase: AttemptReport["phase"], fields: Partial<AttemptReport> = {}): AttemptReport {
  return {
    attempt,
    phase,
    reason: "",
    message: "",
    exitCode: undefined,
    progress: undefined,
    imageDigest: "",
    imageId: "",
    startTime: phase === "RUNNING" ? after(10) : undefined,
    finishTime: phase === "ENDED" ? after(20) : undefined,
    isolation: undefined,
    ...fields,
  };
}

const placement = { nodeId, location, gpus: [{ ...gpu, index: 0, usable: true, unhealthy: false, allocated: false }] };

function next(instance: Instance, outcome: CommandOutcome): Instance {
  return outcome === "unchanged" || outcome === "refused" ? instance : outcome.next;
}

function must(outcome: CommandOutcome): { next: Instance; events: readonly EventDraft[] } {
  assert.ok(outcome !== "unchanged" && outcome !== "refused", "something changed");
  return { ...outcome };
}

function running(restartPolicy?: RestartPolicy): Instance {
  const scheduled = must(schedule(pending(restartPolicy), placement)).next;
  return must(applyReport(scheduled, nodeId, report(1, "RUNNING"), after(10))).next;
}

const ended = (fields: Partial<AttemptReport>, attempt = 1) => report(attempt, "ENDED", fields);

describe("an attempt", () => {
  it("goes from PENDING over its node's reports to RUNNING and to its end, with its place and GPUs", () => {
    let instance = must(schedule(pending(), placement)).next;
    assert.equal(instance.status.state, "SCHEDULED");
    assert.deepEqual(instance.place?.location, location);
    assert.deepEqual(instance.gpus, [gpu]);
    const progress = { bytesDone: 1n, bytesTotal: 2n };
    for (const [phase, fields] of [
      ["PULLING", { progress }],
      ["CREATING", { imageDigest: "sha256:aa", imageId: "sha256:bb" }],
      ["RUNNING", {}],
    ] as const) {
      instance = must(applyReport(instance, nodeId, report(1, phase, fields), after(5))).next;
      assert.equal(instance.status.state, phase);
    }
    assert.equal(instance.imageDigest, "sha256:aa");
    assert.deepEqual(instance.startTime, after(10));
    instance = must(applyReport(instance, nodeId, ended({ reason: "EXITED_NONZERO", exitCode: 3 }), after(21))).next;
    assert.deepEqual(instance.status, {
      state: "FAILED",
      reason: "EXITED_NONZERO",
      message: "The process ended with exit code 3.",
    });
    assert.equal(instance.exitCode, 3);
    assert.deepEqual(instance.finishTime, after(20));
    assert.deepEqual(instance.gpus, []);
  });

  it("that ended with 0 is STOPPED with COMPLETED, whether the node says so or only the exit code", () => {
    for (const fields of [{ reason: "COMPLETED" as const, exitCode: 0 }, { exitCode: 0 }]) {
      const instance = must(applyReport(running(), nodeId, ended(fields), after(20))).next;
      assert.deepEqual(instance.status, { state: "STOPPED", reason: "COMPLETED", message: "" });
    }
  });

  it("is not moved by a report that is late, doubled, of another attempt or of another node", () => {
    const instance = running();
    for (const phase of ["PULLING", "CREATING", "RUNNING"] as const) {
      assert.equal(applyReport(instance, nodeId, report(1, phase), after(30)), "unchanged", phase);
    }
    for (const phase of ["PULLING", "CREATING", "RUNNING", "STOPPING", "ENDED", "REMOVED"] as const) {
      assert.equal(applyReport(instance, otherNodeId, report(1, phase), after(30)), "unchanged", phase);
      assert.equal(applyReport(instance, nodeId, report(2, phase), after(30)), "unchanged", phase);
    }
    const second = must(
      start(must(applyReport(instance, nodeId, ended({ exitCode: 0 }), after(20))).next, after(30)),
    ).next;
    assert.equal(second.attempt, 2);
    const placed = must(schedule(second, placement)).next;
    for (const phase of ["RUNNING", "ENDED", "REMOVED"] as const) {
      assert.equal(applyReport(placed, nodeId, report(1, phase), after(40)), "unchanged", phase);
    }
  });

  it("shows progress that grows, without events", () => {
    const at = (bytesDone: bigint) => report(1, "PULLING", { progress: { bytesDone, bytesTotal: 100n } });
    const pulling = must(applyReport(must(schedule(pending(), placement)).next, nodeId, at(5n), after(1))).next;
    const more = must(applyReport(pulling, nodeId, at(50n), after(2)));
    assert.deepEqual(more.events, []);
    assert.equal(applyReport(more.next, nodeId, at(50n), after(3)), "unchanged");
    assert.equal(applyReport(more.next, nodeId, at(5n), after(3)), "unchanged");
  });
});

describe("commands", () => {
  it("stop an instance that waits at once, and one that has a node when its node says so", () => {
    assert.equal(must(stop(pending())).next.status.state, "STOPPED");
    const stopping = must(stop(running())).next;
    assert.equal(stopping.status.state, "STOPPING");
    assert.equal(desiredOf(stopping)?.state, "STOPPED");
    assert.deepEqual(stopping.gpus, [gpu], "the GPUs are in use until the attempt ended");
    const stopped = must(
      applyReport(stopping, nodeId, ended({ exitCode: 143, reason: "EXITED_NONZERO" }), after(20)),
    ).next;
    assert.deepEqual(stopped.status, { state: "STOPPED", reason: "STOPPED_BY_REQUEST", message: "" });
    assert.equal(stopped.exitCode, 143);
    assert.equal(stop(stopped), "unchanged");
  });

  it("start again on the node that has the workspace, and tell it of the old attempt until the new one is placed", () => {
    const stopped = must(applyReport(running(), nodeId, ended({ exitCode: 0 }), after(20))).next;
    const waiting = must(start(stopped, after(30))).next;
    assert.equal(waiting.status.state, "PENDING");
    assert.deepEqual(desiredOf(waiting), { nodeId, attempt: 1, state: "STOPPED", notBeforeTime: undefined });
    assert.equal(waiting.exitCode, undefined);
    const placed = must(schedule(waiting, placement)).next;
    assert.deepEqual(desiredOf(placed), { nodeId, attempt: 2, state: "RUNNING", notBeforeTime: undefined });
  });

  it("restart through a stop, told as one change with both events", () => {
    const restarting = must(restart(running(), after(20))).next;
    assert.equal(restarting.status.state, "STOPPING");
    const again = must(applyReport(restarting, nodeId, ended({ exitCode: 143 }), after(21)));
    assert.equal(again.next.status.state, "PENDING");
    assert.equal(again.next.attempt, 2);
    assert.deepEqual(
      again.events.map(({ attempt, state }) => [attempt, state]),
      [
        [1, "STOPPED"],
        [2, "PENDING"],
      ],
    );
    const stopped = must(stop(restarting)).next;
    const over = must(applyReport(stopped, nodeId, ended({ exitCode: 143 }), after(21))).next;
    assert.equal(over.status.state, "STOPPED", "a stop after a restart wins");
  });

  it("delete at once what never had a node, and else when the node has removed it", () => {
    assert.equal(must(remove(pending(), after(1))).next.status.state, "DELETED");
    const stopping = must(remove(running(), after(20))).next;
    assert.equal(desiredOf(stopping)?.state, "REMOVED");
    const gone = must(applyReport(stopping, nodeId, ended({ exitCode: 137 }), after(21))).next;
    assert.equal(gone.status.state, "STOPPING");
    assert.deepEqual(gone.gpus, []);
    assert.ok(!holdsAllocation(gone));
    const removed = must(applyReport(gone, nodeId, report(1, "REMOVED"), after(22))).next;
    assert.equal(removed.status.state, "DELETED");
    for (const outcome of [
      start(removed, after(30)),
      restart(removed, after(30)),
      start(gone, after(30)),
      restart(gone, after(30)),
    ]) {
      assert.equal(outcome, "refused");
    }
  });

  it("delete one that waits for its second attempt by the attempt that its node knows", () => {
    const stopped = must(applyReport(running(), nodeId, ended({ exitCode: 0 }), after(20))).next;
    const deleting = must(remove(must(start(stopped, after(30))).next, after(31))).next;
    assert.deepEqual(desiredOf(deleting), { nodeId, attempt: 1, state: "REMOVED", notBeforeTime: undefined });
    assert.equal(must(applyReport(deleting, nodeId, report(1, "REMOVED"), after(32))).next.status.state, "DELETED");
  });
});

describe("the restart policy", () => {
  it("starts the next attempt on the same node and GPUs after a backoff that doubles, five times at most", () => {
    let instance = running(RestartPolicy.ON_FAILURE);
    for (const backoff of [1, 2, 4, 8, 16]) {
      const attempt = instance.attempt;
      const change = must(applyReport(instance, nodeId, ended({ exitCode: 1 }, attempt), after(0)));
      assert.deepEqual(
        change.events.map(({ state }) => state),
        ["FAILED", "SCHEDULED"],
      );
      instance = change.next;
      assert.deepEqual(instance.gpus, [gpu]);
      assert.deepEqual(desiredOf(instance), {
        nodeId,
        attempt: attempt + 1,
        state: "RUNNING",
        notBeforeTime: after(backoff),
      });
      instance = must(applyReport(instance, nodeId, report(attempt + 1, "RUNNING"), after(1))).next;
    }
    assert.equal(instance.restartCount, 5);
    const last = must(applyReport(instance, nodeId, ended({ exitCode: 1 }, 6), after(0))).next;
    assert.equal(last.status.state, "FAILED");
  });

  it("leaves alone what another attempt cannot mend, what completed, and what was stopped", () => {
    for (const reason of ["IMAGE_NOT_FOUND", "IMAGE_NOT_ALLOWED", "POLICY_VIOLATION"] as const) {
      const instance = must(applyReport(running(RestartPolicy.ALWAYS), nodeId, ended({ reason }), after(20))).next;
      assert.equal(instance.status.state, "FAILED", reason);
    }
    const completed = must(
      applyReport(running(RestartPolicy.ON_FAILURE), nodeId, ended({ exitCode: 0 }), after(20)),
    ).next;
    assert.equal(completed.status.state, "STOPPED");
    const timedOut = ended({ reason: "MAX_RUN_TIME_REACHED", exitCode: 143 });
    assert.equal(
      must(applyReport(running(RestartPolicy.ALWAYS), nodeId, timedOut, after(20))).next.status.state,
      "STOPPED",
    );
    const stopping = must(stop(running(RestartPolicy.ALWAYS))).next;
    assert.equal(must(applyReport(stopping, nodeId, ended({ exitCode: 1 }), after(20))).next.status.state, "STOPPED");
  });

  it("is judged by what the node says where the node stops the attempt on its own account", () => {
    const stopping = must(applyReport(running(), nodeId, report(1, "STOPPING"), after(15))).next;
    assert.equal(stopping.status.state, "STOPPING");
    for (const [reason, state] of [
      ["MAX_RUN_TIME_REACHED", "STOPPED"],
      ["POLICY_VIOLATION", "FAILED"],
    ] as const) {
      const { status } = must(applyReport(stopping, nodeId, ended({ reason, exitCode: 143 }), after(20))).next;
      assert.equal(status.state, state);
      assert.ok("reason" in status && status.reason === reason);
    }
    const asked = must(stop(stopping)).next;
    assert.equal(must(applyReport(asked, nodeId, ended({ exitCode: 143 }), after(20))).next.status.state, "STOPPED");
  });

  it("can be stopped in its backoff: the node ends the attempt that it never started", () => {
    const waiting = must(applyReport(running(RestartPolicy.ALWAYS), nodeId, ended({ exitCode: 0 }), after(20))).next;
    assert.equal(waiting.status.state, "SCHEDULED");
    const stopping = must(stop(waiting)).next;
    assert.deepEqual(desiredOf(stopping), { nodeId, attempt: 2, state: "STOPPED", notBeforeTime: undefined });
    const stopped = must(applyReport(stopping, nodeId, ended({}, 2), after(21))).next;
    assert.deepEqual(stopped.status, { state: "STOPPED", reason: "STOPPED_BY_REQUEST", message: "" });
    assert.deepEqual(stopped.gpus, []);
  });
});

describe("a node", () => {
  it("that is revoked takes everything with it, and the next attempt may go anywhere", () => {
    const lost = must(loseNode(running(), after(20))).next;
    assert.equal(lost.status.state, "FAILED");
    assert.equal(lost.status.state === "FAILED" && lost.status.reason, "NODE_LOST");
    assert.equal(desiredOf(lost), undefined);
    assert.equal(applyReport(lost, nodeId, report(1, "RUNNING"), after(21)), "unchanged");
    const again = must(start(lost, after(30))).next;
    assert.equal(must(schedule(again, { ...placement, nodeId: otherNodeId })).next.place?.nodeId, otherNodeId);
    assert.equal(must(remove(lost, after(30))).next.status.state, "DELETED");
    assert.equal(must(loseNode(must(remove(running(), after(20))).next, after(21))).next.status.state, "DELETED");
  });

  it("that comes back without the container has lost it, and the policy decides what follows", () => {
    const lost = must(loseContainer(running(), true, after(20))).next;
    assert.equal(lost.status.state === "FAILED" && lost.status.reason, "NODE_LOST");
    assert.equal(must(loseContainer(running(RestartPolicy.ALWAYS), true, after(20))).next.status.state, "SCHEDULED");
  });

  it("that does not answer changes no state", () => {
    const silent = must(noteReachability(running(), false)).next;
    assert.equal(silent.status.state, "RUNNING");
    assert.equal(silent.place?.reachable, false);
    assert.equal(noteReachability(silent, false), "unchanged");
  });
});

describe("a GPU", () => {
  const ill = new Map([[gpu.uuid, "GPU is lost"]]);

  it("that falls ill is told once, and stays the instance's, and so is that it is well again", () => {
    const told = must(noteGpuHealth(running(), ill));
    assert.equal(told.next.status.state, "RUNNING");
    assert.deepEqual(told.next.gpus, [{ ...gpu, trouble: "GPU is lost" }]);
    const message = `${gpu.uuid} is unhealthy: GPU is lost. What runs goes on.`;
    assert.deepEqual(told.events, [{ attempt: 1, state: "RUNNING", reason: "GPU_UNHEALTHY", message }]);
    assert.equal(noteGpuHealth(told.next, ill), "unchanged");
    assert.deepEqual(must(noteGpuHealth(told.next, new Map([[gpu.uuid, "reset me"]]))).events, []);
    const well = must(noteGpuHealth(told.next, new Map()));
    assert.deepEqual(well.next.gpus, [gpu]);
    assert.deepEqual(
      well.events.map(({ reason }) => reason),
      ["GPU_RECOVERED"],
    );
    assert.equal(noteGpuHealth(pending(), ill), "unchanged");
  });

  it("that is ill is not given to the next attempt of a restart policy, which waits for another of the node", () => {
    const instance = must(noteGpuHealth(running(RestartPolicy.ON_FAILURE), ill)).next;
    const over = must(applyReport(instance, nodeId, ended({ reason: "EXITED_NONZERO", exitCode: 1 }), after(20)));
    assert.equal(over.next.status.state, "PENDING");
    assert.deepEqual([over.next.attempt, over.next.restartCount, over.next.gpus], [2, 1, []]);
    assert.equal(pinnedNodeOf(over.next), nodeId);
  });
});

// ---- Whatever happens, in whatever order.

type Step = (instance: Instance, now: Date) => CommandOutcome;

const reasons: readonly Reason[] = [
  "",
  "COMPLETED",
  "EXITED_NONZERO",
  "OUT_OF_MEMORY",
  "IMAGE_NOT_FOUND",
  "PULL_FAILED",
  "PULL_UNAUTHORIZED",
  "IMAGE_DAMAGED",
];
const arbitraryReport: fc.Arbitrary<Step> = fc
  .record({
    back: fc.constantFrom(0, 0, 0, 0, 1, -1),
    phase: fc.constantFrom("PULLING", "CREATING", "RUNNING", "STOPPING", "ENDED", "REMOVED" as const),
    reason: fc.constantFrom(...reasons),
    exitCode: fc.constantFrom(undefined, 0, 1, 137),
    node: fc.constantFrom(nodeId, nodeId, nodeId, otherNodeId),
  })
  .map(
    ({ back, phase, node, ...fields }) =>
      (instance, now) =>
        applyReport(instance, node, report(instance.attempt - back, phase, fields), now),
  );
const arbitraryStep: fc.Arbitrary<Step> = fc.oneof(
  { weight: 6, arbitrary: arbitraryReport },
  { weight: 3, arbitrary: fc.constant<Step>((instance) => schedule(instance, placement)) },
  fc.constantFrom<Step>(
    stop,
    start,
    restart,
    (instance, now) => remove(instance, now),
    expire,
    (instance, now) => explainPending(instance, "no room", now),
    (instance, now) => loseNode(instance, now),
    (instance, now) => loseContainer(instance, false, now),
    (instance) => noteReachability(instance, false),
    (instance) => noteReachability(instance, true),
    (instance) => noteGpuHealth(instance, new Map([[gpu.uuid, "GPU is lost"]])),
    (instance) => noteGpuHealth(instance, new Map()),
  ),
);

const ranks: Readonly<Record<State, number>> = {
  PENDING: 0,
  SCHEDULED: 1,
  PULLING: 2,
  CREATING: 3,
  RUNNING: 4,
  STOPPING: 5,
  STOPPED: 6,
  FAILED: 6,
  DELETED: 8,
};

function rankOf({ status }: Instance): number {
  // What is removed after its end is further than its end.
  return status.state === "STOPPING" && status.ended ? 7 : ranks[status.state];
}

describe("whatever happens", () => {
  it("attempts never go back, an attempt only moves forward, and what is deleted stays so", () => {
    walk((before, now, outcome) => {
      const instance = next(before, outcome);
      assert.ok(instance.attempt >= before.attempt && instance.attempt <= before.attempt + 1);
      if (instance.attempt === before.attempt) assert.ok(rankOf(instance) >= rankOf(before));
      if (before.status.state === "DELETED") assert.equal(instance, before);
      assert.ok((instance.place?.attempt ?? 0) <= instance.attempt);
      assert.ok(now > zero);
    });
  });

  it("GPUs are held exactly while an attempt is on a node", () => {
    walk((before, _, outcome) => {
      const instance = next(before, outcome);
      assert.equal(instance.gpus.length > 0, holdsAllocation(instance));
      if (holdsAllocation(instance)) assert.equal(instance.place?.attempt, instance.attempt);
    });
  });

  it("a node is never asked to run an attempt again after it was asked to stop it", () => {
    let stopped = new Set<number>();
    walk((before, _, outcome, isFirst) => {
      if (isFirst) stopped = new Set();
      for (const instance of [before, next(before, outcome)]) {
        const desired = desiredOf(instance);
        if (desired?.state === "RUNNING") assert.ok(!stopped.has(desired.attempt), `attempt ${desired.attempt} again`);
        else if (desired !== undefined) stopped.add(desired.attempt);
      }
    });
  });

  it("every change that is told twice changes nothing the second time", () => {
    fc.assert(
      fc.property(fc.array(arbitraryReport, { maxLength: 4 }), arbitraryReport, (steps, last) => {
        let instance = must(schedule(pending(RestartPolicy.NEVER), placement)).next;
        for (const step of steps) instance = next(instance, step(instance, after(1)));
        const { attempt } = instance;
        const once = next(instance, last(instance, after(2)));
        // The same report again: of the attempt that it was about.
        if (once.attempt === attempt) assert.equal(last(once, after(3)), "unchanged");
      }),
      { numRuns: 300 },
    );
  });
});

function walk(check: (before: Instance, now: Date, outcome: Outcome | "refused", isFirst: boolean) => void): void {
  const policy = fc.constantFrom(RestartPolicy.NEVER, RestartPolicy.ON_FAILURE, RestartPolicy.ALWAYS);
  fc.assert(
    fc.property(policy, fc.array(arbitraryStep, { maxLength: 40 }), (restartPolicy, steps) => {
      let instance = pending(restartPolicy);
      for (const [index, step] of steps.entries()) {
        const now = after(index * 30 + 1);
        const outcome = step(instance, now);
        check(instance, now, outcome, index === 0);
        instance = next(instance, outcome);
      }
    }),
    { numRuns: 500 },
  );
}
