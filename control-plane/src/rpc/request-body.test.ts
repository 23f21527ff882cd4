import assert from "node:assert/strict";
import { once } from "node:events";
import { connect as connectHttp2, constants } from "node:http2";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { createClient } from "@connectrpc/connect";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import {
  adminCredential,
  sendPlain,
  showingRoutes,
  startTestListener,
  type TestListener,
  transportKinds,
} from "./test-listener.ts";

describe("a request's body", { timeout: 120_000 }, () => {
  /** Sends the beginning of a request over HTTP/2, and returns the answer once the stream is ended without the rest. */
  async function sendUnended(listener: TestListener, headers: Record<string, string>, beginning: Buffer) {
    const client = connectHttp2(listener.url, { ca: listener.caPem });
    try {
      const stream = client.request(
        {
          ":method": "POST",
          ":path": "/clodei.v1.InstanceService/CreateInstance",
          te: "trailers",
          authorization: adminCredential,
          ...headers,
        },
        { endStream: false },
      );
      const answer = { body: "", trailers: {} as object };
      stream.on("data", (part: Buffer) => (answer.body += part.toString()));
      stream.once("trailers", (trailers: object) => (answer.trailers = trailers));
      stream.write(beginning);
      await once(stream, "close");
      assert.equal(stream.rstCode, constants.NGHTTP2_NO_ERROR, "what the client sent was no error");
      return answer;
    } finally {
      client.destroy();
    }
  }

  /** The words of an answer: of gRPC's in the trailers, whole before the stream is ended. */
  async function wordsFor(listener: TestListener, type: string, beginning: Buffer): Promise<string> {
    const { body, trailers } = await sendUnended(listener, { "content-type": type }, beginning);
    if (type !== "application/grpc+proto") return decodeURIComponent(body.replaceAll(/%(?![0-9A-F]{2})/gu, "%25"));
    assert.ok("grpc-message" in trailers, "the trailers came before the end");
    return decodeURIComponent(String(trailers["grpc-message"]));
  }
  const bodyTypes = ["application/grpc+proto", "application/grpc-web+proto", "application/proto", "application/json"];

  test("ends a request whose answer does not wait for the rest of its body, though that never comes", async () => {
    await using listener = await startTestListener(showingRoutes, { requestTimeoutMs: 600_000 });
    const send = async (type: string): Promise<void> => {
      const beginning = Buffer.alloc(type.includes("grpc") ? 10 : 4 * 1024 * 1024 + 1);
      // Of a frame: the length of a message that is too large.
      if (type.includes("grpc")) beginning.writeUInt32BE(5 * 1024 * 1024, 1);
      assert.match(await wordsFor(listener, type, beginning), /larger than 4194304 bytes/, type);
    };
    const preflight = {
      ":method": "OPTIONS",
      origin: "https://console.example",
      "access-control-request-method": "POST",
    };
    await Promise.all([...bodyTypes.map(send), sendUnended(listener, preflight, Buffer.alloc(10))]);
    await listener.untilLogged(/CreateInstance","code":"invalid_argument"/, bodyTypes.length);
    // Node does not tell of the end of an answer that has no body: the limit ends it.
    await using hasty = await startTestListener(showingRoutes, { requestTimeoutMs: 500 });
    await sendUnended(hasty, { ":method": "HEAD" }, Buffer.alloc(10));
  });

  test("gives up a request that does not come whole in time, and says so", async () => {
    await using listener = await startTestListener(showingRoutes, { requestTimeoutMs: 500 });
    const send = async (type: string): Promise<void> => {
      const words = await wordsFor(listener, type, Buffer.of(0, 0, 0, 0, 2, 0));
      assert.match(words, /did not come whole within 0\.5 s/, type);
    };
    await Promise.all(bodyTypes.map(send));
    await listener.untilLogged(/CreateInstance","code":"deadline_exceeded"/, bodyTypes.length);
  });

  test("gives up no request that has come whole, however long its answer takes", async () => {
    await using listener = await startTestListener(
      (router) => {
        router.rpc(InstanceService.method.listInstances, async () => {
          await sleep(2_500);
          return {};
        });
      },
      { requestTimeoutMs: 1_000 },
    );
    const path = "/clodei.v1.InstanceService/ListInstances?encoding=json&message=%7B%7D&connect=v1";
    const [got] = await Promise.all([
      sendPlain(listener, { method: "GET", path, headers: { authorization: adminCredential } }),
      ...transportKinds.map((kind) =>
        createClient(InstanceService, listener.transport(kind, adminCredential)).listInstances({}),
      ),
    ]);
    assert.deepEqual([got.status, got.body], [200, "{}"]);
  });
});
