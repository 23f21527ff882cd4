import assert from "node:assert/strict";
import { glob } from "node:fs/promises";
import { join } from "node:path";
import { describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import {
  create,
  createFileRegistry,
  type DescFile,
  type DescMethod,
  type DescMethodUnary,
  type DescMethodServerStreaming,
  type DescService,
} from "@bufbuild/protobuf";
import { FileDescriptorProtoSchema } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { NodeLinkService } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { Access } from "@clodei/proto/gen/clodei/options/v1/options";
import { ReplicaService } from "@clodei/proto/gen/clodei/replica/v1/replica_service";
import { CatalogService } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { DomainError } from "../platform/errors.ts";
import { authorizationOf, authorize, openServices } from "./authorization.ts";
import { anonymousCaller } from "./caller.ts";
import { startTestListener, testCallers } from "./test-listener.ts";

const runs = ["role-MEMBER", "role-OPERATOR", "role-AUTHOR", "role-MANAGER", "role-ADMIN"];
const reads = [...runs, "role-VIEWER", "role-COMPLIANCE_OFFICER"];
const customers = [...reads, "no-role", "unverified"];

/**
 * Who may call what, written down a second time: a change of an option in the schema must be meant, and so be made
 * here as well. "unverified" is an admin whose e-mail address is not verified.
 */
const admitted: Readonly<Record<string, readonly string[]>> = {
  "clodei.v1.InstanceService/CreateInstance": runs,
  "clodei.v1.InstanceService/GetInstance": [...reads, "unverified"],
  "clodei.v1.InstanceService/ListInstances": [...reads, "unverified"],
  "clodei.v1.InstanceService/WatchInstances": [...reads, "unverified"],
  "clodei.v1.InstanceService/StopInstance": [...runs, "unverified"],
  "clodei.v1.InstanceService/StartInstance": runs,
  "clodei.v1.InstanceService/RestartInstance": runs,
  "clodei.v1.InstanceService/DeleteInstance": [...runs, "unverified"],
  "clodei.v1.InstanceService/StreamLogs": [...runs, "role-VIEWER", "unverified"],
  "clodei.v1.InstanceService/ListInstanceEvents": [...reads, "unverified"],
  "clodei.v1.CatalogService/ListOffers": [...customers, "user", "platform"],
  "clodei.v1.CatalogService/ListLocations": [...customers, "user", "platform"],
  "clodei.v1.CatalogService/ListImagePolicies": [...customers, "user", "platform"],
  "clodei.v1.NodeService/CreateEnrollmentToken": ["platform"],
  "clodei.v1.NodeService/ListEnrollmentTokens": ["platform"],
  "clodei.v1.NodeService/RevokeEnrollmentToken": ["platform"],
  "clodei.v1.NodeService/ListNodes": ["platform"],
  "clodei.v1.NodeService/GetNode": ["platform"],
  "clodei.v1.NodeService/WatchNodes": ["platform"],
  "clodei.v1.NodeService/CordonNode": ["platform"],
  "clodei.v1.NodeService/UncordonNode": ["platform"],
  "clodei.v1.NodeService/RevokeNode": ["platform"],
  "clodei.v1.NodeService/ReenrollNode": ["platform"],
  "clodei.v1.EnrollmentService/Enroll": ["anonymous"],
  "clodei.v1.EnrollmentService/CreateRenewalChallenge": [
    "anonymous",
    ...customers,
    "user",
    "platform",
    "node",
    "replica",
  ],
  "clodei.v1.EnrollmentService/RenewExpired": ["anonymous"],
  "clodei.v1.IdentityService/WhoAmI": [...customers, "user", "platform"],
  "clodei.node.v1.NodeLinkService/Session": ["node"],
  "clodei.node.v1.NodeLinkService/UploadLogs": ["node"],
  "clodei.node.v1.NodeLinkService/RenewCertificate": ["node"],
  "clodei.replica.v1.ReplicaService/RelayLogs": ["replica"],
};

const ours: readonly DescService[] = [
  InstanceService,
  CatalogService,
  NodeService,
  EnrollmentService,
  IdentityService,
  NodeLinkService,
  ReplicaService,
];

/** Every service of every generated file: also of one that nobody registered yet. */
async function allServices(): Promise<DescService[]> {
  const generated = join(import.meta.dirname, "..", "..", "..", "proto", "gen");
  const services: DescService[] = [];
  for await (const path of glob("**/*_pb.ts", { cwd: generated })) {
    const module = (await import(pathToFileURL(join(generated, path)).href)) as Record<string, unknown>;
    const file = Object.values(module).find(isFile);
    assert.ok(file !== undefined, `${path} exports its file's descriptor`);
    services.push(...file.services);
  }
  return services;
}

function isFile(value: unknown): value is DescFile {
  return typeof value === "object" && value !== null && "kind" in value && value.kind === "file";
}

describe("who may call", () => {
  test("every method says who may call it, but for health and reflection, by name", async () => {
    const services = await allServices();
    assert.ok(services.length >= ours.length + openServices.size);
    const without = services.flatMap((service) =>
      service.methods
        .filter((method) => (authorizationOf(method)?.access ?? Access.UNSPECIFIED) === Access.UNSPECIFIED)
        .map(() => service.typeName),
    );
    assert.deepEqual(
      new Set(without),
      new Set([
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
      ]),
    );
    assert.deepEqual(new Set(without), openServices);
    const methods = services.filter(({ typeName }) => !openServices.has(typeName)).flatMap(({ methods: all }) => all);
    assert.deepEqual(methods.map(nameOf).toSorted(), Object.keys(admitted).toSorted(), "the table has every method");
  });

  test("a method that changes something takes an idempotency key, and one that does not says that it has no effects", () => {
    // A node's session and its uploads are streams; enrollment and renewal are idempotent by their public key.
    const byOtherMeans = new Set(["EnrollmentService", "NodeLinkService"]);
    for (const method of ours.filter(({ name }) => !byOtherMeans.has(name)).flatMap(({ methods }) => methods)) {
      const takesKey = method.input.fields.some(({ name }) => name === "idempotency_key");
      assert.equal(takesKey, authorizationOf(method)?.mutates === true, nameOf(method));
    }
  });

  test("every RPC of the public listener refuses each caller that it does not name, and admits each that it names", async () => {
    await using listener = await startTestListener((router) => {
      for (const service of ours) router.service(service, {});
    });
    for (const caller of ["anonymous", ...Object.keys(testCallers)]) {
      const transport = listener.transport("grpc", caller === "anonymous" ? undefined : `Bearer ${caller}`);
      for (const method of ours.flatMap(({ methods }) => methods)) {
        const name = nameOf(method);
        const error = await callEmpty(transport, method);
        const refused = error.code === Code.PermissionDenied || error.code === Code.Unauthenticated;
        const expected = admitted[name]?.includes(caller) === true;
        assert.equal(refused, !expected, `${caller} calls ${name}: ${Code[error.code]}: ${error.message}`);
        if (!expected && caller === "anonymous") assert.equal(error.code, Code.Unauthenticated, name);
        // Past authorization there is validation, and behind it no handler.
        if (expected)
          assert.ok([Code.InvalidArgument, Code.Unimplemented].includes(error.code), `${name}: ${error.message}`);
      }
    }
  });

  test("who is refused is told who may, and what to use instead", () => {
    const told = (method: DescMethod, caller: string): string => {
      try {
        authorize(method, testCallers[caller] ?? anonymousCaller);
      } catch (error) {
        return (error as DomainError).message;
      }
      return assert.fail("it was admitted");
    };
    const { createInstance } = InstanceService.method;
    assert.match(told(createInstance, "role-VIEWER"), /one of the roles member, .* and yours is viewer/);
    assert.match(told(createInstance, "no-role"), /and yours is none/);
    assert.match(told(createInstance, "platform"), /use an API key of the organization/);
    assert.match(told(NodeService.method.listNodes, "role-ADMIN"), /platform operators, with an operator's API key/);
    assert.match(told(EnrollmentService.method.enroll, "user"), /leave out the authorization header/);
    assert.match(told(NodeLinkService.method.session, "platform"), /nodes, with their certificates/);
    assert.match(told(ReplicaService.method.relayLogs, "node"), /control planes among themselves/);
  });

  test("a method without the option is callable by nobody", () => {
    const { service, method } = methodWithoutOption("clodei.v1.NewService");
    assert.equal(authorizationOf(method), undefined);
    for (const caller of [anonymousCaller, ...Object.values(testCallers)]) {
      assert.throws(() => authorize(method, caller), DomainError, `${caller.kind} calls ${service.typeName}`);
    }
    // The name of an open service opens that one, not what looks like it.
    const lookalike = methodWithoutOption("clodei.grpc.health.v1.Health").method;
    assert.throws(() => authorize(lookalike, anonymousCaller), DomainError);
  });
});

function nameOf(method: DescMethod): string {
  return `${method.parent.typeName}/${method.name}`;
}

function methodWithoutOption(typeName: string): { service: DescService; method: DescMethod } {
  const dot = typeName.lastIndexOf(".");
  const packageName = typeName.slice(0, dot);
  const file = create(FileDescriptorProtoSchema, {
    name: "new.proto",
    package: packageName,
    syntax: "proto3",
    messageType: [{ name: "M" }],
    service: [
      {
        name: typeName.slice(dot + 1),
        method: [{ name: "Call", inputType: `.${packageName}.M`, outputType: `.${packageName}.M` }],
      },
    ],
  });
  const service = createFileRegistry(file, () => undefined).getService(typeName);
  const method = service?.methods[0];
  assert.ok(service !== undefined && method !== undefined);
  return { service, method };
}

/** Calls a method with an empty request. No method has a handler, so there is always an error. */
async function callEmpty(
  transport: ReturnType<Awaited<ReturnType<typeof startTestListener>>["transport"]>,
  method: DescMethod,
): Promise<ConnectError> {
  try {
    if (method.methodKind === "unary") {
      await transport.unary(method as DescMethodUnary, undefined, 5_000, undefined, create(method.input));
    } else {
      async function* one(): AsyncGenerator<ReturnType<typeof create>> {
        yield create(method.input);
      }
      const response = await transport.stream(method as DescMethodServerStreaming, undefined, 5_000, undefined, one());
      for await (const _message of response.message);
    }
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new Error(`${nameOf(method)} answered`);
}
