// The public API through programs that others wrote: what they list, call, follow, refuse and print.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { fromBinary, type DescMessage } from "@bufbuild/protobuf";
import { CatalogService } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { BadRequestSchema, ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { grpcurlByBuf } from "../harness/grpcurl.ts";
import { testImage, TestSystem } from "../harness/system.ts";
import { Command, type Ended } from "./command.ts";

const patienceMs = 60_000;
const protocols = ["grpc", "grpcweb", "connect"] as const;
const services = [CatalogService, EnrollmentService, IdentityService, InstanceService, NodeService];
/** Debian's Python: where python3-grpcio installs to. */
const python = "/usr/bin/python3";
const pythonUnavailable =
  spawnSync(python, ["-c", "import grpc, google.protobuf"]).status === 0
    ? undefined
    : "needs gRPC for Python (Debian's python3-grpcio)";
const curlUnavailable = spawnSync("curl", ["--version"]).status === 0 ? undefined : "needs curl (Debian's curl)";

/** An error as Connect tells it, which buf prints for each of its protocols. */
type ToldError = {
  readonly code: string;
  readonly message: string;
  readonly details: readonly { readonly type: string; readonly value: string; readonly debug?: unknown }[];
};

/** The details of an error that are of a type, decoded from their bytes. */
function detailsOf<T extends DescMessage>(error: ToldError, schema: T) {
  return error.details
    .filter(({ type }) => type === schema.typeName)
    .map(({ value }) => fromBinary(schema, Buffer.from(value, "base64")));
}

describe("clients that others wrote", { skip: engineUnavailable, timeout: 600_000 }, () => {
  let system: TestSystem;
  let apiKey: string;
  let operatorKey: string;
  before(async () => {
    system = await TestSystem.start({ agents: [{ name: "mad-1", simulateGpus: "2xH100-SXM" }] });
    [apiKey, operatorKey] = [await system.createOrganization("others"), await system.createOperator("oscar")];
  });
  after(async () => {
    await system[Symbol.asyncDispose]();
  });

  const url = (): string => system.controlPlane.listening.publicUrl;
  const command = (program: string, args: readonly string[], env: Readonly<Record<string, string>> = {}): Command =>
    new Command(program, args, system.folder, env);
  const run = (...parameters: Parameters<typeof command>): Promise<Ended> => command(...parameters).ended;

  /** Of /metrics: the lines that have all of these parts. */
  const metric = async (name: string, labels: Readonly<Record<string, string>>): Promise<number> => {
    const answer = await fetch(`${system.controlPlane.listening.operationsUrl}/metrics`);
    const parts = [`${name}{`, ...Object.entries(labels).map(([label, value]) => `${label}="${value}"`)];
    const lines = (await answer.text()).split("\n").filter((line) => parts.every((part) => line.includes(part)));
    return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0);
  };
  const openStreams = (method: string): Promise<number> => metric("clodei_rpc_open_streams", { method });
  const answers = (method: string, code: string): Promise<number> =>
    metric("clodei_rpc_requests_total", { method, code });

  describe("buf curl", () => {
    const flags = (key: string): string[] => ["--cacert", system.caFile, "-H", `Authorization: Bearer ${key}`];
    const buf = (protocol: string, method: string, ...more: string[]): Command =>
      command("buf", ["curl", "--protocol", protocol, ...flags(apiKey), ...more, `${url()}/clodei.v1.${method}`]);

    test("lists services and methods by reflection, over each protocol", async () => {
      const list = async (protocol: string, what: string): Promise<string[]> => {
        const ended = await run("buf", ["curl", "--protocol", protocol, "--cacert", system.caFile, what, url()]);
        assert.equal(ended.code, 0, ended.stderr);
        return ended.stdout
          .trim()
          .split("\n")
          .filter((name) => name.startsWith("clodei."));
      };
      const names = services.map(({ typeName }) => typeName);
      const methods = services.flatMap(({ typeName, methods: own }) => own.map(({ name }) => `${typeName}/${name}`));
      for (const protocol of protocols) {
        assert.deepEqual((await list(protocol, "--list-services")).toSorted(), names.toSorted(), protocol);
        assert.deepEqual((await list(protocol, "--list-methods")).toSorted(), methods.toSorted(), protocol);
      }
    });

    test("calls a method and follows a stream, over each protocol; Ctrl-C ends the stream on the server", async () => {
      const watches = protocols.map((protocol) => buf(protocol, "InstanceService/WatchInstances"));
      try {
        for (const protocol of protocols) {
          const self = await buf(protocol, "IdentityService/WhoAmI").ended;
          assert.match(self.stdout, /"organizationName": "others"/, `${protocol}: ${self.stderr}`);
        }
        await eventually(patienceMs, () => {
          for (const { stdout, stderr } of watches) assert.match(stdout, /"bookmark"/, stderr);
        });
        const spec = JSON.stringify({ spec: { image: testImage, command: ["true"] } });
        const created = await buf("grpc", "InstanceService/CreateInstance", "-d", spec).ended;
        assert.equal(created.code, 0, created.stderr);
        const { instance } = JSON.parse(created.stdout) as { instance: { id: string; state: string } };
        assert.equal(instance.state, "INSTANCE_STATE_PENDING");
        await eventually(patienceMs, () => {
          for (const { stdout } of watches) assert.ok(stdout.includes(instance.id), stdout);
        });
        assert.equal(await openStreams("WatchInstances"), watches.length);
      } finally {
        await Promise.all(watches.map((watch) => watch.interrupt()));
      }
      await eventually(patienceMs, async () => assert.equal(await openStreams("WatchInstances"), 0));
    });

    test("a deadline ends a stream with what it had, over each protocol", async () => {
      await Promise.all(
        protocols.map((protocol) =>
          // Reflection is in the time, too, and a busy machine may need much of it.
          eventually(patienceMs, async () => {
            const ended = await buf(protocol, "InstanceService/WatchInstances", "--timeout", "3s").ended;
            assert.match(ended.stdout, /"bookmark"/, ended.stderr);
            assert.match(ended.stderr, /"code": "deadline_exceeded"/, protocol);
            // Of the code: 4, shifted by three bits.
            assert.equal(ended.code, 32, protocol);
          }),
        ),
      );
      await eventually(patienceMs, async () => assert.equal(await openStreams("WatchInstances"), 0));
    });

    test("refuses a certificate of an authority that it does not know, and one for another name, and says so", async () => {
      const whoAmI = `${url()}/clodei.v1.IdentityService/WhoAmI`;
      const cases: readonly (readonly [RegExp, readonly string[]])[] = [
        [/x509: certificate signed by unknown authority/, []],
        [
          /x509: certificate is valid for localhost, not other\.example/,
          ["--cacert", system.caFile, "--servername", "other.example"],
        ],
      ];
      for (const [words, more] of cases) {
        for (const protocol of protocols) {
          const bearer = `Authorization: Bearer ${apiKey}`;
          const ended = await run("buf", ["curl", "-v", "--protocol", protocol, "-H", bearer, ...more, whoAmI]);
          assert.notEqual(ended.code, 0, protocol);
          assert.equal(ended.stdout, "", protocol);
          assert.match(ended.stderr, words, protocol);
        }
      }
    });

    test("prints the standard details of an error, over each protocol, and converts them", async () => {
      const spec = JSON.stringify({ spec: { image: testImage, gpu: { model: "H100-SXM", count: 99 } } });
      for (const protocol of protocols) {
        const { code, stderr } = await buf(protocol, "InstanceService/CreateInstance", "-d", spec).ended;
        assert.equal(code, 3 << 3, stderr);
        const error = JSON.parse(stderr) as ToldError;
        assert.equal(error.code, "invalid_argument");
        const [info] = detailsOf(error, ErrorInfoSchema);
        assert.deepEqual([info?.reason, info?.domain], ["INVALID_ARGUMENT", "clodei.com"], protocol);
        const [bad] = detailsOf(error, BadRequestSchema);
        assert.deepEqual(
          bad?.fieldViolations.map(({ field, reason }) => [field, reason]),
          [["spec.gpu.count", "uint32.lte"]],
          protocol,
        );
        const file = join(system.folder, `detail-${protocol}.binpb`);
        await writeFile(file, Buffer.from(error.details[1]?.value ?? "", "base64"));
        const type = ["--type", BadRequestSchema.typeName];
        const converted = await run("buf", [
          "convert",
          "proto/external",
          ...type,
          "--from",
          file,
          "--to",
          "-#format=json",
        ]);
        assert.match(converted.stdout, /"field":\s*"spec\.gpu\.count"/, converted.stderr);
      }
    });
  });

  describe("plain curl", { skip: curlUnavailable }, () => {
    const json = ["-H", "Content-Type: application/json"];
    /** A call as the documents show it; the status stands behind the answer. */
    const curl = async (method: string, ...more: string[]): Promise<{ status: number; body: string }> => {
      const bearer = `Authorization: Bearer ${apiKey}`;
      const common = ["-sS", "--cacert", system.caFile, "-H", bearer, "-w", "\n%{http_code}"];
      const { code, stdout, stderr } = await run("curl", [...common, ...more, `${url()}/clodei.v1.${method}`]);
      assert.equal(code, 0, stderr);
      const end = stdout.lastIndexOf("\n");
      return { status: Number(stdout.slice(end)), body: stdout.slice(0, end) };
    };

    test("creates, gets and lists with JSON, over both HTTP versions", async () => {
      for (const version of ["--http1.1", "--http2"]) {
        const labels = { version: version.slice(2) };
        const spec = JSON.stringify({ spec: { image: testImage, command: ["sleep", "600"], stopGrace: "1s", labels } });
        const created = await curl("InstanceService/CreateInstance", version, ...json, "-d", spec);
        assert.equal(created.status, 200, created.body);
        const { id } = (JSON.parse(created.body) as { instance: { id: string } }).instance;
        const got = await eventually(patienceMs, async () => {
          const { body } = await curl("InstanceService/GetInstance", version, ...json, "-d", `{"instanceId": "${id}"}`);
          const { instance } = JSON.parse(body) as { instance: { state: string; location?: { country: string } } };
          assert.equal(instance.state, "INSTANCE_STATE_RUNNING");
          return instance;
        });
        assert.equal(got.location?.country, "ES");
        const query = new URLSearchParams({ encoding: "json", message: JSON.stringify({ filter: { labels } }) });
        const byPost = await curl("InstanceService/ListInstances", version, ...json, "-d", query.get("message") ?? "");
        const byGet = await curl(`InstanceService/ListInstances?${query}`, version);
        assert.deepEqual(byGet, byPost);
        const { instances } = JSON.parse(byPost.body) as { instances: { id: string }[] };
        assert.deepEqual(
          instances.map((instance) => instance.id),
          [id],
        );
        assert.equal(
          (await curl("InstanceService/DeleteInstance", version, ...json, "-d", `{"instanceId": "${id}"}`)).status,
          200,
        );
      }
    });

    test("reads the details of an error", async () => {
      const { status, body } = await curl(
        "InstanceService/CreateInstance",
        ...json,
        "-d",
        '{"spec": {"image": "evil.example/miner"}}',
      );
      assert.equal(status, 400);
      const error = JSON.parse(body) as ToldError;
      const debug = error.details.map((detail) => detail.debug as Record<string, unknown>);
      assert.equal(debug[0]?.["reason"], "IMAGE_NOT_ALLOWED");
      assert.match(JSON.stringify(debug[1]?.["fieldViolations"]), /"field":"spec\.image"/);
      assert.equal(detailsOf(error, ErrorInfoSchema)[0]?.reason, "IMAGE_NOT_ALLOWED");
    });

    test("is told what to send where it sent no JSON, a field too many, or too much", async () => {
      const large = join(system.folder, "large.json");
      await writeFile(large, JSON.stringify({ spec: { image: "x".repeat(5 * 1024 * 1024) } }));
      const cases: readonly (readonly [status: number, words: RegExp, method: string, args: readonly string[]])[] = [
        [415, /Content-Type: application\/json/, "InstanceService/ListInstances", []],
        [415, /Content-Type: application\/json/, "InstanceService/ListInstances", ["-d", "{}"]],
        [415, /this method streams/, "InstanceService/WatchInstances", [...json, "-d", "{}"]],
        [400, /"page_sise" is unknown/, "InstanceService/ListInstances", [...json, "-d", '{"page_sise": 1}']],
        [400, /larger than 4194304 bytes/, "InstanceService/CreateInstance", [...json, "--data-binary", `@${large}`]],
      ];
      for (const version of ["--http1.1", "--http2"]) {
        for (const [status, words, method, args] of cases) {
          const answer = await curl(method, version, ...args);
          assert.equal(answer.status, status, answer.body);
          const error = JSON.parse(answer.body) as ToldError;
          assert.equal(error.code, "invalid_argument");
          assert.match(error.message.replaceAll("\\", ""), words);
          assert.equal(detailsOf(error, ErrorInfoSchema)[0]?.reason, "INVALID_ARGUMENT");
        }
      }
    });
  });

  describe("Python's grpcio", { skip: pythonUnavailable }, () => {
    const program = async (image: string): Promise<Ended> =>
      run(python, ["docs/examples/instance.py"], {
        CLODEI_ENDPOINT: url(),
        CLODEI_CA_FILE: system.caFile,
        CLODEI_API_KEY: apiKey,
        CLODEI_IMAGE: image,
      });

    test("creates an instance, follows its output, cancels, which the server sees, and deletes it", async () => {
      const before = await answers("StreamLogs", "canceled");
      const { code, stdout, stderr } = await program(testImage);
      assert.equal(code, 0, stderr);
      const [, id = ""] =
        /^created (ins_\S+)\nline 1\nline 2\nline 3\n(?:line \d+\n)*deleting \1\n$/.exec(stdout) ?? [];
      assert.match(id, /^ins_/, stdout);
      await eventually(patienceMs, async () => {
        assert.equal(await answers("StreamLogs", "canceled"), before + 1);
        assert.equal(await openStreams("StreamLogs"), 0);
      });
      // By the cancel, and not by the end of the program: the call that follows it was answered later.
      const order = [
        ...system.controlPlane.program.output.matchAll(
          /"method":"clodei\.v1\.InstanceService\/(StreamLogs|DeleteInstance)"/g,
        ),
      ];
      assert.deepEqual(
        order.slice(-2).map(([, method]) => method),
        ["StreamLogs", "DeleteInstance"],
      );
      using client = system.connect(apiKey);
      const instance = await client.instances.get(id);
      await instance.waitUntilDeleted({ timeoutMs: patienceMs });
    });

    test("decodes the standard details of an error", async () => {
      const { code, stdout } = await program("evil.example/miner");
      assert.equal(code, 1);
      assert.match(stdout, /^INVALID_ARGUMENT spec\.image: /);
      assert.match(stdout, /^google\.rpc\.ErrorInfo reason: "IMAGE_NOT_ALLOWED" domain: "clodei\.com"/m);
      assert.match(stdout, /^google\.rpc\.BadRequest field_violations \{ field: "spec\.image"/m);
    });
  });

  describe("the lines of the documents", { skip: curlUnavailable }, () => {
    /** A document's lines for the programs that are here, with what a reader fills in. */
    const linesOf = async (document: string, filledIn: Readonly<Record<string, string>>): Promise<string[]> => {
      const text = await readFile(new URL(`../../docs/${document}`, import.meta.url), "utf8");
      const blocks = [...text.matchAll(/^```sh\n([^]*?)^```$/gm)].map(([, block = ""]) => block);
      const lines = blocks.flatMap((block) => block.replaceAll(/\\\n\s*/g, "").split("\n"));
      return lines
        .filter((line) => /^(?:buf curl|curl|grpcurl) /.test(line))
        .map((line) => line.replaceAll(/\b(?:CA|HOST:8443|KEY)\b|nod_…/g, (word) => filledIn[word] ?? word));
    };

    for (const [document, atLeast] of [
      ["clients.md", 14],
      ["operating-a-node.md", 6],
    ] as const) {
      test(`docs/${document}: each works as it stands, those for grpcurl as buf curl`, async () => {
        const nodeId = system.agent("mad-1").nodeId;
        const authority = url().replace("https://", "");
        const filledIn = { CA: system.caFile, "HOST:8443": authority, KEY: operatorKey, "nod_…": nodeId };
        const lines = await linesOf(document, filledIn);
        assert.ok(lines.length >= atLeast, lines.join("\n"));
        const env = {
          CLODEI_ENDPOINT: url(),
          CLODEI_CA_FILE: system.caFile,
          CLODEI_API_KEY: apiKey,
          CLODEI_IMAGE: testImage,
        };
        const check = async (line: string, code: number): Promise<void> => {
          const ended = await run("sh", ["-c", line.startsWith("grpcurl ") ? grpcurlByBuf(line) : line], env);
          assert.equal(ended.code, code, `${line}\n${ended.stderr}`);
          assert.doesNotMatch(ended.stdout, /"errorResponse"|"code":|^$/, line);
        };
        // Streams that a deadline ends, beside the others; a busy machine may need more than that to begin one.
        const isTimed = (line: string): boolean => / (?:--timeout|-max-time) /.test(line);
        const checkOthers = async (): Promise<void> => {
          for (const line of lines.filter((other) => !isTimed(other))) await check(line, 0);
        };
        const timed = lines.filter(isTimed).map((line) => eventually(patienceMs, () => check(line, 32)));
        await Promise.all([...timed, checkOthers()]);
      });
    }
  });
});
