// The baseline of the streams: a bare grpc-js server behind the same TLS that decodes the session's messages, answers
// Hello with a Welcome and each heartbeat with an Ack, and does nothing else: no validation, no database, no limits, no
// keepalive. Its parameter is the data folder of the control plane whose CA it shows; it prints its port.
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { durationFromMs, timestampNow } from "@bufbuild/protobuf/wkt";
import { type ServerDuplexStream, Server } from "@grpc/grpc-js";
import {
  AckSchema,
  NodeLinkService,
  type SessionRequest,
  SessionRequestSchema,
  type SessionResponse,
  SessionResponseSchema,
  WelcomeSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ListenerCredentials } from "../../control-plane/src/dispatch/credentials.ts";
import { openAuthority } from "../../control-plane/src/nodes/authority-store.ts";

const [dataFolder = ""] = process.argv.slice(2);
const now = new Date();
const source = { folder: join(dataFolder, "ca"), files: undefined, trustDomain: "clodei.com" };
const authority = await openAuthority(source, now);
const certificate = await authority.issueListenerCertificate(["localhost"], now);
const credentials = new ListenerCredentials({ ...certificate, clientCaPem: authority.certificatePem });

function answerTo({ message }: SessionRequest): SessionResponse["message"] {
  if (message.case === "heartbeat")
    return { case: "ack", value: create(AckSchema, { heartbeatSequence: message.value.sequence }) };
  const welcome = create(WelcomeSchema, {
    sessionId: "echo",
    sessionSecret: randomBytes(32),
    heartbeatInterval: durationFromMs(10_000),
    lease: durationFromMs(30_000),
    serverTime: timestampNow(),
  });
  return { case: "welcome", value: welcome };
}

const server = new Server({ "grpc.max_concurrent_streams": 100, "grpc.enable_channelz": 0 });
const session = {
  path: `/${NodeLinkService.typeName}/Session`,
  requestStream: true,
  responseStream: true,
  requestSerialize: (message: SessionRequest) => Buffer.from(toBinary(SessionRequestSchema, message)),
  requestDeserialize: (bytes: Buffer) => fromBinary(SessionRequestSchema, bytes),
  responseSerialize: (message: SessionResponse) => Buffer.from(toBinary(SessionResponseSchema, message)),
  responseDeserialize: (bytes: Buffer) => fromBinary(SessionResponseSchema, bytes),
};
server.addService(
  { session },
  {
    session: (stream: ServerDuplexStream<SessionRequest, SessionResponse>) => {
      stream.on("data", (request: SessionRequest) => {
        stream.write(create(SessionResponseSchema, { message: answerTo(request) }));
      });
      stream.on("error", () => undefined);
      stream.on("end", () => stream.end());
    },
  },
);
server.bindAsync("127.0.0.1:0", credentials, (error, port) => {
  if (error !== null) throw error;
  console.log(JSON.stringify({ port }));
});
