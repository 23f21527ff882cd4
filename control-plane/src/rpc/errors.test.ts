import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { test } from "node:test";
import { Code, ConnectError } from "@connectrpc/connect";
import { setTrailerStatus } from "@connectrpc/connect/protocol-grpc";
import { ErrorReason, ErrorReasonSchema } from "@clodei/proto/gen/clodei/v1/error";
import { BadRequestSchema, ErrorInfoSchema, QuotaFailureSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { newId } from "@clodei/proto/ids";
import { DatabaseAwayError } from "../platform/database.ts";
import { DomainError, quotaExceeded } from "../platform/errors.ts";
import { codeOfReason, isOurs, statusOf, toConnectError } from "./errors.ts";

test("every reason of the schema has a status code, and every status is told with its reason", () => {
  for (const { localName, number } of ErrorReasonSchema.values) {
    if (number === 0) continue;
    assert.ok(Object.hasOwn(codeOfReason, localName), localName);
    const status = statusOf(new DomainError(number as ErrorReason, "why"), "r1");
    assert.equal(status.reason, localName);
    const error = toConnectError(new DomainError(number as ErrorReason, "why", { metadata: { a: "b" } }), "r1");
    assert.equal(error.rawMessage, "why");
    const [info] = error.findDetails(ErrorInfoSchema);
    assert.deepEqual(
      [info?.reason, info?.domain, info?.metadata],
      [localName, "clodei.com", { a: "b", requestId: "r1" }],
    );
  }
});

test("an error that is ours says nothing but the request's id", () => {
  const text = "relation secret_table does not exist";
  for (const error of [
    new Error(text),
    new ConnectError(text, Code.Internal),
    text,
    undefined,
    new DomainError(99 as ErrorReason, text),
  ]) {
    const told = toConnectError(error, "r1");
    assert.equal(told.code, Code.Internal);
    if (!(error instanceof DomainError)) assert.ok(!told.message.includes("secret"), String(error));
    assert.equal(told.findDetails(ErrorInfoSchema)[0]?.metadata["requestId"], "r1");
    assert.ok(isOurs(error));
  }
});

test("a database that is away is unavailable, and worth a retry; something else that is away is our error", () => {
  const lost = new DatabaseAwayError(new Error("Connection terminated unexpectedly"));
  const status = statusOf(lost, "r1");
  assert.equal(status.code, Code.Unavailable);
  assert.equal(status.details.length, 2);
  assert.ok(!isOurs(lost));
  const other = Object.assign(new Error("write"), { code: "EPIPE" });
  assert.equal(statusOf(other, "r1").code, Code.Internal);
});

test("a caller whose connection broke is no error of ours", () => {
  const gone = [
    new ConnectError("http/2 stream closed with error code INTERNAL_ERROR (0x2)", Code.Internal),
    Object.assign(new Error("Premature close"), { code: "ERR_STREAM_PREMATURE_CLOSE" }),
  ];
  for (const error of gone) {
    assert.equal(statusOf(error, "r1").code, Code.Canceled, error.message);
    assert.ok(!isOurs(error));
  }
});

test("a request that is no message is the caller's error, whatever Connect calls it", () => {
  for (const text of [
    "parse binary: premature EOF",
    "decompression failed",
    "received compressed envelope, but do not know how to decompress",
  ]) {
    const told = toConnectError(new ConnectError(text, Code.Internal), "r1");
    assert.deepEqual([told.code, told.rawMessage], [Code.InvalidArgument, text]);
    assert.equal(told.findDetails(ErrorInfoSchema)[0]?.reason, "INVALID_ARGUMENT");
  }
});

test("an error has a bound, whatever it quotes, and is told in the trailers that every gRPC client takes", () => {
  const quotaSubject = `organization:${newId("org")}`;
  // One takes the most room percent-encoded, the other as it is.
  for (const quoted of [`\ud800"漢`.repeat(1_000_000), "word".repeat(1_000_000)]) {
    const large = { field: `spec.env[${quoted}]`, rule: "string.x", message: quoted };
    const small = { field: "a", rule: "b", message: "c" };
    const metadata = { quota: quoted, limit: quoted };
    const errors = [
      new DomainError(ErrorReason.INVALID_ARGUMENT, quoted, {
        fields: Array.from({ length: 32 }, () => large),
        metadata,
      }),
      new DomainError(ErrorReason.INVALID_ARGUMENT, quoted, {
        fields: Array.from({ length: 1_000 }, () => small),
        metadata,
      }),
      new DomainError(ErrorReason.QUOTA_EXCEEDED, quoted, { quotaSubject, metadata, retryAfterMs: 1_500 }),
      new ConnectError(quoted, Code.InvalidArgument),
    ];
    for (const error of errors) {
      const told = toConnectError(error, randomUUID());
      const trailers = [...setTrailerStatus(new Headers(), told)];
      const bytes = trailers.reduce((sum, [name, value]) => sum + name.length + value.length + 32, 0);
      // Some are left for the headers of an answer that has nothing else.
      assert.ok(bytes > 2_000 && bytes <= 8 * 1024 - 512, `${bytes} bytes`);
      assert.ok(told.rawMessage.startsWith(quoted.slice(0, 100).toWellFormed()));
      assert.ok(told.rawMessage.endsWith("…"));
    }
    const [badRequest] = toConnectError(errors[0], "r1").findDetails(BadRequestSchema);
    assert.match(badRequest?.fieldViolations[0]?.field ?? "", /^spec\.env\[.*…$/su);
  }
});

test("as many violations are told as there is room for, and those that fit are told whole", () => {
  const fields = Array.from({ length: 16 }, (_, index) => ({
    field: `spec.labels[${index}]`,
    rule: "string.max_len",
    message: "must be at most 63 characters",
  }));
  const [badRequest] = toConnectError(
    new DomainError(ErrorReason.INVALID_ARGUMENT, "why", { fields }),
    "r1",
  ).findDetails(BadRequestSchema);
  assert.deepEqual(
    badRequest?.fieldViolations.map(({ field, description, reason }) => ({
      field,
      rule: reason,
      message: description,
    })),
    fields,
  );
});

test("a limit that is reached is told as a quota failure", () => {
  const organizationId = newId("org");
  const error = toConnectError(quotaExceeded(organizationId, "watches", 256, "watches are open at a time"), "r1");
  assert.equal(error.code, Code.ResourceExhausted);
  assert.equal(error.findDetails(ErrorInfoSchema)[0]?.metadata["quota"], "watches");
  const [violation] = error.findDetails(QuotaFailureSchema)[0]?.violations ?? [];
  assert.equal(violation?.subject, `organization:${organizationId}`);
  assert.equal(violation.description, "at most 256 watches are open at a time");
});
