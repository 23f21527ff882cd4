// What tests of output share: a reader that collects, an agent's words in bytes, and how a refusal is told.
import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { LogStream, type StreamLogsResponseSchema } from "@clodei/proto/gen/clodei/v1/instance_service";
import { DomainError } from "../platform/errors.ts";
import { reasonName } from "../rpc/errors.ts";
import type { LogUpload } from "./scripted-agent.ts";

/** A message of StreamLogs. */
export type Piece = MessageInitShape<typeof StreamLogsResponseSchema>;

/** How long a stream may take to end. */
const patienceMs = 60_000;

/** Reads a stream to its end, in the background. */
export function collect(stream: AsyncIterable<Piece>): { pieces: Piece[]; text(): string; done: Promise<unknown> } {
  const pieces: Piece[] = [];
  const read = async (): Promise<unknown> => {
    try {
      for await (const piece of stream) pieces.push(piece);
      return "ended";
    } catch (error) {
      return error;
    }
  };
  const text = (): string =>
    pieces
      .flatMap(({ event }) => (event?.case === "chunk" ? [Buffer.from(event.value.data ?? []).toString()] : []))
      .join("");
  const late = sleep(patienceMs, new Error("the stream did not end"), { ref: false });
  return { pieces, text, done: Promise.race([read(), late]) };
}

/** Sends a piece of output. */
export function sendText(upload: LogUpload, offset: number, text: string, stream: LogStream = LogStream.STDOUT): void {
  upload.send({ case: "chunk", value: { attempt: 1, stream, offset: BigInt(offset), data: Buffer.from(text) } });
}

/** Sees that an outcome is an error with this reason. */
export function assertReason(error: unknown, reason: ErrorReason): DomainError {
  assert.ok(error instanceof DomainError, String(error));
  assert.equal(reasonName(error.reason), reasonName(reason));
  return error;
}
