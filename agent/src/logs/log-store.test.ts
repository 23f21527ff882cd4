import assert from "node:assert/strict";
import { mkdtemp, readdir, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { create } from "@bufbuild/protobuf";
import { ContainerSpecSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { PullPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { LogPositionSchema, LogStream } from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { eventually } from "../../../test/harness/eventually.ts";
import { engineUnavailable, startTestEngine } from "../../../test/harness/engine.ts";
import { importBusybox } from "../../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../../tools/engine/private-engine.ts";
import type { AttemptKey } from "../containers/container-body.ts";
import { ContainerEngine } from "../containers/engine.ts";
import { LogsNotFoundError, LogStore, maxAttemptsPerInstance } from "./log-store.ts";
import type { LogEvent, LogRequest } from "./spool-reader.ts";

const image = "docker.io/library/busybox:latest";
const signal = new AbortController().signal;

/** What a reader got, put together. */
class Received {
  readonly #parts = new Map<LogStream, Buffer[]>();
  readonly #next = new Map<LogStream, bigint>();
  readonly #gapBytes = new Map<LogStream, bigint>();
  gaps = 0;
  ended = false;

  take(event: LogEvent): void {
    if (event.kind === "end") this.ended = true;
    else if (event.kind === "gap") {
      this.gaps += 1;
      const { stream, lengthBytes } = event.gap;
      this.#gapBytes.set(stream, this.gapBytes(stream) + lengthBytes);
    } else {
      const { stream, offset, data } = event.chunk;
      const next = this.#next.get(stream);
      if (next !== undefined) assert.equal(offset, next, "a chunk begins where the one before ended");
      this.#next.set(stream, offset + BigInt(data.length));
      this.#parts.set(stream, [...(this.#parts.get(stream) ?? []), Buffer.from(data)]);
    }
  }

  gapBytes(stream: LogStream): bigint {
    return this.#gapBytes.get(stream) ?? 0n;
  }

  text(stream: LogStream): string {
    return Buffer.concat(this.#parts.get(stream) ?? []).toString("latin1");
  }

  positions() {
    return [...this.#next].map(([stream, offset]) => create(LogPositionSchema, { stream, offset }));
  }
}

/** Fails with the first line that differs, instead of printing two texts of a megabyte. */
function assertLines(text: string, prefix: string, count: number): void {
  const lines = text.split("\n");
  assert.equal(lines.pop(), "", `${prefix} ends with a whole line`);
  for (const [index, line] of lines.entries()) assert.equal(line, `${prefix}${index + 1}`);
  assert.equal(lines.length, count);
}

describe("logs of real containers", { skip: engineUnavailable }, () => {
  let engine: PrivateEngine;
  let containers: ContainerEngine;
  let folder: string;

  before(async () => {
    engine = await startTestEngine();
    folder = await mkdtemp(join(tmpdir(), "clodei-logs-"));
    await importBusybox(engine.socketPath, image);
    containers = new ContainerEngine({
      socketPath: engine.socketPath,
      nodeId: newId("nod"),
      workspaceFolder: join(folder, "workspaces"),
      simulatedGpus: new Set(),
    });
  });
  after(async () => {
    await engine.close();
    await rm(folder, { recursive: true, force: true });
  });

  const store = (maxBytesPerAttempt?: number): LogStore =>
    new LogStore({
      folder: join(folder, "logs"),
      engine: containers,
      ...(maxBytesPerAttempt === undefined ? {} : { maxBytesPerAttempt }),
    });

  async function run(script: string): Promise<AttemptKey> {
    const key = { instanceId: newId("ins"), attempt: 1 };
    const spec = create(ContainerSpecSchema, { image, command: ["sh", "-c", script], cpuMillis: 2000, memoryMib: 64 });
    const local = await containers.ensureImage(image, PullPolicy.NEVER, () => {}, signal);
    await containers.create(key, 1n, spec, local, signal);
    await containers.start(key, signal);
    return key;
  }

  async function readAll(logs: LogStore, key: AttemptKey, request: Partial<LogRequest> = {}): Promise<Received> {
    const received = new Received();
    for await (const event of logs.read(key, { follow: false, ...request }, signal)) received.take(event);
    return received;
  }

  it("keeps 100,000 lines of each stream exactly, across restarts of the collector and of the engine", async () => {
    const lines = 100_000;
    // With pauses, so that it still writes after the second restart on a fast machine. And silent where it is asked to
    // be: what an engine has read and not written when it ends is lost, whoever collects.
    const rest = "[ $((i % 2500)) = 0 ] && usleep 200000";
    const hush = "[ $((i % 100)) = 0 ] && while [ -e /workspace/hush ]; do : > /workspace/hushed; usleep 10000; done";
    const script = `i=1; while [ $i -le ${lines} ]; do echo out$i; echo err$i >&2; ${rest}; ${hush}; i=$((i+1)); done; exit 0`;
    const key = await run(script);
    const workspace = join(folder, "workspaces", key.instanceId);
    const received = new Received();
    let collections = 0;
    let engineRestarts = 0;
    for (;;) {
      // Each round is an agent of its own: nothing but the folder is carried over.
      const logs = store();
      const stop = new AbortController();
      const collected = logs.collect(key, stop.signal).then(
        () => "done",
        (error: unknown) => error,
      );
      const reading = (async () => {
        const positions = received.positions();
        try {
          for await (const event of logs.read(key, { follow: true, positions }, stop.signal)) received.take(event);
        } catch (error) {
          if (!stop.signal.aborted) throw error;
        }
      })();
      collections += 1;
      await Promise.race([reading, new Promise((resolve) => setTimeout(resolve, 60 + collections * 40))]);
      if (collections === 3 || collections === 5) {
        // The first of them under a collector that goes on, the second while nobody collects.
        if (collections === 5) stop.abort();
        await writeFile(join(workspace, "hush"), "");
        await eventually(60_000, () => stat(join(workspace, "hushed")));
        // For what is between the script and the engine's file.
        await new Promise((resolve) => setTimeout(resolve, 1000));
        await engine.stopDaemon();
        await engine.startDaemon();
        await rm(join(workspace, "hushed"));
        await rm(join(workspace, "hush"));
        engineRestarts += 1;
        await Promise.race([reading, new Promise((resolve) => setTimeout(resolve, 100))]);
      }
      stop.abort();
      await Promise.all([collected, reading]);
      if (received.ended) break;
      assert.ok(collections < 200, "the output ends");
    }
    assert.equal(engineRestarts, 2, "the container wrote for long enough");
    assert.ok(collections > 4, `only ${collections} collectors`);
    assertLines(received.text(LogStream.STDOUT), "out", lines);
    assertLines(received.text(LogStream.STDERR), "err", lines);
    assert.equal(received.gaps, 0);
    const again = await readAll(store(), key);
    assertLines(again.text(LogStream.STDOUT), "out", lines);
    await containers.remove(key, signal);
    assert.equal((await readAll(store(), key)).text(LogStream.STDERR).length, again.text(LogStream.STDERR).length);
  });

  it("keeps bytes as they were: binary, long lines, no line feed at the end", async () => {
    const key = await run(
      "printf '\\377\\376\\000x\\n'; head -c 50000 /dev/zero | tr '\\0' 'y'; printf '\\303\\244'; echo; printf last; printf e >&2",
    );
    const logs = store();
    await logs.collect(key, signal);
    const received = await readAll(logs, key);
    assert.equal(received.text(LogStream.STDOUT), `\xff\xfe\0x\n${"y".repeat(50_000)}\xc3\xa4\nlast`);
    assert.equal(received.text(LogStream.STDERR), "e");
    assert.ok(received.ended);
    await containers.remove(key, signal);
  });

  it("keeps the newest of a flood within its bound and names what it dropped", async () => {
    const lines = 60_000;
    const text = "z".repeat(80);
    const key = await run(`i=1; while [ $i -le ${lines} ]; do echo ${text}; i=$((i+1)); done; echo the end >&2`);
    const maxBytes = 1024 * 1024;
    const logs = store(maxBytes);
    await logs.collect(key, signal);
    const received = await readAll(logs, key);
    const kept = received.text(LogStream.STDOUT);
    const dropped = received.gapBytes(LogStream.STDOUT);
    assert.equal(dropped + BigInt(kept.length), BigInt(lines * (text.length + 1)));
    assert.ok(dropped > 0n && kept.length > maxBytes / 4);
    // The engine reads the streams one beside the other: their order is its own.
    const end = received.text(LogStream.STDERR);
    assert.equal(BigInt(end.length) + received.gapBytes(LogStream.STDERR), BigInt("the end\n".length));
    assert.ok(end === "" || end === "the end\n");
    assert.ok(received.ended);
    const spool = join(folder, "logs", key.instanceId, "1");
    let bytes = 0;
    for (const name of await readdir(spool)) {
      const file = await stat(join(spool, name));
      assert.equal(file.mode & 0o777, 0o600);
      bytes += file.size;
    }
    assert.ok(bytes <= maxBytes, `${bytes} bytes`);
    await containers.remove(key, signal);
  });

  it("follows live, tells times, gives the last lines and those since a time", async () => {
    // What comes next is written only when what was before it was read, and a second later: times differ.
    const key = await run(
      "rest() { until [ -e /workspace/$1 ]; do sleep 0.05; done; sleep 1; }; " +
        "echo first; rest first; echo second >&2; echo third; rest third; echo fourth",
    );
    const logs = store();
    const collecting = logs.collect(key, signal);
    const live: { text: string; stampMs: number }[] = [];
    for await (const event of logs.read(key, { follow: true }, signal)) {
      if (event.kind !== "chunk") continue;
      const time = event.chunk.time ?? assert.fail("a chunk has a time");
      const stampMs = Number(time.seconds) * 1000 + time.nanos / 1e6;
      const text = Buffer.from(event.chunk.data).toString();
      live.push({ text, stampMs });
      await writeFile(join(folder, "workspaces", key.instanceId, text.trim()), "");
    }
    await collecting;
    assert.deepEqual(live.map(({ text }) => text).toSorted(), ["first\n", "fourth\n", "second\n", "third\n"]);
    const [begin = 0, end = 0] = [live[0]?.stampMs, live.at(-1)?.stampMs];
    assert.ok(end - begin >= 2000 && end <= Date.now(), `from ${begin} to ${end}`);
    assert.equal((await readAll(logs, key, { tailLines: 1 })).text(LogStream.STDOUT), "fourth\n");
    const two = await readAll(logs, key, { tailLines: 0 });
    assert.equal(two.text(LogStream.STDOUT) + two.text(LogStream.STDERR), "");
    const stamp = live.at(-1)?.stampMs ?? 0;
    const sinceTime = {
      $typeName: "google.protobuf.Timestamp",
      seconds: BigInt(Math.floor(stamp / 1000)),
      nanos: 0,
    } as const;
    assert.match((await readAll(logs, key, { sinceTime })).text(LogStream.STDOUT), /^fourth\n$/);
    await containers.remove(key, signal);
  });

  it("takes up a container that wrote and was not collected for a while, and ends where it is gone", async () => {
    const key = await run("seq 1 1000");
    await containers.waitEnd(key, signal);
    const logs = store();
    await logs.collect(key, signal);
    const lines = (await readAll(logs, key)).text(LogStream.STDOUT).split("\n");
    assert.equal(lines.length, 1001);
    await containers.remove(key, signal);
    const never = { instanceId: newId("ins"), attempt: 1 };
    await assert.rejects(readAll(logs, never), LogsNotFoundError);
    await logs.expect(never);
    assert.equal((await readAll(logs, never)).ended, false);
    await logs.collect(never, signal);
    assert.equal((await readAll(logs, never)).ended, true);
  });

  it("keeps the newest attempts of an instance that is started again and again", async () => {
    const logs = store();
    const instanceId = newId("ins");
    const attempts = Array.from({ length: maxAttemptsPerInstance + 3 }, (_, index) => index + 1);
    await logs.expect({ instanceId, attempt: 1 });
    const reader = logs.read({ instanceId, attempt: 1 }, { follow: true }, signal);
    const waits = reader.next();
    for (const attempt of attempts.slice(1)) await logs.finish({ instanceId, attempt });
    assert.equal((await waits).done, true, "a reader of an attempt that is dropped is let go");
    const kept = (await readdir(join(folder, "logs", instanceId))).map(Number).toSorted((a, b) => a - b);
    assert.deepEqual(kept, attempts.slice(-maxAttemptsPerInstance));
    await assert.rejects(readAll(logs, { instanceId, attempt: 3 }), LogsNotFoundError);
    assert.equal((await readAll(logs, { instanceId, attempt: 4 })).ended, true);
    // One that is opened late stays as long as it is the last that was opened.
    await logs.finish({ instanceId, attempt: 2 });
    assert.equal((await readAll(logs, { instanceId, attempt: 2 })).ended, true);
    await logs.remove(instanceId);
  });

  it("removes an instance's logs and lets its readers go", async () => {
    const key = await run("echo here; sleep 100");
    const logs = store();
    const stop = new AbortController();
    const collecting = logs.collect(key, stop.signal);
    const reader = logs.read(key, { follow: true }, signal);
    const first = await reader.next();
    assert.ok(first.done !== true && first.value.kind === "chunk");
    stop.abort();
    await collecting;
    await logs.remove(key.instanceId);
    assert.equal((await reader.next()).done, true);
    assert.ok(!(await logs.instances()).includes(key.instanceId));
    await containers.stop(key, 0, signal);
    await containers.remove(key, signal);
  });
});
