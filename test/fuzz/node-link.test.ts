// A node in wrong hands: enrolled, with a good certificate, and it says whatever the schema lets it say and more. It
// can spoil what is its own. It must not reach the instances of other nodes, whoever owns them, nor harm other agents.
import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { gzipSync } from "node:zlib";
import { type DescField, fromBinary } from "@bufbuild/protobuf";
import {
  HelloSchema,
  NodeLinkService,
  SessionRequestSchema,
  SessionResponseSchema,
  UploadLogsRequestSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { newId } from "@clodei/proto/ids";
import type { ClodeiClient } from "@clodei/sdk";
import fc from "fast-check";
import type { ScriptedAgent } from "../../control-plane/src/dispatch/scripted-agent.ts";
import type { NodeIdentity } from "../../control-plane/src/dispatch/test-fleet.ts";
import { eventually } from "../harness/eventually.ts";
import { FuzzedControlPlane } from "./fuzzed-control-plane.ts";
import { memoryComesBack, memoryInUse } from "./memory.ts";
import { fuzz, fuzzSeconds } from "./fuzzing.ts";
import { type MessageTree, toBytes, toJsonText } from "./message-tree.ts";
import { type Hints, messages } from "./messages.ts";
import { framed, type RawAnswer } from "./raw-calls.ts";

const seconds = 4;
const leaveMs = 150;
const patienceMs = 60_000;

const hostileRegion = "far";
const methodPath = (name: string): string => `/${NodeLinkService.typeName}/${name}`;
const grpc = { "content-type": "application/grpc" };

describe("a hostile node", { timeout: (3 * fuzzSeconds(seconds) + 240) * 1_000 }, () => {
  const victims: string[] = [];
  const own: string[] = [];
  let controlPlane: FuzzedControlPlane;
  let customer: ClodeiClient;
  let honest: ScriptedAgent;
  let honestIdentity: NodeIdentity;
  let hostile: NodeIdentity;
  /** The secret of the last Welcome, as an agent would show it. */
  let secret = new Uint8Array();

  before(async () => {
    controlPlane = await FuzzedControlPlane.start();
    const operator = controlPlane.connect(await controlPlane.createOperator());
    customer = controlPlane.connect(await controlPlane.createOrganization("customer"));
    const other = controlPlane.connect(await controlPlane.createOrganization("other"));
    honestIdentity = await controlPlane.enroll(operator, "honest");
    honest = await controlPlane.attend(honestIdentity);
    hostile = await controlPlane.enroll(operator, "hostile", hostileRegion);
    const agent = await controlPlane.attend(hostile);
    const run = async (client: ClodeiClient, region: string): Promise<string> => {
      const instance = await client.instances.run({
        image: "busybox",
        cpuMillis: 50,
        memoryMib: 16,
        location: { country: "ES", region },
      });
      await instance.waitUntilRunning({ timeoutMs: patienceMs });
      return instance.id;
    };
    for (const client of [customer, other]) {
      for (let index = 0; index < 2; index += 1) victims.push(await run(client, "madrid"));
      own.push(await run(client, hostileRegion));
    }
    agent.break();
  });
  after(() => controlPlane[Symbol.asyncDispose]());

  /** All that is stored of the victims, and of the honest node. */
  async function stored(): Promise<unknown> {
    return controlPlane.running.database.system(async (tx) => ({
      instances: await tx.query("select * from instances where id = any($1) order by id", [victims]),
      events: await tx.query(
        "select * from instance_events where instance_id = any($1) order by instance_id, sequence",
        [victims],
      ),
      usage: await tx.query("select * from usage_intervals where node_id = $1 or instance_id = any($2)", [
        honestIdentity.nodeId,
        victims,
      ]),
      journals: await tx.query("select journal_id, watermark from node_journals where node_id = $1", [
        honestIdentity.nodeId,
      ]),
    }));
  }

  /** How far the hostile node's journals are committed. */
  async function watermarks(): Promise<ReadonlyMap<string, bigint>> {
    const rows = await controlPlane.running.database.system((tx) =>
      tx.query<{ journal_id: string; watermark: string }>(
        "select journal_id, watermark from node_journals where node_id = $1",
        [hostile.nodeId],
      ),
    );
    return new Map(rows.map((row) => [row.journal_id, BigInt(row.watermark)]));
  }

  function hints(): Hints {
    const instanceIds = fc.constantFrom(...own, ...victims, newId("ins"));
    const byName: Readonly<Record<string, fc.Arbitrary<string | bigint | Uint8Array>>> = {
      instance_id: instanceIds,
      attempt: fc.bigInt(1n, 3n),
      protocol_version: fc.constant(1n),
      boot_id: fc.constantFrom("boot-1", "boot-2"),
      journal_id: fc.constantFrom("journal-1", "journal-2"),
      session_secret: fc.nat().map(() => secret),
      // Replayed ones, ones that go on, and ones with a hole before them.
      sequence: fc.bigInt(1n, 8n),
      journal_sequence: fc.bigInt(0n, 8n),
      image_digest: fc.constant(""),
      image_id: fc.constant(""),
      uuid: fc.constantFrom("GPU-SIM-1", "GPU-SIM-2"),
      model: fc.constant("H100-SXM"),
    };
    return {
      plausible: (field: DescField) => byName[field.name],
      confusing: fc.oneof(instanceIds, fc.constantFrom(honestIdentity.nodeId, newId("org"))),
    };
  }

  /** Whether the honest node's session answers, and takes a new instance. */
  async function othersAreServed(): Promise<void> {
    const acknowledged = honest.count("ack");
    await eventually(patienceMs, () => assert.ok(honest.count("ack") > acknowledged));
    assert.equal(honest.end, undefined);
  }

  function check(answer: RawAnswer, what: string): void {
    assert.ok(
      !["internal", "unknown", "data_loss"].includes(answer.code),
      `${what} → ${answer.code}\n${answer.text.slice(0, 2_000)}`,
    );
    for (const envelope of answer.envelopes) {
      const { message } = fromBinary(SessionResponseSchema, envelope);
      if (message.case === "welcome") secret = new Uint8Array(message.value.sessionSecret);
      if (message.case === "desiredSet") {
        for (const { instanceId } of message.value.instances)
          assert.ok(!victims.includes(instanceId), `${what} was given ${instanceId}`);
      }
    }
  }

  it("says whatever it likes in sessions, and changes nothing that is not its own", async (t) => {
    using client = controlPlane.attackAs(hostile);
    const untouched = await stored();
    const hello = messages(HelloSchema, hints()).map((tree): MessageTree => {
      const field = SessionRequestSchema.field.hello;
      return { schema: SessionRequestSchema, parts: [{ kind: "values", field, values: [tree] }] };
    });
    const say = messages(SessionRequestSchema, hints());
    let before: ReadonlyMap<string, bigint> = new Map();
    const perform = async (said: readonly MessageTree[]): Promise<void> => {
      const answer = await client.send({
        path: methodPath("Session"),
        headers: grpc,
        body: said.map((tree) => framed(toBytes(tree))),
        end: "nothing",
        leaveAfterMs: leaveMs,
      });
      check(answer, describeSaid(said));
      const now = await watermarks();
      for (const [journal, watermark] of before)
        assert.ok((now.get(journal) ?? 0n) >= watermark, `${journal} went back`);
      before = now;
    };
    const sessions = fc.tuple(hello, fc.array(say, { maxLength: 10 })).map(([first, rest]) => [first, ...rest]);
    let memory = 0;
    await fuzz(t, {
      values: sessions,
      run: perform,
      describe: describeSaid,
      seconds,
      warmUp: { runs: 5, warmed: () => (memory = memoryInUse()) },
    });
    assert.ok(secret.length > 0, "it was never welcomed");
    t.diagnostic(`committed: ${[...before].map(([journal, watermark]) => `${journal} ${watermark}`).join(", ")}`);
    assert.deepEqual(await stored(), untouched);
    assert.deepEqual(controlPlane.failures, []);
    await othersAreServed();
    await memoryComesBack(memory);
  });

  it("uploads output that nobody asked for, and asks for certificates with what is none", async (t) => {
    using client = controlPlane.attackAs(hostile);
    const untouched = await stored();
    const uploads = fc.array(messages(UploadLogsRequestSchema, hints()), { maxLength: 4 });
    const renewals = fc.array(messages(NodeLinkService.method.renewCertificate.input, hints()), {
      minLength: 1,
      maxLength: 1,
    });
    const calls = fc.oneof(
      fc.tuple(fc.constant("UploadLogs"), uploads),
      fc.tuple(fc.constant("RenewCertificate"), renewals),
    );
    await fuzz(t, {
      values: fc.array(calls, { minLength: 1, maxLength: 8 }),
      run: async (batch) => {
        await Promise.all(
          batch.map(async ([name, said]) => {
            const body = said.map((tree) => framed(toBytes(tree)));
            const answer = await client.send({ path: methodPath(name), headers: grpc, body, leaveAfterMs: 10_000 });
            const what = `${name} ${describeSaid(said)}`;
            assert.ok(
              !["internal", "unknown", "data_loss", "ok"].includes(answer.code),
              `${what} → ${answer.code}\n${answer.text.slice(0, 2_000)}`,
            );
          }),
        );
      },
      describe: (batch) => batch.map(([name, said]) => `${name} ${describeSaid(said)}`).join("\n"),
      seconds: seconds / 2,
    });
    assert.deepEqual(await stored(), untouched);
    assert.deepEqual(controlPlane.failures, []);
    await othersAreServed();
  });

  it("sends bytes that are no message, and harms nobody", async (t) => {
    using client = controlPlane.attackAs(hostile);
    const untouched = await stored();
    const bytes = fc.oneof(
      fc.uint8Array({ maxLength: 64 }),
      fc.constantFrom(gzipSync(Buffer.alloc(8 * 2 ** 20)), Buffer.alloc(0), Buffer.alloc(5 * 2 ** 20)),
    );
    const frame = fc
      .tuple(fc.constantFrom(0, 0, 1, 2, 0x80, 0xff), bytes, fc.constantFrom(0, 0, 1, -1, 2 ** 22, 2 ** 31))
      .map(([flags, payload, more]) => framed(payload, flags, Math.max(0, payload.length + more)));
    const requests = fc.record({
      path: fc.constantFrom(
        methodPath("Session"),
        methodPath("UploadLogs"),
        methodPath("RenewCertificate"),
        "/no.Such/Method",
        "/",
      ),
      headers: fc.record({
        "content-type": fc.constantFrom(
          "application/grpc",
          "application/grpc",
          "application/grpc+json",
          "application/json",
          "",
        ),
        "grpc-encoding": fc.constantFrom("identity", "identity", "gzip", "snappy", ""),
        "grpc-timeout": fc.constantFrom("10S", "0n", "-1", "99999999999S", "x"),
      }),
      body: fc.oneof(fc.array(frame, { maxLength: 3 }), fc.array(bytes, { maxLength: 2 })),
      end: fc.constantFrom("end" as const, "end" as const, "reset" as const, "nothing" as const),
      leaveAfterMs: fc.constant(leaveMs),
    });
    const memory = memoryInUse();
    const outcomes = new Map<string, number>();
    await fuzz(t, {
      values: fc.array(requests, { minLength: 1, maxLength: 12 }),
      run: async (batch) => {
        const answers = await Promise.all(batch.map((request) => client.send(request)));
        for (const { code } of answers) outcomes.set(code, (outcomes.get(code) ?? 0) + 1);
      },
      describe: (batch) => JSON.stringify(batch).slice(0, 4_000),
      seconds: seconds / 2,
    });
    t.diagnostic([...outcomes].map(([code, count]) => `${code} ${count}`).join(", "));
    assert.deepEqual(await stored(), untouched);
    assert.deepEqual(controlPlane.failures, []);
    await othersAreServed();
    await memoryComesBack(memory);
    const instance = await customer.instances.run({
      image: "busybox",
      cpuMillis: 50,
      memoryMib: 16,
      location: { country: "ES", region: "madrid" },
    });
    await instance.waitUntilRunning({ timeoutMs: patienceMs });
  });
});

function describeSaid(said: readonly MessageTree[]): string {
  return said.map(toJsonText).join("\n").slice(0, 4_000);
}
