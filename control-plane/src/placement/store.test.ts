import assert from "node:assert/strict";
import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";
import { describe, it } from "node:test";
import { newId } from "@clodei/proto/ids";
import { startTestDatabase } from "../platform/test-database.ts";
import { PlacementService, type PlacementRequest } from "./service.ts";
import type { RacerAnswer, RacerOrder } from "./test-racer.ts";

const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
const gpu = {
  uuid: "GPU-SIM-1",
  model: "H100-SXM",
  memoryMib: 1,
  simulated: true,
  index: 0,
  usable: true,
  unhealthy: false,
  allocated: false,
};
const request: PlacementRequest = {
  gpu: { model: "H100-SXM", count: 1, minMemoryMib: 0 },
  cpuMillis: 1000,
  memoryMib: 1024,
  location: {},
  pinnedNodeId: undefined,
};

async function order(racer: ChildProcess, what: RacerOrder): Promise<RacerAnswer> {
  const answer = once(racer, "message");
  racer.send(what);
  const [text] = (await answer) as [RacerAnswer];
  return text;
}

describe("a GPU", () => {
  it("is given once by two processes that give it at the same time, by the database alone", async () => {
    await using db = await startTestDatabase();
    const placement = new PlacementService({ fleet: () => Promise.resolve([]) });
    const racers = [0, 1].map(() => fork(new URL("test-racer.ts", import.meta.url)));
    try {
      const connect = { kind: "connect", system: db.server.system } as const;
      assert.deepEqual(await Promise.all(racers.map((racer) => order(racer, connect))), ["ready", "ready"]);
      const nodeId = newId("nod");
      const wins = [0, 0];
      for (let round = 0; round < 50; round += 1) {
        const ids = racers.map(() => newId("ins"));
        const answers = await Promise.all(
          racers.map((racer, index) =>
            order(racer, {
              kind: "allocate",
              organizationId: newId("org"),
              instanceId: ids[index] ?? "",
              request,
              placement: { nodeId, location, gpus: [gpu] },
            }),
          ),
        );
        assert.deepEqual(answers.toSorted(), ["lost", "won"]);
        const winner = answers.indexOf("won");
        wins[winner] = (wins[winner] ?? 0) + 1;
        const live = await db.database.system((tx) =>
          tx.query<{ instance_id: string }>("select instance_id from gpu_allocations where release_time is null"),
        );
        const instanceId = ids[winner];
        assert.ok(instanceId);
        assert.deepEqual(live, [{ instance_id: instanceId }]);
        await db.database.system((tx) => placement.release(tx, instanceId, new Date()));
      }
      assert.equal(
        wins.reduce((sum, each) => sum + each, 0),
        50,
      );
    } finally {
      for (const racer of racers) racer.kill();
    }
  });

  it("and its instance's CPU and memory are free once released, and only then", async () => {
    await using db = await startTestDatabase();
    const { database } = db;
    const placement = new PlacementService({ fleet: () => Promise.resolve([]) });
    const nodeId = newId("nod");
    const owner = { organizationId: newId("org"), instanceId: newId("ins"), attempt: 1 };
    const place = { nodeId, location, gpus: [gpu] };
    const now = new Date();
    await database.system((tx) => placement.allocate(tx, owner, request, place, now));
    const rival = { ...owner, instanceId: newId("ins") };
    await assert.rejects(
      database.system((tx) => placement.allocate(tx, rival, request, place, now)),
      { name: "AllocationConflict" },
    );
    const of = async () => (await database.system((tx) => placement.nodeAllocations(tx, [nodeId]))).get(nodeId);
    // The rival's CPU and memory went back with its GPU.
    assert.deepEqual(await of(), { gpuUuids: [gpu.uuid], cpuMillis: 1000, memoryMib: 1024, instances: 1 });
    await database.system((tx) => placement.release(tx, owner.instanceId, now));
    assert.deepEqual(await of(), { gpuUuids: [], cpuMillis: 0, memoryMib: 0, instances: 0 });
    await database.system((tx) => placement.allocate(tx, rival, request, place, now));
  });
});
