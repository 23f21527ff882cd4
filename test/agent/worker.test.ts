import { after, before, describe, it } from "node:test";
import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { timestampMs } from "@bufbuild/protobuf/wkt";
import {
  AttemptPhase,
  type AttemptStatus,
  DesiredInstanceSchema,
  DesiredState,
  type UsageInterval,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceId, newId } from "@clodei/proto/ids";
import { maxPendingEntries } from "../../agent/src/journal/journal.ts";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { callEngine } from "../../tools/engine/api.ts";
import { listContainers, listNetworks, networkOf } from "../harness/containers.ts";
import { engineUnavailable, startTestEngine } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { image, seconds, TestNode, wanted } from "./node.ts";
import { slowEngine } from "./slow-engine.ts";

const { CREATING, RUNNING, STOPPING, ENDED, REMOVED } = AttemptPhase;
const forever = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
const untilTold = "until [ -e /workspace/end ]; do sleep 0.1; done";

/** The intervals, from the first's begin to the last's end, are the time that the engine says. */
function assertMeteredAsTold(intervals: readonly UsageInterval[], { startTime, finishTime }: AttemptStatus): void {
  const meteredMs = Number((intervals.at(-1)?.endMonotonicMs ?? 0n) - (intervals[0]?.beginMonotonicMs ?? 0n));
  assert.ok(startTime !== undefined && finishTime !== undefined);
  const toldMs = timestampMs(finishTime) - timestampMs(startTime);
  assert.ok(Math.abs(meteredMs - toldMs) < 100, `metered ${meteredMs} ms, the engine says ${toldMs}`);
}

describe("the worker on a real engine", { skip: engineUnavailable ?? false, timeout: 240_000 }, () => {
  let engine: PrivateEngine;
  before(async () => {
    engine = await startTestEngine();
    await importBusybox(engine.socketPath, image);
  });
  after(() => engine?.close());

  const phases = (node: TestNode, id: ReturnType<typeof newId<"ins">>, attempt = 1) =>
    node.statuses(id, attempt).map(({ phase }) => phase);

  it("runs an instance to its end, once, and keeps its end after a late desired set", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, "echo hello > /workspace/out; exit 3"));
    const ended = await node.reported(id, ENDED);
    assert.equal(ended.reason, InstanceReason.EXITED_NONZERO);
    assert.equal(ended.exitCode, 3);
    assert.ok(ended.startTime !== undefined && ended.finishTime !== undefined);
    await eventually(10_000, async () => assert.deepEqual(await listContainers(engine, id), []));
    // The same set again, also by a new process: it is over.
    node.desire(wanted(id, "exit 3"));
    await node.end();
    await node.begin();
    await new Promise((resolve) => setTimeout(resolve, 700));
    assert.deepEqual(await listContainers(engine, id), []);
    assert.equal(phases(node, id).filter((phase) => phase === ENDED).length, 1);
    node.desire();
    await node.reported(id, REMOVED);
  });

  it("reports CREATING and RUNNING with the isolation that was read back, meters, stops in the grace, and removes", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    const [gpu = ""] = node.gpuUuids;
    node.desire(wanted(id, forever, { container: { gpuUuids: [gpu] } }));
    const running = await node.reported(id, RUNNING);
    assert.equal(running.isolation?.effectiveCapabilities, 0n);
    assert.equal(running.isolation?.noNewPrivileges, true);
    assert.equal(running.isolation?.seccompMode, 2);
    assert.match(running.imageId, /^sha256:/);
    await eventually(5000, () => assert.ok(node.usage(id).length > 0));
    node.desire(wanted(id, forever, { state: DesiredState.STOPPED }));
    const ended = await node.reported(id, ENDED);
    assert.equal(ended.reason, InstanceReason.STOPPED_BY_REQUEST);
    assert.deepEqual(phases(node, id), [CREATING, RUNNING, STOPPING, ENDED]);
    const intervals = node.usage(id);
    for (const [index, interval] of intervals.entries()) {
      assert.ok(interval.endMonotonicMs > interval.beginMonotonicMs);
      if (index > 0)
        assert.equal(
          interval.beginMonotonicMs,
          intervals[index - 1]?.endMonotonicMs,
          "intervals join without a gap or an overlap",
        );
    }
    assertMeteredAsTold(intervals, ended);
    node.desire(wanted(id, forever, { state: DesiredState.REMOVED }));
    await node.reported(id, REMOVED);
    assert.deepEqual(await listContainers(engine, id), []);
  });

  it("adopts what runs after its own restart and loses no time of it", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, forever));
    await node.reported(id, RUNNING);
    const [before] = await listContainers(engine, id);
    await node.end();
    await new Promise((resolve) => setTimeout(resolve, 500));
    await node.begin();
    await eventually(10_000, () =>
      assert.ok((node.usage(id).at(-1)?.endMonotonicMs ?? 0n) - (node.usage(id)[0]?.beginMonotonicMs ?? 0n) > 1000n),
    );
    const [now] = await listContainers(engine, id);
    assert.equal(now?.Id, before?.Id);
    assert.equal(phases(node, id).filter((phase) => phase === RUNNING).length, 1);
    const intervals = node.usage(id);
    for (const [index, interval] of intervals.entries())
      if (index > 0) assert.equal(interval.beginMonotonicMs, intervals[index - 1]?.endMonotonicMs);
    node.desire();
    await node.reported(id, REMOVED);
  });

  /** Ends a container that runs `untilTold` while no agent is there. */
  async function endUnseen(node: TestNode, id: InstanceId): Promise<void> {
    const end = join(node.workspaceOf(id), "end");
    await node.end();
    await writeFile(end, "");
    await eventually(20_000, async () => assert.equal((await listContainers(engine, id))[0]?.State, "exited"));
  }

  it("finishes what ended while no agent was there, with the code and the time of the engine", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, `${untilTold}; exit 5`));
    await node.reported(id, RUNNING);
    await endUnseen(node, id);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    await node.begin();
    const ended = await node.reported(id, ENDED);
    assert.equal(ended.exitCode, 5);
    assertMeteredAsTold(node.usage(id), ended);
    node.desire();
    await node.reported(id, REMOVED);
  });

  it("meters a container from its start, and not from the mark before it, when the start itself was not seen", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, untilTold));
    await node.reported(id, RUNNING);
    await new Promise((resolve) => setTimeout(resolve, 500));
    await endUnseen(node, id);
    // As after a kill between the engine's answer and the journal's: the engine took its time for the start.
    node.remember({ instanceId: id, attempt: 1 }, ({ startedMs }) => ({
      phase: "starting",
      startedMs: 0n,
      meteredMs: startedMs - 60_000n,
    }));
    await node.begin();
    const ended = await node.reported(id, ENDED);
    assertMeteredAsTold(node.usage(id).slice(-1), ended);
    node.desire();
    await node.reported(id, REMOVED);
  });

  it("refuses by its own policy whatever the control plane asked for, and names the field", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const bad: [string, Parameters<typeof wanted>[2], InstanceReason][] = [
      ["image", { container: { image: "docker.io/evil/miner:latest" } }, InstanceReason.IMAGE_NOT_ALLOWED],
      ["image", { container: { image: "busybox" } }, InstanceReason.POLICY_VIOLATION],
      ["env", { container: { env: { NVIDIA_VISIBLE_DEVICES: "all" } } }, InstanceReason.POLICY_VIOLATION],
      ["gpu_uuids", { container: { gpuUuids: ["GPU-SIM-of-another-node"] } }, InstanceReason.POLICY_VIOLATION],
      ["memory_mib", { container: { memoryMib: 1_000_000 } }, InstanceReason.POLICY_VIOLATION],
      ["cpu_millis", { container: { cpuMillis: 256_000 } }, InstanceReason.POLICY_VIOLATION],
      ["stop_grace", { container: { stopGrace: seconds(3600) } }, InstanceReason.POLICY_VIOLATION],
      ["args", { container: { args: ["a\0b"] } }, InstanceReason.POLICY_VIOLATION],
    ];
    const ids = bad.map(() => newId("ins"));
    const nothing = newId("ins");
    const empty = create(DesiredInstanceSchema, { instanceId: nothing, attempt: 1, state: DesiredState.RUNNING });
    node.desire(...bad.map(([, part], index) => wanted(ids[index] ?? newId("ins"), "true", part)), empty);
    for (const [index, [field, , reason]] of bad.entries()) {
      const ended = await node.reported(ids[index] ?? newId("ins"), ENDED);
      assert.equal(ended.reason, reason, `${field}: ${ended.message}`);
      assert.ok(ended.message.includes(field), ended.message);
    }
    assert.match((await node.reported(nothing, ENDED)).message, /container/);
    assert.deepEqual(await listContainers(engine), []);
    node.desire();
    for (const id of ids) await node.reported(id, REMOVED);
  });

  it("gives a GPU to one instance at a time", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const [one, two] = [newId("ins", 1), newId("ins", 2)];
    const [gpu = ""] = node.gpuUuids;
    const container = { gpuUuids: [gpu] };
    node.desire(wanted(one, forever, { container }));
    await node.reported(one, RUNNING);
    node.desire(wanted(one, forever, { container }), wanted(two, forever, { container }));
    const refused = await node.reported(two, ENDED);
    assert.equal(refused.reason, InstanceReason.POLICY_VIOLATION);
    node.desire(
      wanted(one, forever, { container, state: DesiredState.STOPPED }),
      wanted(two, forever, { container, attempt: 2 }),
    );
    await node.reported(two, RUNNING, 2);
    assert.ok((await node.reported(one, ENDED)).sequence < (await node.reported(two, RUNNING, 2)).sequence);
    node.desire();
    await node.reported(two, REMOVED, 2);
  });

  it("gives a GPU to one instance also while the start of the first is under way", async () => {
    await using node = await TestNode.start(engine.socketPath);
    await eventually(10_000, () => assert.ok(node.worker.acceptance().accepting));
    const [one, two] = [newId("ins", 1), newId("ins", 2)];
    const [gpu = ""] = node.gpuUuids;
    const container = { gpuUuids: [gpu] };
    // The second comes first in the order in which instances are planned.
    node.desire(wanted(two, forever, { container }));
    node.desire(wanted(two, forever, { container }), wanted(one, forever, { container }));
    await node.reported(two, RUNNING);
    const refused = await node.reported(one, ENDED);
    assert.equal(refused.reason, InstanceReason.POLICY_VIOLATION);
    assert.deepEqual(await listContainers(engine, one), []);
    node.desire();
    await node.reported(two, REMOVED);
  });

  it("takes a container that is younger than the look at the engine for no lost one", async () => {
    await using slow = await slowEngine(engine.socketPath);
    await using node = await TestNode.start(slow.socketPath);
    await eventually(10_000, () => assert.ok(node.worker.acceptance().accepting));
    const held = slow.holdList();
    node.worker.wake();
    await held;
    const id = newId("ins");
    node.desire(wanted(id, forever));
    await node.reported(id, RUNNING);
    slow.release();
    await new Promise((resolve) => setTimeout(resolve, 500));
    assert.deepEqual(phases(node, id), [CREATING, RUNNING]);
    node.desire();
    await node.reported(id, REMOVED);
  });

  it("removes an earlier attempt before it starts the next, and never goes back", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, forever));
    await node.reported(id, RUNNING);
    node.desire(wanted(id, forever, { attempt: 2 }));
    await node.reported(id, RUNNING, 2);
    assert.equal((await node.reported(id, ENDED)).reason, InstanceReason.STOPPED_BY_REQUEST);
    assert.equal((await listContainers(engine, id)).length, 1);
    assert.equal(node.desireAt(1n, wanted(id, forever)), false, "a set with a lower generation is ignored");
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert.deepEqual(phases(node, id, 2), [CREATING, RUNNING]);
    node.desire();
    await node.reported(id, REMOVED, 2);
  });

  it("stops at max_run_time and tells a memory kill from an exit", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const [timed, hungry] = [newId("ins"), newId("ins")];
    node.desire(
      wanted(timed, forever, { container: { maxRunTime: seconds(1) } }),
      wanted(hungry, "x=a; while :; do x=$x$x; done", { container: { memoryMib: 16 } }),
    );
    assert.equal((await node.reported(timed, ENDED)).reason, InstanceReason.MAX_RUN_TIME_REACHED);
    assert.equal((await node.reported(hungry, ENDED)).reason, InstanceReason.OUT_OF_MEMORY);
    node.desire();
    await node.reported(hungry, REMOVED);
  });

  it("reports a container that somebody removed as an error of the node, and does not run it again", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, forever));
    await node.reported(id, RUNNING);
    const [container] = await listContainers(engine, id);
    // While no agent looks: else the look between the engine's kill and its removal sees an exit with 137.
    await node.end();
    await callEngine(engine.socketPath, {
      method: "DELETE",
      path: `/containers/${container?.Id}`,
      query: { force: "1" },
    });
    await node.begin();
    const ended = await node.reported(id, ENDED);
    assert.equal(ended.reason, InstanceReason.NODE_ERROR);
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert.deepEqual(await listContainers(engine, id), []);
    node.desire();
    await node.reported(id, REMOVED);
  });

  it("takes no work while the engine is away, loses nothing, and goes on when it is back", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const [old, late] = [newId("ins"), newId("ins")];
    node.desire(wanted(old, forever));
    await node.reported(old, RUNNING);
    const [before] = await listContainers(engine, old);
    await engine.kill();
    await eventually(10_000, () => assert.equal(node.worker.acceptance().accepting, false));
    node.desire(wanted(old, forever), wanted(late, forever));
    assert.deepEqual(
      node.worker.containers().map(({ instanceId }) => instanceId),
      [old],
      "what cannot be seen now is not told as gone",
    );
    await engine.startDaemon();
    await node.reported(late, RUNNING);
    assert.equal(node.worker.acceptance().accepting, true);
    const [after] = await listContainers(engine, old);
    assert.equal(after?.Id, before?.Id);
    assert.deepEqual(phases(node, old), [CREATING, RUNNING]);
    node.desire();
    await node.reported(late, REMOVED);
    await node.reported(old, REMOVED);
  });

  it("takes no work on a full disk and says why; what runs goes on and can be stopped", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const [old, late] = [newId("ins"), newId("ins")];
    node.desire(wanted(old, forever));
    await node.reported(old, RUNNING);
    await node.end();
    await node.begin({ minFreeMib: 1_000_000_000 });
    await eventually(10_000, () => assert.match(node.worker.acceptance().message, /disk is full/));
    node.desire(wanted(old, forever), wanted(late, forever));
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert.deepEqual(phases(node, late), []);
    node.desire(wanted(old, forever, { state: DesiredState.STOPPED }));
    await node.reported(old, ENDED);
    node.desire();
    await node.reported(old, REMOVED);
  });

  it("does not let ever new instances fill its journal", async () => {
    await using node = await TestNode.start(engine.socketPath);
    await eventually(10_000, () => assert.ok(node.worker.acceptance().accepting));
    const flood = (count: number) =>
      Array.from({ length: count }, () => wanted(newId("ins"), "true", { state: DesiredState.STOPPED }));
    const statuses = flood(maxPendingEntries - 10).map(({ instanceId }) => ({
      ...{ instanceId, attempt: 1, phase: ENDED, reason: InstanceReason.UNSPECIFIED },
      ...{ message: "", imageDigest: "", imageId: "" },
    }));
    node.journal.write({ statuses });
    const last = flood(200);
    for (let round = 0; round < 3; round++) node.desire(...flood(500));
    node.desire(...last);
    await eventually(20_000, () => assert.match(node.worker.acceptance().message, /journal is full/));
    await new Promise((resolve) => setTimeout(resolve, 1000));
    // Steps that were under way when it became full.
    const most = maxPendingEntries + 64;
    assert.ok(node.journal.pendingCount() <= most, `${node.journal.pendingCount()} entries wait`);
    node.journal.acknowledge(node.journal.lastSequence);
    for (const { instanceId } of last.slice(-1)) await node.reported(instanceId as InstanceId, ENDED);
  });

  it("removes containers of its own that no desired set knows, and touches nobody else's", async () => {
    await using node = await TestNode.start(engine.socketPath);
    await using other = await TestNode.start(engine.socketPath);
    const [mine, theirs] = [newId("ins"), newId("ins")];
    other.desire(wanted(theirs, forever));
    await other.reported(theirs, RUNNING);
    node.desire(wanted(mine, forever));
    await node.reported(mine, RUNNING);
    const networks = await Promise.all([mine, theirs].map((id) => networkOf(engine, id)));
    node.desire();
    await node.reported(mine, REMOVED);
    assert.equal((await listContainers(engine, theirs)).length, 1);
    const between = await listNetworks(engine);
    assert.deepEqual(
      networks.map((name) => between.includes(name)),
      [false, true],
    );
    other.desire();
    await other.reported(theirs, REMOVED);
    const left = await listNetworks(engine);
    assert.ok(!networks.some((name) => left.includes(name)));
  });

  it("keeps networks ready, starts also where somebody pruned them, and takes them away in the end", async () => {
    let nodeId: string;
    {
      await using node = await TestNode.start(engine.socketPath);
      ({ nodeId } = node);
      await eventually(10_000, async () => assert.equal((await listNetworks(engine, nodeId)).length, 2));
      await callEngine(engine.socketPath, { method: "POST", path: "/networks/prune" });
      const id = newId("ins");
      node.desire(wanted(id, forever));
      await node.reported(id, RUNNING);
      node.desire();
      await node.reported(id, REMOVED);
    }
    assert.deepEqual(await listNetworks(engine, nodeId), []);
  });

  it("stops everything when it is revoked and keeps workspaces", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, forever));
    await node.reported(id, RUNNING);
    node.worker.hold("revoked");
    await node.reported(id, ENDED);
    await eventually(10_000, () => assert.ok(node.worker.isEmpty));
    assert.deepEqual(await listContainers(engine, id), []);
    assert.deepEqual(
      node.statuses(id).filter(({ phase }) => phase === REMOVED),
      [],
    );
  });

  it("refuses a set that cannot be understood, and keeps to the last one", async () => {
    await using node = await TestNode.start(engine.socketPath);
    const id = newId("ins");
    node.desire(wanted(id, forever));
    await node.reported(id, RUNNING);
    assert.throws(() =>
      node.desireAt(
        50n,
        create(DesiredInstanceSchema, { instanceId: "not-an-id", attempt: 1, state: DesiredState.RUNNING }),
      ),
    );
    assert.throws(() => node.desireAt(51n, wanted(id, forever), wanted(id, forever)), /twice/);
    assert.equal(node.worker.observedGeneration, 1n);
    assert.equal((await listContainers(engine, id)).length, 1);
    node.desire();
    await node.reported(id, REMOVED);
  });
});
