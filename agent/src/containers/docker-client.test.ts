import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { DockerClient, refusalOf, unless } from "./docker-client.ts";
import { EngineError, type EngineErrorKind } from "./engine-error.ts";
import { jsonLines } from "./json-lines.ts";

const { signal } = new AbortController();

function fails(kind: EngineErrorKind, message: RegExp) {
  return (error: unknown): boolean =>
    error instanceof EngineError && error.kind === kind && message.test(error.message);
}

function answer(body: string, status = "200 OK"): string {
  return `HTTP/1.1 ${status}\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`;
}

/** Something on the engine's socket that answers every call with these bytes and then hangs up, or does not. */
async function withAnswer(
  bytes: string,
  work: (client: DockerClient) => Promise<void>,
  connection: "hang up" | "keep" = "hang up",
): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-docker-"));
  const server = createServer((socket) => {
    socket.on("error", () => undefined);
    socket.once("data", () => (connection === "keep" ? socket.write(bytes) : socket.end(bytes)));
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
        const lines = client.read(
          "pull the image",
          { method: "POST", path: "/images/create" },
          signal,
          async (stream) => {
            for await (const _ of jsonLines(stream));
          },
        );
        await assert.rejects(lines, fails("away", /does not answer/), body);
      });
    }
  });

  it("is no absence of the engine where this program made a mistake", async () => {
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
      await withAnswer(answer("{}"), async (client) => {
        const work = client.read("do it", { method: "GET", path: "/info" }, signal, mistake);
        await assert.rejects(work, fails("failed", /^could not do it: /));
      });
    }
  });

  it("says what the engine said, and its status", async () => {
    const refusals: [status: string, body: string, kind: EngineErrorKind, message: RegExp][] = [
      ["404 Not Found", '{"message":"No such container: a"}', "not_found", /^could not do it: No such container: a$/],
      ["500 Internal Server Error", '{"message":"out of luck"}', "failed", /^could not do it: out of luck$/],
      ["500 Internal Server Error", '{"message":"ttrpc: closed"}', "away", /ttrpc: closed$/],
      ["502 Bad Gateway", "a proxy's page", "failed", /^could not do it: a proxy's page$/],
      ["503 Service Unavailable", "", "failed", /^could not do it: status 503$/],
      ["500 Internal Server Error", "x".repeat(100_000), "failed", /^could not do it: its words are without end$/],
    ];
    for (const [status, body, kind, message] of refusals) {
      await withAnswer(answer(body, status), async (client) => {
        await assert.rejects(client.get("do it", "/info", signal), (error) => {
          assert.equal(refusalOf(error)?.status, Number(status.slice(0, 3)));
          return fails(kind, message)(error);
        });
      });
    }
    await withAnswer("HTTP/1.1 304 Not Modified\r\n\r\n", async (client) => {
      await client.json("start it", { method: "POST", path: "/start" }, signal).catch(unless(304));
      await assert.rejects(client.json("start it", { method: "POST", path: "/start" }, signal).catch(unless(404)));
    });
  });

  it("ends in the middle of an answer: at the caller's wish, and at its limit", async () => {
    const begun = `HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{`;
    await withAnswer(
      begun,
      async (client) => {
        const late = client.json("answer", { method: "GET", path: "/info", timeoutMs: 50 }, signal);
        await assert.rejects(late, fails("away", /did not answer within 50 ms/));
        const stop = new AbortController();
        const asked = client.get("answer", "/info", stop.signal);
        const followed = client.wait("answer", { method: "POST", path: "/wait" }, stop.signal);
        setTimeout(() => stop.abort(new Error("enough")), 50);
        await assert.rejects(asked, /^Error: enough$/);
        await assert.rejects(followed, /^Error: enough$/);
        await assert.rejects(client.get("answer", "/info", stop.signal), /^Error: enough$/);
      },
      "keep",
    );
  });
});
