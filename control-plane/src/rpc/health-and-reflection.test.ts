import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { Code, createClient } from "@connectrpc/connect";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { Health, HealthCheckResponse_ServingStatus as Serving } from "@clodei/proto/gen/grpc/health/v1/health";
import { ServerReflection } from "@clodei/proto/gen/grpc/reflection/v1/reflection";
import { ServerReflection as AlphaReflection } from "@clodei/proto/gen/grpc/reflection/v1alpha/reflection";
import { HealthState, healthHandlers } from "./health.ts";
import { createReflection } from "./reflection.ts";
import { rejection, startTestListener, type TestListener } from "./test-listener.ts";

describe("health and reflection", () => {
  const services = [InstanceService, IdentityService, Health, ServerReflection, AlphaReflection];
  const start = (state: HealthState): Promise<TestListener> => {
    const reflection = createReflection(services);
    return startTestListener(
      (router) => {
        router.service(Health, healthHandlers(state, services));
        router.service(ServerReflection, reflection.v1);
        router.service(AlphaReflection, reflection.v1alpha);
        router.service(InstanceService, {});
        router.service(IdentityService, {});
      },
      // The database is lost: nobody can be authenticated, and both must answer all the same.
      { authenticate: () => Promise.reject(new Error("no database")) },
    );
  };

  test("each service serves or not, and all of them flip together", async () => {
    const state = new HealthState();
    await using listener = await start(state);
    const client = createClient(Health, listener.transport("grpc", "Bearer whoever"));
    const all = async (): Promise<Set<Serving>> => {
      const { statuses } = await client.list({});
      assert.deepEqual(Object.keys(statuses).toSorted(), ["", ...services.map(({ typeName }) => typeName)].toSorted());
      const checked = await Promise.all(Object.keys(statuses).map((service) => client.check({ service })));
      return new Set([...Object.values(statuses), ...checked].map(({ status }) => status));
    };
    assert.deepEqual(await all(), new Set([Serving.NOT_SERVING]));
    state.set("starting", false);
    assert.deepEqual(await all(), new Set([Serving.SERVING]));
    assert.equal((await rejection(client.check({ service: "no.Such" }))).code, Code.NotFound);

    const seen: Serving[] = [];
    const unknown: Serving[] = [];
    const stop = new AbortController();
    const watch = (service: string, into: Serving[]): Promise<unknown> =>
      (async () => {
        for await (const { status } of client.watch({ service }, { signal: stop.signal })) into.push(status);
      })().catch(() => undefined);
    const watches = [watch(InstanceService.typeName, seen), watch("no.Such", unknown)];
    const until = async (expected: Serving[]): Promise<void> => {
      for (let n = 0; n < 200 && seen.length < expected.length; n += 1) await sleep(10);
      assert.deepEqual(seen, expected);
    };
    await until([Serving.SERVING]);
    state.set("database", true);
    await until([Serving.SERVING, Serving.NOT_SERVING]);
    assert.deepEqual(await all(), new Set([Serving.NOT_SERVING]));
    state.set("draining", true);
    state.set("database", false);
    assert.deepEqual(await all(), new Set([Serving.NOT_SERVING]), "two reasons need two ends");
    state.set("draining", false);
    await until([Serving.SERVING, Serving.NOT_SERVING, Serving.SERVING]);
    assert.deepEqual(unknown, [Serving.SERVICE_UNKNOWN]);
    stop.abort();
    await Promise.all(watches);
  });

  test("a watch of health sees the drain before it ends", async () => {
    const state = new HealthState();
    state.set("starting", false);
    await using listener = await start(state);
    const client = createClient(Health, listener.transport("grpc"));
    const seen: Serving[] = [];
    const ended = rejection(
      (async () => {
        for await (const { status } of client.watch({ service: "" })) seen.push(status);
      })(),
    );
    for (let n = 0; n < 200 && seen.length === 0; n += 1) await sleep(10);
    state.set("draining", true);
    await listener.listener.close(5_000);
    assert.equal((await ended).code, Code.Unavailable);
    assert.deepEqual(seen, [Serving.SERVING, Serving.NOT_SERVING]);
  });

  test("buf lists and describes the services over every protocol, and knows messages by both versions", async () => {
    await using listener = await start(new HealthState());
    const folder = await mkdtemp(join(tmpdir(), "clodei-buf-"));
    try {
      const caFile = join(folder, "ca.pem");
      await writeFile(caFile, listener.caPem);
      const buf = async (...args: string[]): Promise<string> => {
        const { stdout } = await promisify(execFile)(bufPath(), ["curl", "--cacert", caFile, ...args], {
          env: { HOME: folder, PATH: "/usr/bin:/bin" },
        });
        return stdout;
      };
      for (const version of ["grpc-v1", "grpc-v1alpha"]) {
        const list = await buf("--reflect-protocol", version, "--list-services", listener.url);
        assert.deepEqual(
          list.trim().split("\n").toSorted(),
          services.map(({ typeName }) => typeName).toSorted(),
          version,
        );
      }
      const methods = await buf("--list-methods", listener.url);
      assert.match(methods, /clodei\.v1\.InstanceService\/CreateInstance/);
      for (const protocol of ["connect", "grpc", "grpcweb"]) {
        const checked = await buf(
          "--protocol",
          protocol,
          "-d",
          '{"service":""}',
          `${listener.url}/grpc.health.v1.Health/Check`,
        );
        assert.match(checked, /NOT_SERVING/, protocol);
      }
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });

  test("reflection answers by file, symbol, part of a symbol and extension, and says what it does not know", async () => {
    await using listener = await start(new HealthState());
    for (const service of [ServerReflection, AlphaReflection] as const) {
      const client = createClient(service as typeof ServerReflection, listener.transport("grpc"));
      const ask = async (messageRequest: {
        case: "fileByFilename" | "fileContainingSymbol" | "allExtensionNumbersOfType";
        value: string;
      }) => {
        async function* one() {
          yield { messageRequest };
        }
        for await (const { messageResponse } of client.serverReflectionInfo(one())) return messageResponse;
        throw new Error("no answer");
      };
      const files = async (request: Parameters<typeof ask>[0]): Promise<number> => {
        const answer = await ask(request);
        return answer.case === "fileDescriptorResponse" ? answer.value.fileDescriptorProto.length : 0;
      };
      assert.ok((await files({ case: "fileByFilename", value: "clodei/v1/instance_service.proto" })) > 5);
      assert.ok((await files({ case: "fileByFilename", value: "google/protobuf/timestamp.proto" })) === 1);
      for (const symbol of [
        "clodei.v1.InstanceService",
        "clodei.v1.InstanceService.CreateInstance",
        "clodei.v1.InstanceSpec",
        "clodei.v1.InstanceSpec.image",
        "clodei.v1.InstanceState",
        "clodei.options.v1.authorization",
        // No method names these; who gets an error wants to read it.
        "google.rpc.Status",
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
        "clodei.v1.ErrorReason",
      ]) {
        assert.ok((await files({ case: "fileContainingSymbol", value: symbol })) >= 1, symbol);
      }
      for (const symbol of ["clodei.v1.Nope", "clodei.v1.InstanceSpec.nope", "", "."]) {
        assert.equal((await ask({ case: "fileContainingSymbol", value: symbol })).case, "errorResponse", symbol);
      }
      const numbers = await ask({ case: "allExtensionNumbersOfType", value: "google.protobuf.MethodOptions" });
      assert.ok(numbers.case === "allExtensionNumbersResponse" && numbers.value.extensionNumber.includes(50_901));
    }
  });
});

/** The program itself: its wrapper needs a Node in the path. */
function bufPath(): string {
  const name = `@bufbuild/buf-${process.platform}-${process.arch}`;
  return new URL(import.meta.resolve(`${name}/bin/buf`)).pathname;
}
