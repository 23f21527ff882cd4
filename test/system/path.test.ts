// The main job, end to end: three nodes in different places, one engine, real processes.
import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { type InstanceSpecSchema, PortProtocol } from "@clodei/proto/gen/clodei/v1/instance";
import { ClodeiError, InstanceEndedError, InstanceReason, InstanceState, type RunSpec } from "@clodei/sdk";
import { engineUnavailable } from "../harness/engine.ts";
import { madrid, testImage, TestSystem } from "../harness/system.ts";

const lisbon = { country: "PT", region: "lisbon", datacenter: "tejo-1", tier: 3 } as const;
const paris = { country: "FR", region: "paris", datacenter: "seine-2", tier: 3 } as const;

/** A shell program in the test image. */
const shell = (script: string, more: Omit<RunSpec, "image"> = {}): RunSpec => ({
  image: testImage,
  command: ["sh", "-c", script],
  cpuMillis: 100,
  memoryMib: 32,
  stopGraceSeconds: 1,
  ...more,
});

describe("a customer's containers on three nodes", { skip: engineUnavailable, timeout: 300_000 }, () => {
  let system: TestSystem;
  before(async () => {
    system = await TestSystem.start({
      agents: [
        { name: "mad-1", location: madrid, simulateGpus: "8xH100-SXM" },
        { name: "lis-1", location: lisbon, simulateGpus: "4xL40S" },
        { name: "par-1", location: paris },
      ],
    });
  });
  after(async () => {
    await system[Symbol.asyncDispose]();
  });

  test("offers name each model at its location, marked as simulated", async () => {
    const offers = await Array.fromAsync(system.client.catalog.offers());
    assert.deepEqual(
      offers.map((offer) => [offer.gpuModel, offer.location?.datacenter, offer.simulated]),
      [
        ["H100-SXM", "kumo-1", true],
        ["L40S", "tejo-1", true],
      ],
    );
  });

  test("an instance goes where its model is, runs, and its output arrives", async () => {
    const instance = await system.client.instances.run(
      shell("echo to stdout; echo to stderr >&2; sleep 60", { gpu: { model: "L40S", count: 2 } }),
    );
    const running = await instance.waitUntilRunning({ timeoutMs: 30_000 });
    assert.equal(running.location?.datacenter, "tejo-1");
    assert.equal(running.nodeReachable, true);
    assert.deepEqual(
      running.gpus.map((gpu) => [gpu.model, gpu.simulated, gpu.uuid.startsWith("GPU-SIM-")]),
      [
        ["L40S", true, true],
        ["L40S", true, true],
      ],
    );
    const seen = new Map<string, string>();
    for await (const line of instance.logs().lines()) {
      seen.set(line.stream, line.text);
      if (seen.size === 2) break;
    }
    assert.deepEqual(Object.fromEntries(seen), { stdout: "to stdout", stderr: "to stderr" });
    await instance.delete();
    await instance.waitUntilDeleted({ timeoutMs: 30_000 });
  });

  test("an instance goes where its location constraint says", async () => {
    const instance = await system.client.instances.run(shell("sleep 60", { location: { country: "FR" } }));
    const running = await instance.waitUntilRunning({ timeoutMs: 30_000 });
    assert.deepEqual(
      [running.location?.country, running.location?.region, running.location?.datacenter, running.location?.tier],
      ["FR", "paris", "seine-2", 3],
    );
    await instance.delete();
  });

  test("logs are followed live, line by line as they are written", async () => {
    // Each line but the first is written only when the one before it was read.
    const script = "for i in 1 2 3 4 5; do echo line $i; until [ -e /workspace/$i ]; do sleep 0.05; done; done";
    const instance = await system.client.instances.run(shell(script, { location: { country: "ES" } }));
    const lines: string[] = [];
    for await (const line of instance.logs({ follow: true }).lines()) {
      lines.push(line.text);
      await writeFile(join(system.agent("mad-1").workspaceOf(instance), String(lines.length)), "");
    }
    assert.deepEqual(lines, ["line 1", "line 2", "line 3", "line 4", "line 5"]);
    assert.equal((await instance.waitUntilStopped({ timeoutMs: 30_000 })).reason, InstanceReason.COMPLETED);
  });

  test("stop, start, restart and delete each do what they say, and the workspace survives all but the last", async () => {
    const instance = await system.client.instances.run(
      shell(
        "cat /workspace/count 2>/dev/null; echo x >> /workspace/count; trap 'exit 0' TERM; while :; do sleep 0.1; done",
        {
          gpu: { model: "H100-SXM", count: 8 },
        },
      ),
    );
    await instance.waitUntilRunning({ timeoutMs: 30_000 });

    await instance.stop();
    const stopped = await instance.waitUntilStopped({ timeoutMs: 30_000 });
    assert.equal(stopped.state, InstanceState.STOPPED);
    assert.equal(stopped.reason, InstanceReason.STOPPED_BY_REQUEST);
    assert.equal(stopped.gpus.length, 0, "a stopped instance holds no GPU");

    await instance.start();
    const second = await instance.waitUntilRunning({ timeoutMs: 30_000 });
    assert.equal(second.attempt, 2);
    assert.equal(second.gpus.length, 8);

    await instance.restart();
    const third = await instance.waitUntilRunning({ timeoutMs: 30_000 });
    assert.equal(third.attempt, 3);
    const text: string[] = [];
    for await (const line of instance.logs({ follow: true }).lines()) {
      text.push(line.text);
      if (text.length === 2) break;
    }
    assert.deepEqual(text, ["x", "x"], "the third attempt sees what the first two wrote");

    await instance.delete();
    const deleted = await instance.waitUntilDeleted({ timeoutMs: 30_000 });
    assert.equal(deleted.state, InstanceState.DELETED);
    const states = (await Array.fromAsync(instance.events())).map((event) => event.state);
    assert.equal(states[0], InstanceState.PENDING);
    assert.equal(states.at(-1), InstanceState.DELETED);
  });

  test("a container that exits 3 has failed with that code", async () => {
    const instance = await system.client.instances.run(shell("exit 3"));
    const ended = await instance.waitUntilStopped({ timeoutMs: 30_000 });
    assert.equal(ended.state, InstanceState.FAILED);
    assert.equal(ended.reason, InstanceReason.EXITED_NONZERO);
    assert.equal(ended.exitCode, 3);
  });

  test("a container killed for memory says so", async () => {
    const instance = await system.client.instances.run(shell("x=a; while :; do x=$x$x; done", { memoryMib: 16 }));
    const ended = await instance.waitUntilStopped({ timeoutMs: 60_000 });
    assert.equal(ended.state, InstanceState.FAILED);
    assert.equal(ended.reason, InstanceReason.OUT_OF_MEMORY);
  });

  test("an image that does not exist says so", async () => {
    const instance = await system.client.instances.run({
      ...shell("true"),
      image: "library/no-such-image:1",
      pullPolicy: "NEVER",
    });
    await assert.rejects(instance.waitUntilRunning({ timeoutMs: 30_000 }), (error) => {
      assert.ok(error instanceof InstanceEndedError);
      return true;
    });
    const ended = await instance.refresh();
    assert.equal(ended.state, InstanceState.FAILED);
    assert.equal(ended.reason, InstanceReason.IMAGE_NOT_FOUND);
    assert.match(ended.message, /no-such-image/);
  });

  test("an image outside the allowlist is refused, and the answer says what is allowed", async () => {
    await assert.rejects(system.client.instances.run({ image: "evil.example/miner" }), (error) => {
      assert.ok(error instanceof ClodeiError);
      assert.equal(error.reason, "IMAGE_NOT_ALLOWED");
      assert.match(JSON.stringify([error.message, error.fieldViolations]), /pytorch\//);
      return true;
    });
  });

  test("a request for more than any node has waits, says what would fit, and fails at its deadline", async () => {
    const instance = await system.client.instances.run(
      shell("true", { gpu: { model: "H100-SXM", count: 16 }, placementTimeoutSeconds: 2 }),
    );
    assert.equal((await instance.refresh()).state, InstanceState.PENDING);
    const ended = await instance.waitUntilStopped({ timeoutMs: 30_000 });
    assert.equal(ended.reason, InstanceReason.PLACEMENT_TIMED_OUT);
    assert.match(ended.message, /H100-SXM/);
  });

  // Each breaks one rule of the schema; the answer names the field. What the SDK's types forbid goes in as it is on the wire.
  const violations: readonly (readonly [field: string, spec: Partial<RunSpec>])[] = [
    ["spec.image", { image: "" }],
    ["spec.image", { image: "busy box" }],
    ["spec.command", { command: Array.from({ length: 129 }, () => "x") }],
    ["spec.command[0]", { command: ["x".repeat(8193)] }],
    ["spec.args", { args: Array.from({ length: 129 }, () => "x") }],
    ["spec.args[0]", { args: ["a\0b"] }],
    ["spec.env", { env: Object.fromEntries(Array.from({ length: 129 }, (_, index) => [`V${index}`, ""])) }],
    ['spec.env["1A"]', { env: { "1A": "" } }],
    ['spec.env["A"]', { env: { A: "x".repeat(4097) } }],
    ["spec.gpu.count", { gpu: { count: 17 } }],
    ["spec.gpu.model", { gpu: { model: "h100", count: 1 } }],
    ["spec.gpu", { gpu: { model: "H100-SXM", count: 0 } }],
    ["spec.cpu_millis", { cpuMillis: 49 }],
    ["spec.memory_mib", { memoryMib: 15 }],
    ["spec.location.country", { location: { country: "es" } }],
    ["spec.labels", { labels: Object.fromEntries(Array.from({ length: 33 }, (_, index) => [`l${index}`, ""])) }],
    ['spec.labels["Bad Key"]', { labels: { "Bad Key": "" } }],
    ["spec.placement_timeout", { placementTimeoutSeconds: 0 }],
    ["spec.max_run_time", { maxRunTimeSeconds: 0 }],
    ["spec.stop_grace", { stopGraceSeconds: 121 }],
  ];
  for (const [field, spec] of violations) {
    test(`a specification that breaks a rule of ${field} is refused with that field: ${JSON.stringify(spec).slice(0, 40)}`, async () => {
      await assert.rejects(system.client.instances.run({ image: testImage, ...spec }), (error) => {
        assert.ok(error instanceof ClodeiError);
        assert.equal(error.reason, "INVALID_ARGUMENT", error.message);
        const named = error.fieldViolations.map((violation) => violation.field);
        assert.ok(named.includes(field), `named ${named.join(", ")}`);
        assert.ok(error.fieldViolations.every((violation) => violation.message !== ""));
        return true;
      });
    });
  }

  const unsupported: readonly (readonly [string, MessageInitShape<typeof InstanceSpecSchema>])[] = [
    ["spec.disk_mib", { diskMib: 1024 }],
    ["spec.workspace_mib", { workspaceMib: 1024 }],
    ["spec.ports", { ports: [{ containerPort: 80, protocol: PortProtocol.TCP }] }],
  ];
  for (const [field, spec] of unsupported) {
    test(`${field} is refused as not supported yet`, async () => {
      await assert.rejects(
        system.client.services.instances.createInstance({ spec: { ...spec, image: testImage } }),
        (error) => {
          assert.ok(error instanceof ClodeiError);
          assert.equal(error.reason, "NOT_SUPPORTED_YET");
          assert.match(JSON.stringify([error.message, error.fieldViolations]), new RegExp(field.replace("spec.", "")));
          return true;
        },
      );
    });
  }
});
