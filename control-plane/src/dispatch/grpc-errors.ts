// Errors as gRPC's unary and upload calls carry them: the code and the details of rpc/errors.ts, which all listeners share.
import { setTrailerStatus } from "@connectrpc/connect/protocol-grpc";
import { Metadata, type ServerErrorResponse } from "@grpc/grpc-js";
import { randomUUID } from "node:crypto";
import { toConnectError } from "../rpc/errors.ts";

const detailsTrailer = "grpc-status-details-bin";

/** Turns any error into what grpc-js sends. */
export function toGrpcError(error: unknown, requestId: string = randomUUID()): ServerErrorResponse {
  const told = toConnectError(error, requestId);
  const metadata = new Metadata();
  const details = setTrailerStatus(new Headers(), told).get(detailsTrailer);
  if (details !== null) metadata.set(detailsTrailer, Buffer.from(details, "base64"));
  // Connect's codes are gRPC's.
  const code: number = told.code;
  return Object.assign(new Error(told.rawMessage), { code, details: told.rawMessage, metadata });
}
