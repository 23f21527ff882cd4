// The Docker engine is killed while it starts containers. What it forgot by that is settled from the kernel's traces:
// a program that did not begin is run, one that may have begun is not run again, and nothing of either stays.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { AttemptPhase } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason, InstanceReasonSchema } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceId, newId } from "@clodei/proto/ids";
import { image, TestNode, wanted } from "../agent/node.ts";
import { listContainers, shimsOf } from "../harness/containers.ts";
import { engineUnavailable, startTestEngine } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { randomFrom, testSeed } from "../harness/random.ts";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { lostEnd, lostStart } from "./lost.ts";

const kills = 4;
/** Started together, so that one kill finds them at different steps of their starts. */
const together = 4;

describe("the engine is killed while it starts containers", { skip: engineUnavailable, timeout: 240_000 }, () => {
  const seed = testSeed();
  const random = randomFrom(seed);
  let engine: PrivateEngine;
  before(async () => {
    console.log(`CLODEI_TEST_SEED=${seed}`);
    engine = await startTestEngine();
    await importBusybox(engine.socketPath, image);
  });
  after(() => engine?.close());

  /** Starts jobs, kills the engine while it starts them, and returns how each one ended. */
  async function killDuringStarts(node: TestNode, withAgent: boolean): Promise<[InstanceId, InstanceReason][]> {
    const ids = Array.from({ length: together }, () => newId("ins"));
    node.desire(...ids.map((id) => wanted(id, "echo run >> /workspace/runs; exit 0")));
    await sleep(random() * 700);
    await engine.kill();
    if (withAgent) await node.end();
    await sleep(random() * 200);
    await engine.startDaemon();
    if (withAgent) await node.begin();
    return await Promise.all(
      ids.map(async (id): Promise<[InstanceId, InstanceReason]> => {
        const { reason, message } = await node.reported(id, AttemptPhase.ENDED);
        const runs = (await readFile(`${node.workspaceOf(id)}/runs`, "utf8").catch(() => "")).split("\n").length - 1;
        const what = `seed ${seed}: ${id} ran ${runs} times and ended with ${InstanceReasonSchema.value[reason]?.name}: ${message}`;
        if (reason === InstanceReason.COMPLETED) assert.equal(runs, 1, what);
        else {
          assert.equal(reason, InstanceReason.NODE_ERROR, what);
          // The program is short: the kill may as well have met its end.
          assert.ok(lostStart.test(message) ? runs <= 1 : lostEnd.test(message) && runs === 1, what);
        }
        return [id, reason];
      }),
    );
  }

  for (const withAgent of [false, true]) {
    test(`a job runs at most once, and where its start is lost it says so${withAgent ? ", also when the agent is restarted" : ""}`, async () => {
      await using node = await TestNode.start(engine.socketPath);
      let unknown = 0;
      for (let round = 0; round < kills; round++) {
        const ends = await killDuringStarts(node, withAgent);
        unknown += ends.filter(([, reason]) => reason !== InstanceReason.COMPLETED).length;
        await eventually(20_000, async () => {
          assert.deepEqual(await listContainers(engine), []);
          assert.deepEqual(await shimsOf(engine), [], "a shim is left of a container that is gone");
        });
        node.desire();
      }
      console.log(`${unknown} of ${kills * together} starts ended with nobody knowing whether the program ran`);
      assert.ok(unknown <= (kills * together) / 4, `seed ${seed}: ${unknown} starts could not be settled`);
    });
  }
});
