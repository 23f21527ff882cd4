import assert from "node:assert/strict";
import { test } from "node:test";
import { create, type DescMessage, fromJson, getOption, type JsonValue, toJson } from "@bufbuild/protobuf";
import { field as fieldRules, FieldRulesSchema } from "@bufbuild/protovalidate/gen/buf/validate/validate_pb.js";
import { NodeLinkService } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ReplicaService } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import {
  CreateInstanceRequestSchema,
  GetInstanceRequestSchema,
  ListInstancesRequestSchema,
  StreamLogsRequestSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { CreateEnrollmentTokenRequestSchema } from "@clodei/proto/gen/clodei/v1/node_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import { publicServices } from "../start.ts";
import { explainJsonError } from "./json-errors.ts";
import { patternWords } from "./pattern-words.ts";
import { RequestValidator } from "./validation.ts";

const validator = new RequestValidator();

function violationsOf(check: () => void): readonly { field: string; rule: string; message: string }[] {
  try {
    check();
  } catch (error) {
    assert.ok(error instanceof DomainError);
    return error.fields;
  }
  return [];
}

test("the rules of every public request compile", () => {
  validator.warmUp(publicServices.flatMap(({ methods }) => methods));
});

test("a violation names the field, the rule, and what is allowed", () => {
  const request = create(CreateInstanceRequestSchema, {
    spec: { image: "busybox", gpu: { model: "H100-SXM", count: 17 }, env: { "1A": "x" }, restartPolicy: 99 as never },
    idempotencyKey: "k".repeat(65),
  });
  const fields = violationsOf(() => validator.check(CreateInstanceRequestSchema, request));
  const byField = new Map(fields.map((violation) => [violation.field, violation]));
  assert.equal(byField.get("spec.gpu.count")?.rule, "uint32.lte");
  assert.match(byField.get("spec.gpu.count")?.message ?? "", /16/);
  assert.match(
    byField.get('spec.env["1A"]')?.message ?? "",
    /must be the name of a variable: .*, such as "MODEL_PATH"$/,
  );
  assert.match(byField.get("idempotency_key")?.message ?? "", /64/);
  assert.match(
    byField.get("spec.restart_policy")?.message ?? "",
    /^must be one of RESTART_POLICY_NEVER, RESTART_POLICY_ON_FAILURE/,
  );
});

test("a required field that is absent, and an id of another kind, are named", () => {
  const absent = violationsOf(() => validator.check(CreateInstanceRequestSchema, create(CreateInstanceRequestSchema)));
  assert.deepEqual(
    absent.map(({ field, rule }) => [field, rule]),
    [["spec", "required"]],
  );
  const wrong = create(GetInstanceRequestSchema, { instanceId: "nod_01h455vb4pex5vsknk084sn02q" });
  const [violation] = violationsOf(() => validator.check(GetInstanceRequestSchema, wrong));
  assert.equal(violation?.field, "instance_id");
  assert.match(violation.message, /the id of an instance, ins_ and 26 characters, such as "ins_/);
});

test("what is missing or not named is told once, in words", () => {
  const request = create(CreateInstanceRequestSchema, { spec: { ports: [{ containerPort: 80 }] } });
  const fields = violationsOf(() => validator.check(CreateInstanceRequestSchema, request));
  assert.deepEqual(
    fields.map(({ field, message }) => [field, message]),
    [
      ["spec.image", "must not be empty"],
      ["spec.ports[0].protocol", "must be one of PORT_PROTOCOL_TCP, PORT_PROTOCOL_UDP"],
    ],
  );
});

test("every pattern of the schemas has words and an example that matches it", () => {
  const patterns = new Set<string>();
  const collect = (rules: unknown): void => {
    if (typeof rules !== "object" || rules === null) return;
    if ("pattern" in rules && typeof rules.pattern === "string" && rules.pattern !== "") patterns.add(rules.pattern);
    Object.values(rules).forEach(collect);
  };
  for (const service of [...publicServices, NodeLinkService, ReplicaService]) {
    for (const { input } of service.methods) {
      for (const message of nestedMessages(input)) {
        for (const field of message.fields) collect(toJson(FieldRulesSchema, getOption(field, fieldRules)));
      }
    }
  }
  assert.ok(patterns.size > 8);
  for (const pattern of patterns) {
    const allowed = patternWords.get(pattern);
    assert.ok(allowed !== undefined, `${pattern} has no words in pattern-words.ts`);
    assert.match(allowed.example, new RegExp(pattern, "u"));
  }
});

/** A message and all that it can hold. */
function nestedMessages(message: DescMessage, found = new Set<DescMessage>()): Set<DescMessage> {
  if (found.has(message)) return found;
  found.add(message);
  for (const field of message.fields) if (field.message !== undefined) nestedMessages(field.message, found);
  return found;
}

test("JSON that does not fit names its field, where there is one", () => {
  const fieldOf = (json: JsonValue): string | undefined => {
    try {
      fromJson(CreateInstanceRequestSchema, json);
    } catch (error) {
      return explainJsonError(CreateInstanceRequestSchema, (error as Error).message)?.fields[0]?.field;
    }
    return assert.fail("it fits");
  };
  assert.equal(fieldOf({ spec: { image: 1 } }), "spec.image");
  assert.equal(fieldOf({ spec: { gpu: { count: "x" } } }), "spec.gpu.count");
  assert.equal(fieldOf({ spec: { ports: [{ containerPort: "x" }] } }), "spec.ports.container_port");
  assert.equal(fieldOf({ spec: { restartPolicy: "SOMETIMES" } }), "spec.restart_policy");
  assert.equal(fieldOf({ spec: { imagee: "x" } }), "spec.imagee");
  assert.equal(fieldOf({ spec: 5 }), "spec");
  // There are three durations, and the library does not say which.
  assert.equal(fieldOf({ spec: { stopGrace: "soon" } }), "spec");
  assert.equal(fieldOf([]), undefined);
});

test("a duration or a time that is none in JSON is told with what it must be, and where it can stand", () => {
  const toldOf = (schema: DescMessage, json: JsonValue): readonly [string, string] => {
    try {
      fromJson(schema, json);
    } catch (error) {
      const [violation] = explainJsonError(schema, (error as Error).message)?.fields ?? [];
      return [violation?.field ?? "", violation?.message ?? ""];
    }
    return assert.fail("it fits");
  };
  const durations = "in one of placement_timeout, max_run_time, stop_grace: must be a duration in seconds";
  assert.deepEqual(toldOf(CreateInstanceRequestSchema, { spec: { maxRunTime: "soon" } }), [
    "spec",
    `${durations}, such as "3.5s", not "soon"`,
  ]);
  assert.deepEqual(toldOf(CreateInstanceRequestSchema, { spec: { stopGrace: 5 } }), [
    "spec",
    `${durations}, such as "3.5s", not 5`,
  ]);
  assert.deepEqual(toldOf(CreateEnrollmentTokenRequestSchema, { lifetime: "1h" }), [
    "lifetime",
    'must be a duration in seconds, such as "3.5s", not "1h"',
  ]);
  assert.deepEqual(toldOf(StreamLogsRequestSchema, { sinceTime: "yesterday" }), [
    "since_time",
    'must be a time, such as "2026-01-31T12:00:00Z": invalid RFC 3339 string',
  ]);
});

test("many violations are told up to a bound", () => {
  const env = Object.fromEntries(Array.from({ length: 100 }, (_, n) => [`${n}`, "x"]));
  const request = create(CreateInstanceRequestSchema, { spec: { image: "busybox", env } });
  assert.equal(violationsOf(() => validator.check(CreateInstanceRequestSchema, request)).length, 32);
});

test("what is valid passes", () => {
  validator.check(CreateInstanceRequestSchema, create(CreateInstanceRequestSchema, { spec: { image: "busybox" } }));
  validator.check(
    StreamLogsRequestSchema,
    create(StreamLogsRequestSchema, { instanceId: "ins_01h455vb4pex5vsknk084sn02q" }),
  );
});

test("a text that no database can hold is refused by its field", () => {
  const refused = (field: string) => (error: unknown) =>
    error instanceof DomainError &&
    error.reason === ErrorReason.INVALID_ARGUMENT &&
    error.fields.every((violation) => violation.field === field && violation.rule === "string.storable");
  for (const text of ["a\0b", "\ud800"]) {
    const list = create(ListInstancesRequestSchema, { filter: { gpuModel: text } });
    assert.throws(() => validator.check(ListInstancesRequestSchema, list), refused("filter.gpu_model"));
    const labels = create(ListInstancesRequestSchema, { filter: { labels: { [text]: "b" } } });
    assert.throws(() => validator.check(ListInstancesRequestSchema, labels), refused("filter.labels"));
  }
  const fine = create(ListInstancesRequestSchema, { filter: { labels: { a: "ñ 🙂" } } });
  validator.check(ListInstancesRequestSchema, fine);
});
