import assert from "node:assert/strict";
import { test } from "node:test";
import type { CreateInstanceRequest } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { newId } from "@clodei/proto/ids";
import { type ClodeiClient, createClient } from "./client.ts";
import { ClodeiError } from "./errors.ts";
import { instances, startServerForClientTests } from "./server-for-client-tests.ts";

const id = newId("ins");

/** What JavaScript, or `any`, can write. */
function untyped(value: unknown): never {
  return value as never;
}

/** The error of a call that must be refused. */
async function refusal(call: () => Promise<unknown>): Promise<ClodeiError> {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof ClodeiError, String(error));
    assert.deepEqual([error.code, error.reason], ["invalid_argument", "INVALID_ARGUMENT"], error.message);
    return error;
  }
  return assert.fail("it was not refused");
}

/** Each field with what was said of it. */
function violations(error: ClodeiError): [string, string][] {
  return error.fieldViolations.map(({ field, message }) => [field, message]);
}

/** A server that would take what the tests send, and its client. */
async function startServer() {
  const server = await startServerForClientTests((router) => {
    instances({ getInstance: () => ({ instance: { id } }), createInstance: () => ({ instance: { id } }) })(router);
    router.service(NodeService, {});
  });
  return { server, client: server.client() };
}

test("a request that no message can hold is refused at once with its field, and never sent", async () => {
  const { server, client } = await startServer();
  await using _server = server;
  const handle = await client.instances.get(id);
  const uint32 = "must be a whole number from 0 to 4294967295";
  const states = "must be one of PENDING, SCHEDULED, PULLING, CREATING, RUNNING, STOPPING, STOPPED, FAILED, DELETED";
  const { instances: raw } = client.services;
  const cases: [() => Promise<unknown>, string, string][] = [
    [() => client.instances.list({ pageSize: -1 }).toArray(), "page_size", `${uint32}, not -1`],
    [() => handle.events({ pageSize: 0.5 }).toArray(), "page_size", `${uint32}, not 0.5`],
    [() => handle.logs({ tailLines: -1 }).text(), "tail_lines", `${uint32}, not -1`],
    [() => handle.logs({ tailLines: 1.5 }).text(), "tail_lines", `${uint32}, not 1.5`],
    [() => handle.logs({ attempt: -1 }).text(), "attempt", `${uint32}, not -1`],
    [() => handle.logs({ since: new Date("no") }).text(), "since_time", "must be a valid Date, not Invalid Date"],
    [() => client.instances.list({ states: untyped(["NOPE"]) }).toArray(), "filter.states[0]", `${states}, not "NOPE"`],
    [() => client.instances.watch({ states: untyped(["NOPE"]) }).next(), "filter.states[0]", `${states}, not "NOPE"`],
    [
      () => client.instances.watch({ states: untyped("RUNNING") }).next(),
      "filter.states",
      "must be a list, not a string",
    ],
    [
      () => client.instances.list({ labels: untyped("a=b") }).toArray(),
      "filter.labels",
      "must be an object, not a string",
    ],
    [() => client.instances.get(untyped(5)), "instance_id", "must be a string, not 5"],
    [() => handle.stop({ idempotencyKey: untyped(5) }), "idempotency_key", "must be a string, not 5"],
    [() => raw.listInstances({ filter: { states: [untyped("NOPE")] } }), "filter.states[0]", `${states}, not "NOPE"`],
    [() => client.nodes.list({ location: untyped("ES") }).toArray(), "location", "must be an object, not a string"],
    [
      () => client.nodes.list({ states: untyped(["NOPE"]) }).toArray(),
      "states[0]",
      'must be one of ENROLLED, READY, UNREACHABLE, QUARANTINED, REVOKED, not "NOPE"',
    ],
    [
      () => client.catalog.offers({ location: untyped({ contry: "ES" }) }).toArray(),
      "location.contry",
      "is not known; allowed are country, region, datacenter",
    ],
    [() => enrollmentToken(client, Number.NaN), "lifetime", "must be a number of seconds, not NaN"],
  ];
  for (const [call, field, message] of cases) assert.deepEqual(violations(await refusal(call)), [[field, message]]);
  assert.deepEqual(
    server.requests.map(({ method }) => method),
    ["GetInstance"],
  );
});

test("an option that does not exist is refused by its name, in every object of options", async () => {
  const { server, client } = await startServer();
  await using _server = server;
  const handle = await client.instances.get(id);
  const { endpoint, ca } = server;
  const odd = untyped({ stat: ["RUNNING"] });
  const token = { location: { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 } };
  const call = "signal, timeoutMs";
  const mutation = `${call}, idempotencyKey`;
  const list = `${call}, pageSize, pageToken`;
  const filter = "states, labels, gpuModel, location";
  const cases: [() => unknown, string][] = [
    [() => client.instances.list(odd).toArray(), `${list}, ${filter}, showDeleted`],
    [() => client.instances.list(odd).pages().next(), `${list}, ${filter}, showDeleted`],
    [() => client.instances.watch(odd).next(), `signal, cursor, ${filter}`],
    [() => client.instances.run({ image: "busybox" }, odd), mutation],
    [() => client.instances.get(id, odd), call],
    [() => handle.waitUntilRunning(odd), call],
    [() => handle.waitUntilStopped(odd), call],
    [() => handle.waitUntilDeleted(odd), call],
    [() => handle.logs(odd).text(), "signal, follow, tailLines, since, attempt"],
    [() => handle.events(odd).toArray(), list],
    [() => handle.refresh(odd), call],
    [() => handle.stop(odd), mutation],
    [() => handle.start(odd), mutation],
    [() => handle.restart(odd), mutation],
    [() => handle.delete(odd), mutation],
    [() => client.catalog.offers(odd).toArray(), `${list}, gpuModel, location`],
    [() => client.catalog.locations(odd).toArray(), list],
    [() => client.catalog.imagePolicies(odd).toArray(), list],
    [() => client.identity.whoAmI(odd), call],
    [() => client.nodes.createEnrollmentToken(token, odd), mutation],
    [() => client.nodes.listEnrollmentTokens(odd).toArray(), list],
    [() => client.nodes.revokeEnrollmentToken(newId("ent"), odd), mutation],
    [() => client.nodes.list(odd).toArray(), `${list}, states, location`],
    [() => client.nodes.get(newId("nod"), odd), call],
    [() => client.nodes.watch(odd).next(), "signal, cursor"],
    [() => client.nodes.cordon(newId("nod"), odd), mutation],
    [() => client.nodes.uncordon(newId("nod"), odd), mutation],
    [() => client.nodes.revoke(newId("nod"), odd), `${mutation}, comment`],
    [() => client.nodes.reenroll(newId("nod"), odd), mutation],
    [
      () => createClient({ endpoint, ca, apiKey: "", ...(odd as object) }),
      "endpoint, apiKey, token, organization, ca, connectTimeoutMs, timeoutMs, retry, giveUpAfterMs",
    ],
  ];
  for (const [refused, allowed] of cases) {
    const message = `is not known; allowed are ${allowed}`;
    assert.deepEqual(violations(await refusal(async () => await refused())), [["stat", message]], String(refused));
  }
  const nested: [() => unknown, string][] = [
    [() => createClient({ endpoint, apiKey: "", retry: odd }), "retry.stat"],
    [() => client.nodes.createEnrollmentToken({ ...token, ...(odd as object) }), "spec.stat"],
    [() => client.instances.list(untyped("RUNNING")).toArray(), "options"],
  ];
  for (const [refused, field] of nested) {
    assert.equal((await refusal(async () => await refused())).fieldViolations[0]?.field, field);
  }
  assert.deepEqual(
    server.requests.map(({ method }) => method),
    ["GetInstance"],
  );
});

async function enrollmentToken(client: ClodeiClient, lifetimeSeconds: number): Promise<unknown> {
  const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
  return await client.nodes.createEnrollmentToken({ location, lifetimeSeconds });
}

test("a specification that means nothing is refused with its fields, and not changed into one that does", async () => {
  const { server, client } = await startServer();
  await using _server = server;
  const known =
    "image, command, args, env, gpu, cpuMillis, memoryMib, location, labels, restartPolicy, pullPolicy, " +
    "placementTimeoutSeconds, maxRunTimeSeconds, stopGraceSeconds";
  const cases: [object, string, string][] = [
    [{ restartPolicy: "always" }, "spec.restart_policy", 'must be one of NEVER, ON_FAILURE, ALWAYS, not "always"'],
    [{ pullPolicy: "toString" }, "spec.pull_policy", 'must be one of IF_NOT_PRESENT, ALWAYS, NEVER, not "toString"'],
    [{ privileged: true }, "spec.privileged", `is not known; allowed are ${known}`],
    [{ memory: 1024 }, "spec.memory", `is not known; allowed are ${known}`],
    [{ args: "echo hi" }, "spec.args", "must be a list, not a string"],
    [{ command: ["echo", 1] }, "spec.command[1]", "must be a string, not 1"],
    [{ env: { A: 5 } }, 'spec.env["A"]', "must be a string, not 5"],
    [{ env: "A=5" }, "spec.env", "must be an object, not a string"],
    [{ env: new Map([["A", "5"]]) }, "spec.env", "must be an object, not a Map"],
    [{ image: 5 }, "spec.image", "must be a string, not 5"],
    [{ image: "\ud800" }, "spec.image", "must be a string, not half a surrogate pair"],
    [{ image: { name: "busybox" } }, "spec.image", "must be a string, not an object"],
    [{ gpu: "H100-SXM" }, "spec.gpu", "must be an object, not a string"],
    [{ gpu: { modle: "H100-SXM" } }, "spec.gpu.modle", "is not known; allowed are model, count, minMemoryMib"],
    [{ location: { contry: "ES" } }, "spec.location.contry", "is not known; allowed are country, region, datacenter"],
    [{ maxRunTimeSeconds: "60" }, "spec.max_run_time", "must be a number of seconds, not a string"],
    [{ stopGraceSeconds: Infinity }, "spec.stop_grace", "must be a number of seconds, not Infinity"],
  ];
  for (const [part, field, message] of cases) {
    const error = await refusal(async () => await client.instances.run(untyped({ image: "busybox", ...part })));
    assert.deepEqual(violations(error), [[field, message]]);
  }
  const none = await refusal(async () => await client.instances.run(untyped(undefined)));
  assert.deepEqual(violations(none), [["spec", "must be an object, not undefined"]]);
  const many = await refusal(async () => await client.instances.run(untyped({ image: 5, memory: 1, cpuMillis: "1" })));
  assert.equal(many.fieldViolations.length, 3);
  const numbers = Array.from({ length: 1000 }, (_, index) => index);
  const lots = await refusal(async () => await client.instances.run(untyped({ image: "busybox", args: numbers })));
  assert.equal(lots.fieldViolations.length, 32);
  assert.equal(server.requests.length, 0);
});

test("what is undefined or null counts as absent", async () => {
  const { server, client } = await startServer();
  await using _server = server;
  const absent = { privileged: undefined, gpu: null, args: null, location: undefined, maxRunTimeSeconds: null };
  await client.instances.run(untyped({ image: "busybox", ...absent }));
  const spec = (server.requests[0]?.message as CreateInstanceRequest | undefined)?.spec;
  assert.deepEqual([spec?.image, spec?.gpu, spec?.args, spec?.maxRunTime], ["busybox", undefined, [], undefined]);
});
