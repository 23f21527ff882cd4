import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { newId, type NodeId } from "@clodei/proto/ids";
import fc from "fast-check";
import { explainWaiting } from "./explain.ts";
import {
  type FleetGpu,
  type FleetNode,
  fitsEmptyNode,
  occupy,
  place,
  type PlacementRequest,
  queueKey,
} from "./model.ts";

const nodeIds: readonly NodeId[] = [0, 1, 2, 3].map((time) => newId("nod", time));
const spain = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
const france = { country: "FR", region: "paris", datacenter: "p-1", tier: 3 };

function gpu(uuid: string, fields: Partial<FleetGpu> = {}): FleetGpu {
  return {
    uuid,
    model: "H100-SXM",
    memoryMib: 81559,
    simulated: true,
    index: 0,
    usable: true,
    unhealthy: false,
    allocated: false,
    ...fields,
  };
}

function gpus(prefix: string, count: number, fields: Partial<FleetGpu> = {}): FleetGpu[] {
  return Array.from({ length: count }, (_, index) => gpu(`${prefix}-${index}`, { index, ...fields }));
}

function node(index: number, fields: Partial<FleetNode> = {}): FleetNode {
  const id = nodeIds[index];
  assert.ok(id);
  return {
    id,
    location: spain,
    obstacle: undefined,
    cpuMillis: 64_000,
    memoryMib: 256_000,
    freeCpuMillis: 64_000,
    freeMemoryMib: 256_000,
    gpus: [],
    ...fields,
  };
}

function request(fields: Partial<PlacementRequest> = {}): PlacementRequest {
  return {
    gpu: { model: "", count: 0, minMemoryMib: 0 },
    cpuMillis: 1000,
    memoryMib: 1024,
    location: {},
    pinnedNodeId: undefined,
    ...fields,
  };
}

const h100 = (count: number) => ({ model: "H100-SXM", count, minMemoryMib: 0 });

const arbitraryGpu = fc.record({
  model: fc.constantFrom("H100-SXM", "L40S", ""),
  memoryMib: fc.constantFrom(48_000, 80_000, 96_000),
  usable: fc.constantFrom(true, true, true, false),
  allocated: fc.constantFrom(false, false, true),
});
const arbitraryNode = fc.record({
  location: fc.constantFrom(spain, france),
  obstacle: fc.constantFrom(undefined, undefined, undefined, "cordoned" as const, "unreachable" as const),
  freeCpuMillis: fc.constantFrom(0, 1000, 4000, 4000, 4000),
  freeMemoryMib: fc.constantFrom(0, 1024, 8192, 8192, 8192),
  gpus: fc.array(arbitraryGpu, { maxLength: 5 }),
});
const arbitraryFleet = fc.array(arbitraryNode, { maxLength: 4 }).map((nodes) =>
  nodes.map((fields, index) =>
    node(index, {
      ...fields,
      cpuMillis: 4000,
      memoryMib: 8192,
      gpus: fields.gpus.map((item, position) => gpu(`${index}-${position}`, { ...item, index: position })),
    }),
  ),
);
const arbitraryRequest = fc
  .record({
    count: fc.constantFrom(0, 1, 1, 2, 3, 4),
    model: fc.constantFrom("", "", "H100-SXM", "L40S"),
    minMemoryMib: fc.constantFrom(0, 0, 60_000, 90_000),
    cpuMillis: fc.constantFrom(500, 1000, 3000),
    memoryMib: fc.constantFrom(512, 4096),
    location: fc.constantFrom({}, {}, { country: "ES" }, { country: "FR", region: "paris" }),
    pinned: fc.option(fc.integer({ min: 0, max: 3 }), { nil: undefined, freq: 2 }),
  })
  .map(({ count, model, minMemoryMib, pinned, ...rest }) =>
    request({
      ...rest,
      gpu: count === 0 ? { model: "", count, minMemoryMib: 0 } : { model, count, minMemoryMib },
      pinnedNodeId: pinned === undefined ? undefined : nodeIds[pinned],
    }),
  );

/** Every node and set of GPUs that would do, by trying all of them. */
function allPlacements(asked: PlacementRequest, fleet: readonly FleetNode[]): { node: FleetNode; uuids: string[] }[] {
  const found: { node: FleetNode; uuids: string[] }[] = [];
  for (const each of fleet) {
    for (let mask = 0; mask < 2 ** each.gpus.length; mask += 1) {
      const chosen = each.gpus.filter((_, index) => (mask >> index) & 1);
      const { model, count, minMemoryMib } = asked.gpu;
      const isAllowed =
        each.obstacle === undefined &&
        (asked.pinnedNodeId === undefined || asked.pinnedNodeId === each.id) &&
        (asked.location.country === undefined || asked.location.country === each.location.country) &&
        (asked.location.region === undefined || asked.location.region === each.location.region) &&
        asked.cpuMillis <= each.freeCpuMillis &&
        asked.memoryMib <= each.freeMemoryMib &&
        chosen.length === count &&
        new Set(chosen.map((item) => item.model)).size <= 1 &&
        chosen.every(
          (item) =>
            item.usable && !item.allocated && item.memoryMib >= minMemoryMib && (model === "" || item.model === model),
        );
      if (isAllowed) found.push({ node: each, uuids: chosen.map((item) => item.uuid) });
    }
  }
  return found;
}

function freeGpus(each: FleetNode): number {
  return each.gpus.filter((item) => item.usable && !item.allocated).length;
}

describe("place", () => {
  it("finds a place exactly where trying everything finds one, and leaves as few GPUs over", () => {
    fc.assert(
      fc.property(arbitraryRequest, arbitraryFleet, (asked, fleet) => {
        const all = allPlacements(asked, fleet);
        const placement = place(asked, fleet);
        assert.equal(placement !== undefined, all.length > 0);
        if (placement === undefined) return;
        const uuids = placement.gpus.map((item) => item.uuid).toSorted();
        const mine = all.find(
          (each) => each.node.id === placement.nodeId && each.uuids.toSorted().join() === uuids.join(),
        );
        assert.ok(mine, "the placement is one of those that would do");
        if (asked.gpu.count > 0) {
          const least = Math.min(...all.map((each) => freeGpus(each.node)));
          assert.equal(freeGpus(mine.node), least);
        } else if (mine.node.gpus.length > 0) {
          assert.ok(
            all.every((each) => each.node.gpus.length > 0),
            "a node without GPUs had room",
          );
        }
      }),
      { numRuns: 500 },
    );
  });

  it("never gives a GPU twice, nor more CPU and memory than there is, however many are placed", () => {
    fc.assert(
      fc.property(fc.array(arbitraryRequest, { maxLength: 12 }), arbitraryFleet, (requests, fleet) => {
        const given = new Set<string>();
        let now = fleet;
        for (const asked of requests) {
          const placement = place(asked, now);
          if (placement === undefined) continue;
          for (const item of placement.gpus) {
            assert.ok(!given.has(item.uuid));
            given.add(item.uuid);
          }
          now = occupy(now, asked, placement);
          for (const each of now) assert.ok(each.freeCpuMillis >= 0 && each.freeMemoryMib >= 0);
        }
      }),
      { numRuns: 200 },
    );
  });

  it("places nothing on a GPU that is unhealthy, unknown or split, nor on a node that takes no work", () => {
    const asked = request({ gpu: { model: "", count: 1, minMemoryMib: 0 } });
    assert.equal(place(asked, [node(0, { gpus: [gpu("a", { usable: false })] })]), undefined);
    for (const obstacle of ["unreachable", "cordoned", "quarantined", "revoked", "not_accepting"] as const) {
      assert.equal(place(asked, [node(0, { obstacle, gpus: [gpu("a")] })]), undefined, obstacle);
    }
    assert.ok(place(asked, [node(0, { gpus: [gpu("a")] })]));
  });

  it("spreads CPU-only work over nodes without GPUs before it uses a GPU node", () => {
    let fleet = [node(0), node(1), node(2, { gpus: gpus("g", 8) })];
    const used: NodeId[] = [];
    for (let count = 0; count < 4; count += 1) {
      const asked = request({ cpuMillis: 32_000 });
      const placement = place(asked, fleet);
      assert.ok(placement);
      used.push(placement.nodeId);
      fleet = occupy(fleet, asked, placement);
    }
    assert.deepEqual(used, [nodeIds[0], nodeIds[1], nodeIds[0], nodeIds[1]]);
    assert.equal(place(request({ cpuMillis: 32_000 }), fleet)?.nodeId, nodeIds[2]);
  });

  it("gives a GPU that two nodes claim to one of them only", () => {
    const fleet = [node(0, { gpus: [gpu("same")] }), node(1, { gpus: [gpu("same")] })];
    const asked = request({ gpu: h100(1) });
    const placement = place(asked, fleet);
    assert.ok(placement);
    assert.equal(place(asked, occupy(fleet, asked, placement)), undefined);
  });

  it("takes the node where the fewest GPUs are left over, so that a whole node stays free for a large request", () => {
    const fleet = [node(0, { gpus: gpus("a", 8) }), node(1, { gpus: gpus("b", 4) }), node(2, { gpus: gpus("c", 6) })];
    assert.equal(place(request({ gpu: h100(2) }), fleet)?.nodeId, nodeIds[1]);
    assert.equal(place(request({ gpu: h100(5) }), fleet)?.nodeId, nodeIds[2]);
  });

  it("takes the smallest GPUs that have the memory that is asked for", () => {
    const fleet = [
      node(0, { gpus: [gpu("big", { memoryMib: 96_000 }), gpu("small", { memoryMib: 80_000, index: 1 })] }),
    ];
    assert.equal(place(request({ gpu: h100(1) }), fleet)?.gpus[0]?.uuid, "small");
    const asked = request({ gpu: { model: "H100-SXM", count: 1, minMemoryMib: 90_000 } });
    assert.equal(place(asked, fleet)?.gpus[0]?.uuid, "big");
  });
});

describe("queues", () => {
  it("keep GPU requests of one model together and let CPU work of other sizes pass", () => {
    assert.equal(queueKey(request({ gpu: h100(8) })), queueKey(request({ gpu: h100(1), cpuMillis: 50 })));
    assert.notEqual(
      queueKey(request({ gpu: h100(1) })),
      queueKey(request({ gpu: h100(1), location: { country: "ES" } })),
    );
    assert.notEqual(queueKey(request({ cpuMillis: 256_000 })), queueKey(request({ cpuMillis: 50 })));
  });
});

describe("the explanation", () => {
  const fleet = [node(0, { gpus: gpus("a", 8) }), node(1, { location: france, gpus: gpus("b", 4, { model: "L40S" }) })];
  const full = fleet.map((each) => ({ ...each, gpus: each.gpus.map((item) => ({ ...item, allocated: true })) }));

  it("names the largest node where more is asked for than any has", () => {
    const text = explainWaiting(request({ gpu: h100(16), location: { country: "ES" } }), fleet);
    assert.match(text, /^16 x H100-SXM asked for; no node in ES has that many; the largest has 8 x H100-SXM/);
  });

  it("names the models that there are where one is not", () => {
    const text = explainWaiting(request({ gpu: { model: "B200", count: 1, minMemoryMib: 0 } }), fleet);
    assert.match(text, /no node in any location has that model; there are H100-SXM, L40S/);
  });

  it("says where it would fit instead of a place that has no node, or none that takes instances", () => {
    const asked = request({ gpu: h100(1), location: { country: "FR", region: "lyon" } });
    const text = explainWaiting(asked, fleet);
    assert.equal(
      text,
      "1 x H100-SXM asked for; there is no node in FR/lyon; it would fit in ES/madrid/kumo-1: ask for that location",
    );
    const closed = [node(0, { obstacle: "cordoned", gpus: gpus("a", 8) }), node(1, { location: france })];
    const inSpain = request({ location: { country: "ES" } });
    assert.match(
      explainWaiting(inSpain, closed),
      /what would fit in ES takes no new instances now \(1 under maintenance\); waiting .* fit in FR\/paris/,
    );
    const model = request({ gpu: { model: "L40S", count: 1, minMemoryMib: 0 }, location: { country: "ES" } });
    assert.match(explainWaiting(model, fleet), /there are H100-SXM; it would fit in FR\/paris\/p-1/);
    assert.doesNotMatch(explainWaiting(request({ gpu: h100(1) }), []), /it would fit/);
  });

  it("tells what takes nothing now from what no node could take", () => {
    const closed = [
      node(0, { obstacle: "cordoned", gpus: gpus("a", 8) }),
      node(1, { obstacle: "unreachable", gpus: gpus("b", 8) }),
      node(2, { gpus: gpus("c", 2) }),
    ];
    assert.equal(
      explainWaiting(request({ gpu: h100(8) }), closed),
      "8 x H100-SXM asked for; what would fit in any location takes no new instances now (1 not answering, 1 under maintenance); waiting until it does",
    );
    assert.match(explainWaiting(request({ gpu: h100(9) }), closed), /no node .* has that many; the largest has 8 x/);
  });

  it("counts unhealthy GPUs apart from those in use", () => {
    const ill = (each: FleetNode, count: number): FleetNode => ({
      ...each,
      gpus: each.gpus.map((item, index) => (index < count ? { ...item, usable: false, unhealthy: true } : item)),
    });
    const spanish = node(0, { gpus: gpus("a", 8) });
    const asked = request({ gpu: h100(8) });
    assert.equal(
      explainWaiting(asked, [ill(spanish, 2)]),
      "8 x H100-SXM asked for; no node in any location has that many healthy GPUs now; the largest node there has 8 x H100-SXM in all, 2 of them unhealthy; waiting until they are healthy again",
    );
    const busy = ill({ ...spanish, gpus: spanish.gpus.map((item) => ({ ...item, allocated: true })) }, 1);
    assert.equal(
      explainWaiting(request({ gpu: h100(1) }), [busy]),
      "1 x H100-SXM asked for; no node in any location has that much free now; the largest node there has 8 x H100-SXM in all, 1 of them unhealthy; waiting until it is free",
    );
    assert.match(
      explainWaiting({ ...asked, pinnedNodeId: spanish.id }, [ill(spanish, 1)]),
      /holds its workspace has not that many healthy GPUs now: 1 of its 8 x H100-SXM are unhealthy; waiting/,
    );
  });

  it("names the memory that there is", () => {
    const text = explainWaiting(request({ gpu: { model: "H100-SXM", count: 1, minMemoryMib: 100_000 } }), fleet);
    assert.match(text, /the largest has 81559 MiB/);
  });

  it("says that nothing is free without saying how much others use", () => {
    const asked = request({ gpu: h100(2), location: { country: "ES" } });
    const oneLeft = full.map((each, index) =>
      index === 0 ? { ...each, gpus: each.gpus.map((item, at) => ({ ...item, allocated: at > 0 })) } : each,
    );
    assert.equal(place(asked, oneLeft), undefined);
    const text = explainWaiting(asked, full);
    assert.match(text, /no node in ES has that much free now; the largest node there has 8 x H100-SXM in all/);
    assert.equal(explainWaiting(asked, oneLeft), text, "the text does not tell how many are free");
  });

  it("says so where the workspace's node is away", () => {
    const asked = request({ pinnedNodeId: nodeIds[0] });
    assert.match(
      explainWaiting(asked, [node(0, { obstacle: "unreachable" })]),
      /holds its workspace is not answering$/,
    );
  });

  it("says that a huge CPU request fits nowhere", () => {
    const asked = request({ cpuMillis: 128_000 });
    assert.ok(!fleet.some((each) => fitsEmptyNode(asked, each)));
    assert.match(explainWaiting(asked, fleet), /nodes have up to 64000 CPU millis/);
  });
});
