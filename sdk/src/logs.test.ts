import assert from "node:assert/strict";
import { setTimeout as delay } from "node:timers/promises";
import { test } from "node:test";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import {
  LogStream,
  type StreamLogsRequest,
  type StreamLogsResponseSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { newId } from "@clodei/proto/ids";
import { instances, type ServerForClientTests, startServerForClientTests } from "./server-for-client-tests.ts";

const id = newId("ins");

type LogMessage = MessageInitShape<typeof StreamLogsResponseSchema>;

const line = (text: string) => new TextEncoder().encode(text);

function chunk(stream: LogStream, offset: number, data: Uint8Array, timeMs = 1000): LogMessage {
  const value = { attempt: 1, stream, offset: BigInt(offset), data, time: timestampFromMs(timeMs) };
  return { event: { case: "chunk", value } };
}

const end: LogMessage = { event: { case: "end", value: { attempt: 1 } } };

test("logs are read exactly once through cuts at every place, whatever overlaps", async () => {
  const texts = {
    [LogStream.STDOUT]: Array.from({ length: 400 }, (_item, index) => `out ${index} ü\n`).join(""),
    [LogStream.STDERR]: Array.from({ length: 400 }, (_item, index) => `err ${index} 🚀\n`).join(""),
  };
  const requests: StreamLogsRequest[] = [];
  const server: ServerForClientTests = await startServerForClientTests(
    instances({
      async *streamLogs(request) {
        requests.push(request);
        const next = new Map(request.positions.map(({ stream, offset }) => [stream, Number(offset)]));
        let sent = 0;
        for (const stream of [LogStream.STDOUT, LogStream.STDERR, LogStream.STDOUT, LogStream.STDERR] as const) {
          const bytes = line(texts[stream]);
          const half = Math.floor(bytes.length / 2);
          const from = next.get(stream) ?? 0;
          // Begins up to 150 bytes, so more than a chunk, before the place that was asked for, as a server may that sends whole lines.
          for (let at = Math.max(0, from - 150); at < bytes.length; at += 97) {
            yield chunk(stream, at, bytes.subarray(at, at + 97));
            next.set(stream, Math.min(at + 97, bytes.length));
            if (++sent === 20 && requests.length < 8) {
              await delay(5);
              server.cutConnections();
              await delay(20);
              return;
            }
            if (at > half && from < half) break;
          }
        }
        yield end;
      },
      getInstance: () => ({ instance: { id } }),
    }),
  );
  await using _ = server;
  const handle = await server.client().instances.get(id);
  const bytes: Record<string, Uint8Array[]> = { stdout: [], stderr: [] };
  const text: Record<string, string> = { stdout: "", stderr: "" };
  for await (const part of handle.logs()) {
    bytes[part.stream]?.push(part.data);
    text[part.stream] += part.text;
    assert.equal(part.missingBytes, 0n);
  }
  assert.equal(Buffer.concat(bytes["stdout"] ?? []).toString(), texts[LogStream.STDOUT]);
  assert.equal(Buffer.concat(bytes["stderr"] ?? []).toString(), texts[LogStream.STDERR]);
  assert.deepEqual([text["stdout"], text["stderr"]], [texts[LogStream.STDOUT], texts[LogStream.STDERR]]);
  assert.ok(requests.length >= 5, `${requests.length} requests`);
  assert.ok(requests.slice(1).every(({ attempt, positions }) => attempt === 1 && positions.length > 0));
});

async function serverWithLogs(
  answers: ((request: StreamLogsRequest) => LogMessage[])[],
  requests: StreamLogsRequest[] = [],
) {
  return await startServerForClientTests(
    instances({
      getInstance: () => ({ instance: { id } }),
      async *streamLogs(request) {
        requests.push(request);
        yield* answers.shift()?.(request) ?? [];
      },
    }),
  );
}

test("lines join what chunks cut, and text is everything", async () => {
  const answer = () => [
    chunk(LogStream.STDOUT, 0, line("one\ntw")),
    chunk(LogStream.STDERR, 0, line("oops\n")),
    chunk(LogStream.STDOUT, 6, line("o\n\nlast")),
    end,
  ];
  await using server = await serverWithLogs([answer, answer]);
  const handle = await server.client().instances.get(id);
  const lines = await Array.fromAsync(handle.logs().lines());
  assert.deepEqual(
    lines.map(({ stream, text }) => `${stream}: ${text}`),
    ["stdout: one", "stderr: oops", "stdout: two", "stdout: ", "stdout: last"],
  );
  assert.equal(await handle.logs().text(), "one\ntwoops\no\n\nlast");
});

test("output that is gone is told of, by a gap and by a begin that is not the begin", async () => {
  const gap: LogMessage = {
    event: { case: "gap", value: { attempt: 1, stream: LogStream.STDOUT, offset: 0n, lengthBytes: 100n } },
  };
  await using server = await serverWithLogs([
    () => [gap, chunk(LogStream.STDOUT, 100, line("a\n")), chunk(LogStream.STDERR, 50, line("b\n")), end],
  ]);
  const handle = await server.client().instances.get(id);
  const chunks = await Array.fromAsync(handle.logs());
  assert.deepEqual(
    chunks.map(({ stream, text, missingBytes }) => [stream, text, missingBytes]),
    [
      ["stdout", "", 100n],
      ["stdout", "a\n", 0n],
      ["stderr", "b\n", 50n],
    ],
  );
});

test("a tail stays a tail after a cut, also for a stream of which nothing had come", async () => {
  const requests: StreamLogsRequest[] = [];
  await using server = await serverWithLogs(
    [
      // The server ends a followed stream without "end", as one that drains does.
      () => [chunk(LogStream.STDOUT, 500, line("new\n"), 5000)],
      () => [chunk(LogStream.STDERR, 0, line("old\n"), 1000), chunk(LogStream.STDERR, 4, line("newer\n"), 6000), end],
    ],
    requests,
  );
  const handle = await server.client().instances.get(id);
  assert.equal(await handle.logs({ tailLines: 1 }).text(), "new\nnewer\n");
  assert.deepEqual(
    requests.map(({ tailLines, positions, follow }) => [tailLines, positions.length, follow]),
    [
      [1, 0, true],
      [undefined, 1, true],
    ],
  );
});

test("without follow, logs end where the server ends them", async () => {
  const requests: StreamLogsRequest[] = [];
  await using server = await serverWithLogs([() => [chunk(LogStream.STDOUT, 0, line("a\n"))]], requests);
  const handle = await server.client().instances.get(id);
  assert.equal(await handle.logs({ follow: false, since: new Date(500) }).text(), "a\n");
  assert.deepEqual([requests.length, requests[0]?.follow, requests[0]?.sinceTime?.nanos], [1, false, 500_000_000]);
});
