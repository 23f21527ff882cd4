// DescService of protobuf-es → service of @grpc/grpc-js. Messages go in checked (a broken one reaches the handler
// as a violation, so that the session can say Goodbye) and out encoded, so that a queue can count their bytes.
import { toBinary, type DescMessage, type DescMethod, type DescService, type MessageShape } from "@bufbuild/protobuf";
import type {
  handleBidiStreamingCall,
  handleClientStreamingCall,
  handleServerStreamingCall,
  handleUnaryCall,
  MethodDefinition,
  Server,
} from "@grpc/grpc-js";
import type { MessageCheck, Received } from "./incoming.ts";

/** A message as it goes over the wire. */
export type Encoded<D extends DescMessage> = Buffer & { readonly __schema?: D };

/** Encodes a message for the wire. */
export function encodeMessage<D extends DescMessage>(schema: D, message: MessageShape<D>): Encoded<D> {
  const bytes = toBinary(schema, message);
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

type HandlerOf<M extends DescMethod> = M["methodKind"] extends "unary"
  ? handleUnaryCall<Received<M["input"]>, Encoded<M["output"]>>
  : M["methodKind"] extends "client_streaming"
    ? handleClientStreamingCall<Received<M["input"]>, Encoded<M["output"]>>
    : M["methodKind"] extends "server_streaming"
      ? handleServerStreamingCall<Received<M["input"]>, Encoded<M["output"]>>
      : handleBidiStreamingCall<Received<M["input"]>, Encoded<M["output"]>>;

/** A handler for every method of the service. */
export type GrpcHandlers<S extends DescService> = { readonly [K in keyof S["method"]]: HandlerOf<S["method"][K]> };

/** Registers a service. Every method has a handler, or this does not compile. */
export function addGrpcService<S extends DescService>(
  server: Server,
  service: S,
  handlers: GrpcHandlers<S>,
  check: MessageCheck,
): void {
  const definition: Record<string, MethodDefinition<unknown, Buffer>> = {};
  for (const method of service.methods) {
    definition[method.localName] = {
      path: `/${service.typeName}/${method.name}`,
      requestStream: method.methodKind === "client_streaming" || method.methodKind === "bidi_streaming",
      responseStream: method.methodKind === "server_streaming" || method.methodKind === "bidi_streaming",
      requestSerialize: () => {
        throw new Error("a server sends no requests");
      },
      requestDeserialize: (bytes: Buffer) => check(method.input, bytes),
      responseSerialize: (bytes: Buffer) => bytes,
      responseDeserialize: () => {
        throw new Error("a server receives no responses");
      },
    };
  }
  server.addService(definition, handlers);
}
