import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Readable } from "node:stream";
import { DockerClient } from "./docker-client.ts";
import { EngineError, type EngineErrorKind } from "./engine-error.ts";
import { jsonLines } from "./json-lines.ts";

const { signal } = new AbortController();
const limits = { signal, timeoutMs: 10_000 };

function fails(kind: EngineErrorKind, message: RegExp) {
  return (error: unknown): boolean =>
    error instanceof EngineError && error.kind === kind && message.test(error.message);
}

/** Something on the engine's socket that answers every call with these bytes and hangs up. */
async function withAnswer(bytes: string, work: (client: DockerClient) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-docker-"));
  const server = createServer((socket) => {
    socket.on("error", () => undefined);
    socket.once("data", () => socket.end(bytes));
  });
  server.listen(join(folder, "docker.sock"));
  await once(server, "listening");
  try {
    await work(new DockerClient(join(folder, "docker.sock")));
  } finally {
    server.close();
    await rm(folder, { recursive: true });
  }
}

describe("a call to the engine that fails", () => {
  it("is the engine's absence where nothing listens, or the connection breaks anywhere", async () => {
    const nowhere = new DockerClient("/nonexistent/docker.sock");
    await assert.rejects(nowhere.get("answer", "/info", signal), fails("away", /does not answer .*ENOENT/));
    const head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    for (const bytes of ["", "no HTTP at all", head]) {
      await withAnswer(bytes, async (client) => {
        await assert.rejects(client.get("answer", "/info", signal), fails("away", /does not answer/), bytes);
      });
    }
    for (const body of [`${head}Content-Length: 99\r\n\r\n{"a":1}\n{"b`, `${head}\r\n{"a":1}\n{"b`]) {
      await withAnswer(body, async (client) => {
        const lines = client.call("pull the image", limits, async (docker) => {
          const stream: unknown = await docker.createImage({}, { fromImage: "a", tag: "b" });
          for await (const _ of jsonLines(stream as Readable));
        });
        await assert.rejects(lines, fails("away", /does not answer/), body);
      });
    }
  });

  it("is no absence of the engine where this program made a mistake", async () => {
    const client = new DockerClient("/nonexistent/docker.sock");
    const nothing = JSON.parse("null") as { readonly name: string };
    const mistakes: (() => Promise<unknown>)[] = [
      async () => nothing.name,
      async () => Buffer.alloc(-1),
      async () => new URL("no address"),
      async () => {
        throw new Error("somebody's plain words");
      },
    ];
    for (const mistake of mistakes) {
      await assert.rejects(client.call("do it", limits, mistake), fails("failed", /^could not do it: /));
    }
  });
});
