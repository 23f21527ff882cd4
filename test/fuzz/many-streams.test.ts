// One caller that opens all the streams it can, reads none of them, or opens and resets them as fast as it can. Its
// limits hold, memory stays bounded, and the others are answered meanwhile.
import assert from "node:assert/strict";
import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  connect,
  constants,
  type IncomingHttpHeaders,
} from "node:http2";
import { after, before, describe, it } from "node:test";
import { create, toBinary } from "@bufbuild/protobuf";
import { InstanceService, WatchInstancesRequestSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { Health } from "@clodei/proto/gen/grpc/health/v1/health";
import type { ClodeiClient } from "@clodei/sdk";
import { eventually } from "../harness/eventually.ts";
import { type FuzzCaller, FuzzedControlPlane } from "./fuzzed-control-plane.ts";
import { memoryComesBack, memoryInUse } from "./memory.ts";
import { framed } from "./raw-calls.ts";

/** The listener's limit on one connection, and the organization's on watches. */
const streamsPerConnection = 100;
const maxWatches = 256;
const connections = 20;
/** Enough for more watches than there may be. */
const watchingConnections = 4;
const patienceMs = 90_000;
/** Both ends of 2,000 streams are in this process: some 40 KiB for each. */
const allowedBytes = 160 * 2 ** 20;

const watchRequest = framed(toBinary(WatchInstancesRequestSchema, create(WatchInstancesRequestSchema)));
const emptyRequest = framed(new Uint8Array());

describe("one caller with thousands of streams", { timeout: 300_000 }, () => {
  let controlPlane: FuzzedControlPlane;
  let greedy: FuzzCaller;
  let honest: ClodeiClient;
  let standing: number;

  before(async () => {
    controlPlane = await FuzzedControlPlane.start();
    greedy = await controlPlane.createOrganization("greedy");
    honest = controlPlane.connect(await controlPlane.createOrganization("honest"));
    await honest.identity.whoAmI();
    standing = await controlPlane.metric("clodei_public_connections");
  });
  after(() => controlPlane[Symbol.asyncDispose]());

  /** Connections of the caller. They are gone with the test. */
  function connectAll(
    options: { readonly initialWindowSize?: number } = {},
  ): Disposable & { readonly sessions: ClientHttp2Session[] } {
    const { publicUrl, caPem } = controlPlane.running;
    const sessions = Array.from({ length: connections }, () => {
      const session = connect(publicUrl, { ca: caPem, settings: options, maxSessionMemory: 1_000 });
      session.on("error", () => undefined);
      return session;
    });
    return { sessions, [Symbol.dispose]: () => sessions.forEach((session) => session.destroy()) };
  }

  function open(session: ClientHttp2Session, path: string, body: Uint8Array): ClientHttp2Stream {
    const stream = session.request({
      ":method": "POST",
      ":path": path,
      "content-type": "application/grpc",
      te: "trailers",
      authorization: `Bearer ${greedy.key}`,
    });
    stream.on("error", () => undefined);
    stream.end(body);
    return stream;
  }

  /** A customer beside it does all that it did before. */
  async function othersAreServed(): Promise<void> {
    const instance = await honest.instances.run({ image: "busybox", cpuMillis: 50, memoryMib: 16 });
    for await (const event of honest.instances.watch()) if (event.type === "bookmark") break;
    await instance.delete();
  }

  async function isOver(before: number): Promise<void> {
    await controlPlane.settled(standing);
    await memoryComesBack(before);
    assert.deepEqual(controlPlane.failures, []);
  }

  it("watches as often as it may; every other watch is refused in words, and its places come back", async () => {
    const before = memoryInUse();
    const path = `/${InstanceService.typeName}/WatchInstances`;
    {
      using all = connectAll();
      const outcomes = new Map<string, number>();
      for (const session of all.sessions.slice(0, watchingConnections)) {
        // One connection after the other: all at once they would wait for the database, and some be told to come again.
        const streams = Array.from({ length: streamsPerConnection }, () => open(session, path, watchRequest));
        for (const outcome of await Promise.all(streams.map(outcomeOf)))
          outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
      }
      const { watches = 0, refused = 0, unavailable = 0 } = Object.fromEntries(outcomes);
      assert.equal(watches, maxWatches, JSON.stringify([...outcomes]));
      assert.equal(
        watches + refused + unavailable,
        watchingConnections * streamsPerConnection,
        JSON.stringify([...outcomes]),
      );
      assert.equal(await controlPlane.metric("clodei_rpc_open_streams"), maxWatches);
      await othersAreServed();
    }
    await isOver(before);
    using again = connectAll();
    const stream = open(again.sessions[0] ?? assert.fail(), path, watchRequest);
    await new Promise<void>((resolve) => stream.once("data", () => resolve()));
  });

  it("stands with 2,000 streams that it does not read, and costs some kilobytes for each", async () => {
    const before = memoryInUse();
    {
      using all = connectAll({ initialWindowSize: 0 });
      for (const session of all.sessions) {
        for (let index = 0; index < streamsPerConnection; index += 1)
          open(session, `/${Health.typeName}/Watch`, emptyRequest);
      }
      const asked = connections * streamsPerConnection;
      await eventually(patienceMs, async () =>
        assert.equal(await controlPlane.metric("clodei_rpc_open_streams"), asked),
      );
      // One more than a connection may have waits on the caller's own side.
      open(all.sessions[0] ?? assert.fail(), `/${Health.typeName}/Watch`, emptyRequest);
      await othersAreServed();
      assert.equal(await controlPlane.metric("clodei_rpc_open_streams"), asked);
      const grown = memoryInUse() - before;
      assert.ok(grown < allowedBytes, `${Math.round(grown / 2 ** 20)} MiB for ${asked} streams`);
    }
    await isOver(before);
  });

  it("opens and resets streams without a pause", async () => {
    const before = memoryInUse();
    {
      using all = connectAll();
      for (let round = 0; round < 20; round += 1) {
        for (const session of all.sessions) {
          if (session.destroyed || session.closed) continue;
          for (let index = 0; index < 4; index += 1) {
            open(session, `/${InstanceService.typeName}/WatchInstances`, watchRequest).close(constants.NGHTTP2_CANCEL);
          }
        }
        await new Promise((resolve) => setImmediate(resolve));
      }
      await othersAreServed();
    }
    await isOver(before);
  });
});

/** What becomes of a watch: it says something, or its status. */
function outcomeOf(stream: ClientHttp2Stream): Promise<string> {
  const { promise, resolve } = Promise.withResolvers<string>();
  const told = ({ "grpc-status": status }: IncomingHttpHeaders): void => {
    if (status !== undefined)
      resolve(status === "8" ? "refused" : status === "14" ? "unavailable" : `status ${String(status)}`);
  };
  stream.on("data", () => resolve("watches"));
  stream.on("response", told);
  stream.on("trailers", told);
  stream.on("close", () => resolve("closed"));
  return promise;
}
