// The replica listener in wrong hands: a peer with a replica's certificate that keeps no rule, and a node that found the
// port. The first is given the output that it names rightly and nothing else; the second nothing at all.
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { type DescField, fromBinary } from "@bufbuild/protobuf";
import { ReplicaService } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import { newId } from "@clodei/proto/ids";
import type { ClodeiClient, InstanceHandle } from "@clodei/sdk";
import fc from "fast-check";
import type { NodeIdentity } from "../../control-plane/src/dispatch/test-fleet.ts";
import { eventually } from "../harness/eventually.ts";
import { FuzzedControlPlane } from "./fuzzed-control-plane.ts";
import { memoryComesBack, memoryInUse } from "./memory.ts";
import { fuzz, fuzzSeconds } from "./fuzzing.ts";
import { toBytes, toJsonText } from "./message-tree.ts";
import { messages } from "./messages.ts";
import { framed, type RawAnswer } from "./raw-calls.ts";

const seconds = 3;
const leaveMs = 150;
const patienceMs = 60_000;

const grpc = { "content-type": "application/grpc" };
const path = `/${ReplicaService.typeName}/${ReplicaService.method.relayLogs.name}`;
/** What the scripted agent writes. */
const output = "a".repeat(64);

describe("a hostile peer of the replica listener", { timeout: (2 * fuzzSeconds(seconds) + 240) * 1_000 }, () => {
  let controlPlane: FuzzedControlPlane;
  let node: NodeIdentity;
  let customer: ClodeiClient;
  let instance: InstanceHandle;
  let organizationId: string;
  let others: string;

  before(async () => {
    controlPlane = await FuzzedControlPlane.start();
    const operator = controlPlane.connect(await controlPlane.createOperator());
    node = await controlPlane.enroll(operator, "honest");
    await controlPlane.attend(node);
    const run = async (client: ClodeiClient): Promise<InstanceHandle> => {
      const made = await client.instances.run({ image: "busybox", cpuMillis: 50, memoryMib: 16 });
      await made.waitUntilRunning({ timeoutMs: patienceMs });
      return made;
    };
    customer = controlPlane.connect(await controlPlane.createOrganization("customer"));
    instance = await run(customer);
    others = (await run(controlPlane.connect(await controlPlane.createOrganization("other")))).id;
    organizationId = (await customer.identity.whoAmI()).organizationId;
  });
  after(() => controlPlane[Symbol.asyncDispose]());

  const requests = () => {
    const byName: Readonly<Record<string, fc.Arbitrary<string | bigint>>> = {
      node_id: fc.constantFrom(node.nodeId, node.nodeId, newId("nod")),
      organization_id: fc.constant(organizationId),
      instance_id: fc.constantFrom(instance.id, instance.id, others),
      attempt: fc.bigInt(1n, 2n),
    };
    return messages(ReplicaService.method.relayLogs.input, {
      plausible: (field: DescField) => byName[field.name],
      confusing: fc.constantFrom(node.nodeId, instance.id, organizationId),
    });
  };

  function check(answer: RawAnswer, what: string): void {
    assert.ok(
      !["internal", "unknown", "data_loss"].includes(answer.code),
      `${what} → ${answer.code}\n${answer.text.slice(0, 2_000)}`,
    );
  }

  async function othersAreServed(): Promise<void> {
    assert.deepEqual(controlPlane.failures, []);
    await eventually(patienceMs, async () => {
      assert.equal(await controlPlane.metric("clodei_log_streams"), 0);
      assert.equal(await controlPlane.metric("clodei_replica_log_streams"), 0);
    });
    assert.equal(await instance.logs().text(), output);
  }

  it("asks for whatever it likes, and is given what is the organization's that it names", async (t) => {
    using client = await controlPlane.attackReplicaListener();
    let memory = 0;
    let given = 0;
    await fuzz(t, {
      values: fc.array(requests(), { minLength: 1, maxLength: 8 }),
      run: async (batch) => {
        await Promise.all(
          batch.map(async (tree) => {
            const bytes = toBytes(tree);
            const answer = await client.send({ path, headers: grpc, body: [framed(bytes)], leaveAfterMs: patienceMs });
            const what = toJsonText(tree);
            check(answer, what);
            if (!answer.text.includes(output)) return;
            given += 1;
            // As a reader of the bytes sees it: what is named twice is what is named last.
            const { attempt } = fromBinary(ReplicaService.method.relayLogs.input, bytes);
            assert.equal(attempt?.instanceId, instance.id, what);
          }),
        );
      },
      describe: (batch) => batch.map(toJsonText).join("\n").slice(0, 4_000),
      seconds,
      warmUp: { runs: 5, warmed: () => (memory = memoryInUse()) },
    });
    assert.ok(given > 0, "nothing was ever given: the requests mean nothing");
    await othersAreServed();
    await memoryComesBack(memory);
  });

  it("sends bytes that are no request, leaves in the middle, or is a node, and harms nobody", async (t) => {
    using replica = await controlPlane.attackReplicaListener();
    using ofNode = await controlPlane.attackReplicaListener(node);
    const bytes = fc.oneof(
      fc.uint8Array({ maxLength: 64 }),
      fc.constantFrom(Buffer.alloc(0), Buffer.alloc(5 * 2 ** 20)),
      requests().map(toBytes),
    );
    const frame = fc
      .tuple(fc.constantFrom(0, 0, 0, 1, 0x80), bytes, fc.constantFrom(0, 0, 1, -1, 2 ** 31))
      .map(([flags, payload, more]) => framed(payload, flags, Math.max(0, payload.length + more)));
    const calls = fc.record({
      isNode: fc.boolean(),
      path: fc.constantFrom(path, path, "/clodei.node.v1.NodeLinkService/Session", "/"),
      body: fc.array(frame, { maxLength: 3 }),
      end: fc.constantFrom("end" as const, "end" as const, "reset" as const, "nothing" as const),
    });
    await fuzz(t, {
      values: fc.array(calls, { minLength: 1, maxLength: 12 }),
      run: async (batch) => {
        await Promise.all(
          batch.map(async ({ isNode, ...call }) => {
            const client = isNode ? ofNode : replica;
            const answer = await client.send({ ...call, headers: grpc, leaveAfterMs: leaveMs });
            if (isNode) assert.ok(!answer.text.includes(output) && answer.code !== "ok", answer.code);
          }),
        );
      },
      describe: (batch) => JSON.stringify(batch).slice(0, 4_000),
      seconds,
    });
    await othersAreServed();
  });
});
