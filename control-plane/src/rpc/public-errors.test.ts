// Errors as customers get them: each has a code, a reason and words, whichever part of the listener it comes from.
import assert from "node:assert/strict";
import { once } from "node:events";
import { connect as connectHttp2, constants } from "node:http2";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { gzipSync } from "node:zlib";
import { Code, createClient } from "@connectrpc/connect";
import { findTrailerError } from "@connectrpc/connect/protocol-grpc";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import {
  adminCredential,
  reasonOf,
  rejection,
  secret,
  sendPlain,
  showingRoutes,
  startTestListener,
  transportKinds,
} from "./test-listener.ts";

describe("errors of the public listener", { timeout: 120_000 }, () => {
  test("tells errors with reason, fields and delay, and keeps its own to the log", async () => {
    await using listener = await startTestListener(showingRoutes);
    for (const kind of transportKinds) {
      const client = createClient(InstanceService, listener.transport(kind, adminCredential));
      const invalid = await rejection(
        client.createInstance({ spec: { image: "busybox", gpu: { model: "H100-SXM", count: 99 } } }),
      );
      assert.equal(invalid.code, Code.InvalidArgument, kind);
      const [violation] = invalid.findDetails(BadRequestSchema)[0]?.fieldViolations ?? [];
      assert.equal(violation?.field, "spec.gpu.count");
      assert.equal(violation?.reason, "uint32.lte");
      assert.match(violation?.description ?? "", /less than or equal to 16/);

      const conflict = await rejection(client.stopInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" }));
      assert.equal(conflict.code, Code.Aborted);
      const [info] = conflict.findDetails(ErrorInfoSchema);
      assert.equal(info?.reason, "CONFLICT");
      assert.equal(info?.domain, "clodei.com");
      assert.equal(info?.metadata["version"], "7");
      const [retry] = conflict.findDetails(RetryInfoSchema);
      assert.deepEqual([retry?.retryDelay?.seconds, retry?.retryDelay?.nanos], [1n, 500_000_000]);

      const internal = await rejection(client.getInstance({ instanceId: "ins_01h455vb4pex5vsknk084sn02q" }));
      assert.equal(internal.code, Code.Internal);
      assert.ok(!JSON.stringify(internal).includes(secret) && !internal.message.includes(secret));
      const requestId = internal.findDetails(ErrorInfoSchema)[0]?.metadata["requestId"] ?? "";
      assert.ok(
        listener.lines.some((line) => line.includes(requestId) && line.includes(secret)),
        "the log has its text",
      );
    }
  });

  test("tells an error that quotes a huge request as it tells any other", async () => {
    await using listener = await startTestListener(showingRoutes);
    const key = "é".repeat(500_000);
    for (const kind of transportKinds) {
      const client = createClient(InstanceService, listener.transport(kind, adminCredential));
      const invalid = await rejection(client.createInstance({ spec: { image: "busybox", env: { [key]: "1" } } }));
      assert.deepEqual([invalid.code, reasonOf(invalid)], [Code.InvalidArgument, "INVALID_ARGUMENT"], kind);
      const [violation] = invalid.findDetails(BadRequestSchema)[0]?.fieldViolations ?? [];
      assert.match(violation?.field ?? "", /^spec\.env\["é+…$/u, kind);
      assert.match(invalid.rawMessage, /^spec\.env\["é+…$/u, kind);
    }
  });

  test("gives an error its reason and its bound also where the deadline passes before the body comes", async () => {
    await using listener = await startTestListener(showingRoutes);
    const body = JSON.stringify({ ["k".repeat(200_000)]: 1 });
    const frame = Buffer.concat([Buffer.alloc(5), Buffer.from(body)]);
    frame.writeUInt32BE(body.length, 1);
    const client = connectHttp2(listener.url, { ca: listener.caPem });
    await once(client, "connect");
    const stream = client.request({
      ":method": "POST",
      ":path": "/clodei.v1.InstanceService/GetInstance",
      "content-type": "application/grpc+json",
      "grpc-timeout": "100m",
      te: "trailers",
      authorization: adminCredential,
    });
    await sleep(300);
    stream.end(frame);
    // Alone, or behind headers that came before.
    const told = new Headers();
    const take = (headers: object): void => {
      for (const [name, value] of Object.entries(headers)) if (!name.startsWith(":")) told.set(name, String(value));
    };
    stream.once("response", take).once("trailers", take).resume();
    await once(stream, "close");
    client.close();
    const error = findTrailerError(told);
    assert.ok(error !== undefined);
    assert.equal(reasonOf(error), "INVALID_ARGUMENT");
    assert.ok(error.rawMessage.length > 500 && error.rawMessage.length <= 1_300, `${error.rawMessage.length}`);
    await listener.untilLogged(/GetInstance","code":"invalid_argument"/);
  });

  test("says of a stream that its deadline passed, though its handler simply ends", async () => {
    await using listener = await startTestListener(showingRoutes);
    // Only in the header: a client that knows of it would give up by itself.
    const deadlines = { grpc: { "grpc-timeout": "1500m" }, "connect-json": { "connect-timeout-ms": "1500" } } as const;
    for (const kind of ["grpc", "connect-json"] as const) {
      const client = createClient(InstanceService, listener.transport(kind, adminCredential));
      const cursors: string[] = [];
      const error = await rejection(
        (async () => {
          for await (const { cursor } of client.watchInstances({}, { headers: deadlines[kind] })) cursors.push(cursor);
        })(),
      );
      assert.deepEqual([error.code, reasonOf(error)], [Code.DeadlineExceeded, "DEADLINE_EXCEEDED"], kind);
      assert.deepEqual(cursors, ["first"], kind);
    }
    await listener.untilLogged(/WatchInstances","code":"deadline_exceeded"/, 2);
    assert.equal(listener.lines.filter((line) => line.includes("WatchInstances")).length, 2, "each is logged once");
  });

  test("refuses a message of more than 4 MiB, also one that unpacks to it", async () => {
    await using listener = await startTestListener(showingRoutes);
    const client = createClient(InstanceService, listener.transport("grpc", adminCredential));
    const large = { spec: { image: "busybox", env: { A: "x".repeat(4 * 1024 * 1024) } } };
    const refused = await rejection(client.createInstance(large));
    assert.deepEqual([refused.code, reasonOf(refused)], [Code.InvalidArgument, "INVALID_ARGUMENT"]);
    assert.match(refused.rawMessage, /larger than 4194304 bytes/);
    const body = gzipSync(Buffer.from(JSON.stringify(large)));
    assert.ok(body.length < 100_000);
    const answer = await new Promise<string>((resolve, reject) => {
      const session = connectHttp2(listener.url, { ca: listener.caPem });
      session.once("error", reject);
      const stream = session.request({
        [constants.HTTP2_HEADER_METHOD]: "POST",
        [constants.HTTP2_HEADER_PATH]: "/clodei.v1.InstanceService/CreateInstance",
        "content-type": "application/json",
        "content-encoding": "gzip",
        authorization: adminCredential,
      });
      let text = "";
      stream.setEncoding("utf8");
      stream.on("data", (part: string) => (text += part));
      stream.once("end", () => {
        session.destroy();
        resolve(text);
      });
      stream.end(body);
    });
    assert.match(answer, /"invalid_argument".*larger than 4194304 bytes/);
  });

  test("gives a reason also to errors that come before the handler and its interceptors", async () => {
    await using listener = await startTestListener(showingRoutes);
    const whoAmI = "/clodei.v1.IdentityService/WhoAmI";
    const json = { "content-type": "application/json", authorization: adminCredential };
    const answers = {
      INVALID_ARGUMENT: await sendPlain(listener, { path: whoAmI, headers: json, body: "{" }),
      UNIMPLEMENTED: await sendPlain(listener, {
        path: whoAmI,
        headers: { ...json, "content-encoding": "br" },
        body: "{}",
      }),
      "UNIMPLEMENTED of a path": await sendPlain(listener, { path: "/no.Such/Method", headers: json, body: "{}" }),
    };
    for (const [name, { body, headers }] of Object.entries(answers)) {
      const told = JSON.parse(body) as { details: { type: string; debug: { reason: string; metadata: object } }[] };
      const { reason, metadata } = told.details[0]?.debug ?? {};
      assert.equal(reason, name.split(" ")[0], body);
      assert.deepEqual(metadata, { requestId: headers["clodei-request-id"] });
    }
    const large = { spec: { image: "busybox", env: { A: "x".repeat(4 * 1024 * 1024) } } };
    for (const kind of transportKinds) {
      const error = await rejection(
        createClient(InstanceService, listener.transport(kind, adminCredential)).createInstance(large),
      );
      assert.deepEqual([error.code, reasonOf(error)], [Code.InvalidArgument, "INVALID_ARGUMENT"], kind);
    }
    const unknown = await rejection(
      createClient(NodeService, listener.transport("grpc", adminCredential)).listNodes({}),
    );
    assert.deepEqual([unknown.code, reasonOf(unknown)], [Code.Unimplemented, "UNIMPLEMENTED"]);
    await listener.untilLogged(/CreateInstance","code":"invalid_argument"/, transportKinds.length);
    await listener.untilLogged(/"method":"unknown","code":"unimplemented".*"http":"2.0"/);
    assert.ok(!listener.lines.some((line) => /"code":"http_[45]/.test(line)));
  });

  test("tells a client that sends no type of ours, or not by POST, what to send", async () => {
    await using listener = await startTestListener(showingRoutes);
    const [whoAmI, watch] = ["/clodei.v1.IdentityService/WhoAmI", "/clodei.v1.InstanceService/WatchInstances"];
    const form = "application/x-www-form-urlencoded";
    const cases = [
      [415, /Content-Type: application\/json/, { path: whoAmI, headers: {}, body: "" }],
      [415, /Content-Type: application\/json/, { path: whoAmI, headers: { "content-type": form }, body: "{}" }],
      [415, /must be a POST/, { method: "GET", path: "/clodei.v1.InstanceService/ListInstances" }],
      [415, /this method streams/, { path: watch, headers: { "content-type": "application/json" }, body: "{}" }],
      [
        405,
        /^GET cannot call this method: POST can$/,
        { method: "GET", path: "/clodei.v1.InstanceService/StopInstance" },
      ],
      [405, /^PUT cannot call this method/, { method: "PUT", path: watch, headers: {}, body: "{}" }],
    ] as const;
    for (const [status, words, request] of cases) {
      const answer = await sendPlain(listener, request);
      assert.equal(answer.status, status, answer.body);
      assert.equal(answer.headers["content-type"], "application/json");
      const told = JSON.parse(answer.body) as { code: string; message: string; details: { debug: object }[] };
      assert.equal(told.code, "invalid_argument");
      assert.match(told.message, words);
      const metadata = { requestId: answer.headers["clodei-request-id"] };
      assert.deepEqual(told.details[0]?.debug, { reason: "INVALID_ARGUMENT", domain: "clodei.com", metadata });
      if (status === 405) assert.match(String(answer.headers["allow"]), /POST/);
    }
  });

  test("refuses a field and an enum value that the schema does not know, in JSON, by name", async () => {
    await using listener = await startTestListener(showingRoutes);
    const headers = { "content-type": "application/json", authorization: adminCredential };
    const path = "/clodei.v1.InstanceService/CreateInstance";
    const cases = [
      ["countries", "spec.location.countries", { image: "busybox", location: { countries: ["FR"] } }],
      ["RESTART_POLICY_SOMETIMES", "spec.restart_policy", { restartPolicy: "RESTART_POLICY_SOMETIMES" }],
      ["expected string", "spec.image", { image: 7 }],
    ] as const;
    for (const [name, field, spec] of cases) {
      const { status, body } = await sendPlain(listener, { path, headers, body: JSON.stringify({ spec }) });
      assert.equal(status, 400, body);
      assert.match(body, new RegExp(name));
      const { details } = JSON.parse(body) as { details: { debug: { fieldViolations?: { field: string }[] } }[] };
      assert.deepEqual(
        details.flatMap(({ debug }) => debug.fieldViolations ?? []).map((told) => told.field),
        [field],
      );
    }
  });
});
