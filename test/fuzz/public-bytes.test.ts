// Bytes that are no request, to the public listener: broken envelopes, wrong lengths and compression, headers that
// mean nothing, and HTTP/2 that is none. Each is refused in words or cut; memory stays bounded, and a customer beside
// it is served.
import assert from "node:assert/strict";
import { test } from "node:test";
import { gzipSync } from "node:zlib";
import { toBinary, create } from "@bufbuild/protobuf";
import { InstanceService, ListInstancesRequestSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { Health } from "@clodei/proto/gen/grpc/health/v1/health";
import { ServerReflection } from "@clodei/proto/gen/grpc/reflection/v1/reflection";
import fc from "fast-check";
import type { ClodeiClient } from "@clodei/sdk";
import { FuzzedControlPlane } from "./fuzzed-control-plane.ts";
import { memoryComesBack, memoryInUse } from "./memory.ts";
import { fuzz, fuzzSeconds } from "./fuzzing.ts";
import { framed, type RawRequest } from "./raw-calls.ts";

const seconds = 5;
const leaveMs = 100;

const valid = toBinary(ListInstancesRequestSchema, create(ListInstancesRequestSchema, { pageSize: 1 }));
const packed = gzipSync(valid);
/** 8 MiB of zeros in 8 KiB: more than a message may have. */
const bomb = gzipSync(Buffer.alloc(8 * 2 ** 20));

const paths = [
  ...InstanceService.methods.map(({ name }) => `/${InstanceService.typeName}/${name}`),
  `/${Health.typeName}/Check`,
  `/${Health.typeName}/Watch`,
  `/${ServerReflection.typeName}/ServerReflectionInfo`,
  "/no.Such/Method",
  "/",
  "//",
  "/%00",
];

const contentTypes = [
  "application/grpc",
  "application/grpc+proto",
  "application/grpc+json",
  "application/grpc+thrift",
  "application/grpc-web",
  "application/grpc-web+json",
  "application/grpc-web-text",
  "application/proto",
  "application/json",
  "application/json; charset=utf-16",
  "application/connect+proto",
  "application/connect+json",
  "text/plain",
  "",
];

const strange = fc.constantFrom(
  "",
  "-1",
  "0",
  "1n",
  "99999999999999999999n",
  "NaN",
  "1e9",
  "gzip",
  "gzip, gzip",
  "br",
  "identity",
  "2",
  "\t",
  "a".repeat(2_000),
);
const seldom = (header: fc.Arbitrary<string>): fc.Arbitrary<string | undefined> =>
  fc.oneof({ weight: 9, arbitrary: fc.constant(undefined) }, { weight: 1, arbitrary: header });
const headers = fc
  .record({
    "content-type": fc.oneof(
      fc.constantFrom("application/grpc", "application/json", "application/proto"),
      fc.constantFrom(...contentTypes),
    ),
    "content-encoding": seldom(fc.constantFrom("gzip", "identity", "deflate", "")),
    "connect-content-encoding": seldom(strange),
    "grpc-encoding": seldom(fc.constantFrom("gzip", "identity", "snappy", "")),
    "grpc-accept-encoding": seldom(strange),
    "grpc-timeout": seldom(strange),
    "connect-timeout-ms": seldom(strange),
    "connect-protocol-version": seldom(strange),
    "clodei-organization": seldom(strange),
  })
  .map((found) =>
    Object.fromEntries(Object.entries(found).filter((entry): entry is [string, string] => entry[1] !== undefined)),
  );

const payload = fc.oneof(
  fc.constantFrom(
    valid,
    packed,
    packed.subarray(0, packed.length - 4),
    bomb,
    Buffer.from("{}"),
    Buffer.from('{"pageSize":1'),
    Buffer.alloc(0),
  ),
  fc.uint8Array({ maxLength: 64 }),
);
const frame = fc
  .tuple(fc.constantFrom(0, 0, 1, 2, 3, 0x80, 0x81, 0xff), payload, fc.constantFrom(0, 0, 0, 1, -1, 2 ** 22, 2 ** 31))
  .map(([flags, bytes, more]) => framed(bytes, flags, Math.max(0, bytes.length + more)));
const body = fc.oneof(fc.array(frame, { maxLength: 3 }), fc.array(payload, { maxLength: 2 }));

/** What is after the "?" of a request by GET. */
const query = fc
  .record({
    encoding: fc.constantFrom("proto", "json", "xml", ""),
    message: fc.oneof(
      fc.constantFrom("e30", "%7B%7D", "****", "", "AAAA", "a".repeat(20_000)),
      fc.base64String({ maxLength: 40 }),
    ),
    base64: fc.constantFrom("1", "0", "", "2"),
    compression: fc.constantFrom("", "gzip", "br"),
    connect: fc.constantFrom("v1", "v2", ""),
  })
  .map(
    (found) =>
      `?${Object.entries(found)
        .map(([name, value]) => `${name}=${value}`)
        .join("&")}`,
  );

const requests: fc.Arbitrary<RawRequest> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      path: fc.constantFrom(...paths),
      headers,
      body,
      end: fc.constantFrom("end", "end", "end", "reset", "nothing"),
      leaveAfterMs: fc.constant(leaveMs),
    }),
  },
  {
    weight: 2,
    arbitrary: fc
      .tuple(
        fc.constantFrom(...paths),
        query,
        headers,
        fc.constantFrom("GET", "GET", "GET", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "nonsense"),
      )
      .map(([path, search, sent, method]) => ({
        method,
        path: `${path}${search}`,
        headers: sent,
        body: [],
        leaveAfterMs: leaveMs,
      })),
  },
);

test(
  "a request that is none is refused in words, whatever its bytes are",
  { timeout: (fuzzSeconds(seconds) + 120) * 1_000 },
  async (t) => {
    await using controlPlane = await FuzzedControlPlane.start();
    const customer = await controlPlane.createOrganization("customer");
    const honest = controlPlane.connect(customer);
    await serves(honest);
    const connections = await controlPlane.metric("clodei_public_connections");
    using attacker = controlPlane.attack();
    const outcomes = new Map<string, number>();
    const perform = async (request: RawRequest): Promise<void> => {
      const answer = await attacker.send({
        ...request,
        headers: { ...request.headers, authorization: `Bearer ${customer.key}` },
      });
      outcomes.set(answer.code, (outcomes.get(answer.code) ?? 0) + 1);
      const what = describeRequest(request);
      assert.ok(
        !["internal", "unknown", "data_loss"].includes(answer.code),
        `${what} → ${answer.code}\n${answer.text.slice(0, 1_000)}`,
      );
      const silent = ["ok", "left", "reset"].includes(answer.code) || answer.code.startsWith("http_");
      assert.ok(
        silent || answer.reason !== undefined,
        `${what} → ${answer.code} without a reason\n${answer.text.slice(0, 1_000)}`,
      );
    };
    let before = 0;
    await fuzz(t, {
      values: fc.array(requests, { minLength: 1, maxLength: 16 }),
      run: async (batch) => {
        await Promise.all([...batch.map(perform), serves(honest)]);
      },
      describe: (batch) => batch.map(describeRequest).join("\n"),
      seconds,
      warmUp: { runs: 20, warmed: () => (before = memoryInUse()) },
    });
    t.diagnostic([...outcomes].map(([code, count]) => `${code} ${count}`).join(", "));
    attacker[Symbol.dispose]();
    await controlPlane.settled(connections);
    assert.deepEqual(controlPlane.failures, []);
    await memoryComesBack(before);
  },
);

test("what is broken is named, in each protocol", { timeout: 60_000 }, async () => {
  await using controlPlane = await FuzzedControlPlane.start();
  const customer = await controlPlane.createOrganization("customer");
  using client = controlPlane.attack();
  const list = `/${InstanceService.typeName}/ListInstances`;
  const grpc = { "content-type": "application/grpc" };
  const gzip = { "content-type": "application/proto", "content-encoding": "gzip" };
  const torn = packed.subarray(0, packed.length - 9);
  const broken: Readonly<Record<string, Pick<RawRequest, "headers" | "body"> & { readonly path?: string }>> = {
    "parse binary: ": { headers: { "content-type": "application/proto" }, body: [Buffer.from([0xff])] },
    "parse binary:": { headers: grpc, body: [framed(Buffer.from([0xff]))] },
    "decompression failed": { headers: gzip, body: [torn] },
    "decompression failed ": { headers: { ...grpc, "grpc-encoding": "gzip" }, body: [framed(torn, 1)] },
    "the message is larger than": { headers: gzip, body: [bomb] },
    "received compressed envelope": { headers: grpc, body: [framed(packed, 1)] },
    "incomplete envelope": { headers: grpc, body: [framed(valid, 0, valid.length + 1)] },
    "the message is larger than ": { headers: grpc, body: [framed(valid, 0, 2 ** 31)] },
    "not base64": { path: `${list}?connect=v1&encoding=proto&base64=1&message=****`, headers: {}, body: [] },
  };
  for (const [words, { path = list, headers: sent, body: bytes }] of Object.entries(broken)) {
    const answer = await client.send({
      method: path === list ? "POST" : "GET",
      path,
      headers: { ...sent, authorization: `Bearer ${customer.key}` },
      body: bytes,
      leaveAfterMs: 30_000,
    });
    assert.match(answer.code, /^(invalid_argument|resource_exhausted)$/, `${words}: ${answer.text}`);
    assert.equal(answer.reason, "INVALID_ARGUMENT", words);
    assert.ok(decodeURIComponent(answer.text).includes(words.trimEnd()), `${words}: ${answer.text}`);
  }
  assert.deepEqual(controlPlane.failures, []);
});

function describeRequest({ method = "POST", path, headers: sent, body: bytes }: RawRequest): string {
  return `${method} ${path} ${JSON.stringify(sent)} ${Buffer.concat(bytes).subarray(0, 200).toString("hex")}`;
}

async function serves(client: ClodeiClient): Promise<void> {
  const { organizationName } = await client.identity.whoAmI();
  assert.match(organizationName, /^customer/);
}
