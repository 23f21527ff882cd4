// gRPC server reflection, v1 and v1alpha, over the descriptors that the generated code holds: what lets grpcurl
// and `buf curl` work without our schema files. The two versions have the same messages under other names.
import {
  create,
  createRegistry,
  type DescExtension,
  type DescFile,
  type DescMessage,
  type DescService,
  type Registry,
  fromBinary,
  type MessageInitShape,
  toBinary,
} from "@bufbuild/protobuf";
import { FileDescriptorProtoSchema } from "@bufbuild/protobuf/wkt";
import { Code, type ServiceImpl } from "@connectrpc/connect";
import { file_clodei_v1_error } from "@clodei/proto/gen/clodei/v1/error";
import { file_google_rpc_error_details } from "@clodei/proto/gen/google/rpc/error_details";
import { file_google_rpc_status } from "@clodei/proto/gen/google/rpc/status";
import {
  ServerReflectionRequestSchema,
  ServerReflectionResponseSchema,
  type ServerReflection,
  type ServerReflectionRequest,
  type ServerReflectionResponse,
} from "@clodei/proto/gen/grpc/reflection/v1/reflection";
import {
  ServerReflectionRequestSchema as AlphaRequestSchema,
  ServerReflectionResponseSchema as AlphaResponseSchema,
  type ServerReflection as AlphaReflection,
} from "@clodei/proto/gen/grpc/reflection/v1alpha/reflection";

type Answer = ServerReflectionResponse["messageResponse"];

/** What the server says about itself. */
export type Reflection = {
  readonly v1: ServiceImpl<typeof ServerReflection>;
  readonly v1alpha: ServiceImpl<typeof AlphaReflection>;
};

/** What errors carry. No method names it, and without it a client shows the details of an error as bytes. */
const filesOfErrors: readonly DescFile[] = [
  file_google_rpc_status,
  file_google_rpc_error_details,
  file_clodei_v1_error,
];

/** The handlers of both versions, for the services named. */
export function createReflection(services: readonly DescService[]): Reflection {
  const files = collectFiles([...services.map(({ file }) => file), ...filesOfErrors]);
  const registry = createRegistry(...files);
  const respond = (request: ServerReflectionRequest): ServerReflectionResponse => {
    const response = create(ServerReflectionResponseSchema, { validHost: request.host, originalRequest: request });
    response.messageResponse = answer(request.messageRequest, services, files, registry);
    return response;
  };
  return {
    v1: {
      async *serverReflectionInfo(requests) {
        for await (const request of requests) {
          yield respond(request);
        }
      },
    },
    v1alpha: {
      async *serverReflectionInfo(requests) {
        for await (const request of requests) {
          // The two have the same wire format: the bytes of one are the other's.
          const same = fromBinary(ServerReflectionRequestSchema, toBinary(AlphaRequestSchema, request));
          yield fromBinary(AlphaResponseSchema, toBinary(ServerReflectionResponseSchema, respond(same)));
        }
      },
    },
  };
}

function answer(
  request: ServerReflectionRequest["messageRequest"],
  services: readonly DescService[],
  files: readonly DescFile[],
  registry: Registry,
): Answer {
  switch (request.case) {
    case "listServices": {
      const service = services
        .map(({ typeName }) => ({ name: typeName }))
        .toSorted((a, b) => (a.name < b.name ? -1 : 1));
      return answerOf({ case: "listServicesResponse", value: { service } });
    }
    case "fileByFilename":
      return fileAnswer(files.find((file) => fileNameOf(file) === request.value));
    case "fileContainingSymbol":
      return fileAnswer(fileOfSymbol(registry, request.value));
    case "fileContainingExtension": {
      const { containingType, extensionNumber } = request.value;
      return fileAnswer(extensionsOf(registry, containingType).find(({ number }) => number === extensionNumber)?.file);
    }
    case "allExtensionNumbersOfType": {
      if (registry.getMessage(request.value) === undefined) return notFound();
      const extensionNumber = extensionsOf(registry, request.value).map(({ number }) => number);
      return answerOf({
        case: "allExtensionNumbersResponse",
        value: { baseTypeName: request.value, extensionNumber },
      });
    }
    case undefined:
      return answerOf({
        case: "errorResponse",
        value: { errorCode: Code.InvalidArgument, errorMessage: "the request asks for nothing" },
      });
  }
}

type AnswerInit = NonNullable<
  Exclude<MessageInitShape<typeof ServerReflectionResponseSchema>, ServerReflectionResponse>["messageResponse"]
>;

function answerOf(init: AnswerInit): Answer {
  return create(ServerReflectionResponseSchema, { messageResponse: init }).messageResponse;
}

/** A file and all that it imports: a client asks once. */
function fileAnswer(file: DescFile | undefined): Answer {
  if (file === undefined) return notFound();
  const fileDescriptorProto = collectFiles([file]).map((part) => toBinary(FileDescriptorProtoSchema, part.proto));
  return answerOf({ case: "fileDescriptorResponse", value: { fileDescriptorProto } });
}

function notFound(): Answer {
  return answerOf({ case: "errorResponse", value: { errorCode: Code.NotFound, errorMessage: "not found" } });
}

/** The files and what they import, each once, those asked for first. */
function collectFiles(roots: readonly DescFile[]): DescFile[] {
  const found = new Map<string, DescFile>();
  const queue = [...roots];
  for (let file = queue.shift(); file !== undefined; file = queue.shift()) {
    if (found.has(file.name)) continue;
    found.set(file.name, file);
    queue.push(...file.dependencies);
  }
  return [...found.values()];
}

/** The runtime leaves the ending out of a file's name. */
function fileNameOf(file: DescFile): string {
  return file.proto.name;
}

/** A symbol is a type or a service, or a part of one: a method, a field, a value. */
function fileOfSymbol(registry: Registry, symbol: string): DescFile | undefined {
  const direct = registry.get(symbol);
  if (direct !== undefined) return direct.file;
  const dot = symbol.lastIndexOf(".");
  if (dot < 0) return undefined;
  const [parentName, name] = [symbol.slice(0, dot), symbol.slice(dot + 1)];
  const parent = registry.get(parentName);
  if (parent === undefined) return undefined;
  switch (parent.kind) {
    case "service":
      return parent.methods.some((method) => method.name === name) ? parent.file : undefined;
    case "message":
      return [...parent.fields, ...parent.oneofs].some((part) => part.name === name) ? parent.file : undefined;
    case "enum":
      return parent.values.some((value) => value.name === name) ? parent.file : undefined;
    case "extension":
      return undefined;
  }
}

function extensionsOf(registry: Registry, typeName: string): DescExtension[] {
  const extendee: DescMessage | undefined = registry.getMessage(typeName);
  return [...registry].filter((desc) => desc.kind === "extension").filter((desc) => desc.extendee === extendee);
}
