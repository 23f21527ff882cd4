import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttp1Server } from "node:http";
import { createServer as createHttp2Server } from "node:http2";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { createClient } from "@connectrpc/connect";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { openWire as openBrowserWire } from "./transport-browser.ts";
import { openWire as openNodeWire } from "./transport-node.ts";

/** A message in its envelope: a flag, a length, and the message, which may be empty. */
const message = Buffer.of(0, 0, 0, 0, 0);
const partOfMessage = Buffer.of(0, 0, 0, 0, 9, 1, 2);

type Answer = { writeHead(status: number, headers: Record<string, string>): unknown; end(body: Buffer): unknown };

/** Answers as Connect's streams do. */
const answering =
  (body: Buffer) =>
  (_request: unknown, response: Answer): void => {
    response.writeHead(200, { "content-type": "application/connect+proto" });
    response.end(body);
  };

for (const [platform, openWire, createServer] of [
  ["Node", openNodeWire, (body: Buffer) => createHttp2Server(answering(body))],
  ["a browser", openBrowserWire, (body: Buffer) => createHttp1Server(answering(body))],
] as const) {
  for (const [where, body] of [
    ["inside a message", Buffer.concat([message, partOfMessage])],
    ["inside an envelope", Buffer.concat([message, partOfMessage.subarray(0, 3)])],
    ["before its last message", message],
  ] as const) {
    test(`in ${platform} a stream that is ended in order ${where} is a lost connection`, async () => {
      const server = createServer(body).listen(0, "127.0.0.1");
      await once(server, "listening");
      const { port } = server.address() as AddressInfo;
      const options = { endpoint: `http://127.0.0.1:${port}`, ca: undefined, connectTimeoutMs: 10_000 };
      const wire = openWire(options);
      const client = createClient(InstanceService, wire.transport);
      const error = await Array.fromAsync(client.watchInstances({})).catch((cause: unknown) => cause);
      wire.close();
      server.close();
      assert.equal(wire.isConnectionLost(error), true, String(error));
    });
  }
}
