import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import {
  CreateInstanceRequestSchema,
  GetInstanceRequestSchema,
  ListInstancesRequestSchema,
  StreamLogsRequestSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "../platform/errors.ts";
import { publicServices } from "../start.ts";
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
  assert.match(byField.get('spec.env["1A"]')?.message ?? "", /pattern|regex/);
  assert.match(byField.get("idempotency_key")?.message ?? "", /64/);
  assert.match(byField.get("spec.restart_policy")?.message ?? "", /RESTART_POLICY_NEVER, RESTART_POLICY_ON_FAILURE/);
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
  assert.match(violation.message, /\^ins_/);
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
