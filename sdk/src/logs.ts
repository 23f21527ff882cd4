/** An attempt's output, exactly once: through every break of the connection, by byte positions. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type LogChunk as LogChunkMessage,
  type LogGap,
  LogStream,
  type StreamLogsRequestSchema,
  type StreamLogsResponse,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import type { CallOptions } from "./calls.ts";
import { checkOptions, optionNames, unwritable } from "./request-check.ts";
import { readResuming, type ResumePolicy } from "./resume.ts";

/** Which output is read. */
export type LogOptions = Pick<CallOptions, "signal"> & {
  /** Stay, and yield what comes, until the attempt ends. True where absent. */
  readonly follow?: boolean | undefined;
  /** Only the last so many lines of what is there. All where absent. */
  readonly tailLines?: number | undefined;
  /** Only what was written at or after this time. */
  readonly since?: Date | undefined;
  /** The attempt. The current one where absent. */
  readonly attempt?: number | undefined;
};

const logNames = optionNames<LogOptions>({ signal: true, follow: true, tailLines: true, since: true, attempt: true });

/** A piece of output: whole lines, or pieces of a line that is longer than 16 KiB. */
export type LogChunk = {
  readonly stream: "stdout" | "stderr";
  /** The bytes as the container wrote them. Empty in a chunk that only tells of missing ones. */
  readonly data: Uint8Array;
  /** The same as text. A character that is cut at the chunk's end comes with the next chunk of the stream. */
  readonly text: string;
  /** When the node read the data from the container. Absent in a chunk that only tells of missing bytes. */
  readonly time: Date | undefined;
  readonly attempt: number;
  /** Bytes of this stream before the data, counted from the attempt's start. */
  readonly offset: bigint;
  /** Bytes of this stream that are gone right before the data, because the attempt wrote more than a node keeps. */
  readonly missingBytes: bigint;
};

/** A line of output, without its line break. */
export type LogLine = {
  readonly stream: "stdout" | "stderr";
  readonly text: string;
  readonly time: Date | undefined;
  readonly attempt: number;
};

/** Opens StreamLogs. */
export type OpenLogs = (
  request: MessageInitShape<typeof StreamLogsRequestSchema>,
  signal: AbortSignal,
) => AsyncIterable<StreamLogsResponse>;

/**
 * An attempt's output. Iterating yields chunks; `lines()` and `text()` are the shorter ways. Every iteration
 * reads anew.
 *
 * @example
 * for await (const chunk of instance.logs()) process.stdout.write(chunk.data);
 */
export class InstanceLogs implements AsyncIterable<LogChunk> {
  readonly #open: OpenLogs;
  readonly #policy: ResumePolicy;
  readonly #instanceId: string;
  readonly #options: LogOptions;

  constructor(open: OpenLogs, policy: ResumePolicy, instanceId: string, options: LogOptions) {
    this.#open = open;
    this.#policy = policy;
    this.#instanceId = instanceId;
    this.#options = options;
  }

  /** The chunks. Leaving the loop ends the stream. */
  async *[Symbol.asyncIterator](): AsyncGenerator<LogChunk, void, undefined> {
    checkOptions(this.#options, logNames);
    const reader = new LogReader(this.#instanceId, this.#options);
    const stream = {
      open: (signal: AbortSignal) => this.#open(reader.request(), signal),
      isComplete: () => reader.ended || this.#options.follow === false,
    };
    for await (const message of readResuming(stream, this.#policy, this.#options.signal)) {
      yield* reader.take(message);
      if (reader.ended) return;
    }
  }

  /**
   * The lines of both streams. A last line without a line break is yielded when the output ends.
   *
   * @example for await (const line of instance.logs().lines()) console.log(line.stream, line.text);
   */
  async *lines(): AsyncGenerator<LogLine, void, undefined> {
    const open = new Map<LogChunk["stream"], LogLine>();
    for await (const { stream, text, time, attempt } of this) {
      const parts = text.split("\n");
      const last = parts.pop() ?? "";
      for (const part of parts) {
        yield { stream, text: (open.get(stream)?.text ?? "") + part, time, attempt };
        open.delete(stream);
      }
      if (last !== "") open.set(stream, { stream, text: (open.get(stream)?.text ?? "") + last, time, attempt });
    }
    yield* open.values();
  }

  /**
   * The whole output as one text, both streams in the order of arrival. A node keeps at most 64 MiB an attempt.
   *
   * @example console.log(await instance.logs().text());
   */
  async text(): Promise<string> {
    let text = "";
    for await (const chunk of this) text += chunk.text;
    return text;
  }
}

/** One stream's place and the characters that its last chunk left incomplete. */
type StreamState = { next: bigint; readonly decoder: TextDecoder };

/** Where a read stands. Turns messages into chunks, each byte once. */
class LogReader {
  readonly #instanceId: string;
  readonly #options: LogOptions;
  readonly #streams = new Map<LogStream, StreamState>();
  #attempt: number;
  #newestMs = Number.NEGATIVE_INFINITY;
  #reopened = false;
  ended = false;

  constructor(instanceId: string, options: LogOptions) {
    this.#instanceId = instanceId;
    this.#options = options;
    this.#attempt = options.attempt ?? 0;
  }

  /** Asks for what is missing. */
  request(): MessageInitShape<typeof StreamLogsRequestSchema> {
    const { follow = true, tailLines, since } = this.#options;
    const base = { instanceId: this.#instanceId, attempt: this.#attempt, follow };
    const positions = [...this.#streams].map(([stream, state]) => ({ stream, offset: state.next }));
    if (positions.length > 0) {
      this.#reopened = true;
      return { ...base, positions };
    }
    return {
      ...base,
      ...(tailLines === undefined ? {} : { tailLines }),
      ...(since === undefined ? {} : { sinceTime: isTime(since) ? timestampFromDate(since) : unwritable(since) }),
    };
  }

  *take(message: StreamLogsResponse): Generator<LogChunk, void, undefined> {
    const { event } = message;
    switch (event.case) {
      case "chunk":
        yield* this.#takeChunk(event.value);
        break;
      case "gap":
        yield* this.#takeGap(event.value);
        break;
      case "end":
        this.ended = true;
        break;
      case undefined:
        break;
    }
  }

  *#takeChunk(chunk: LogChunkMessage): Generator<LogChunk, void, undefined> {
    const time = chunk.time === undefined ? undefined : timestampDate(chunk.time);
    const known = this.#streams.get(chunk.stream);
    if (known === undefined && this.#isBeforeTheRead(time)) return;
    const state = known ?? this.#begin(chunk.stream, this.#isPartial ? chunk.offset : 0n);
    const end = chunk.offset + BigInt(chunk.data.length);
    // Seen before: an answer may overlap with what was received before a cut.
    if (end <= state.next) return;
    const data = chunk.offset < state.next ? chunk.data.subarray(Number(state.next - chunk.offset)) : chunk.data;
    const offset = end - BigInt(data.length);
    const missingBytes = offset - state.next;
    const text = state.decoder.decode(data, { stream: true });
    state.next = end;
    this.#attempt = chunk.attempt;
    if (time !== undefined) this.#newestMs = Math.max(this.#newestMs, time.getTime());
    yield { stream: nameOfStream(chunk.stream), data, text, time, attempt: chunk.attempt, offset, missingBytes };
  }

  *#takeGap(gap: LogGap): Generator<LogChunk, void, undefined> {
    const end = gap.offset + gap.lengthBytes;
    const state = this.#streams.get(gap.stream) ?? this.#begin(gap.stream, this.#isPartial ? end : 0n);
    const missingBytes = end - state.next;
    if (missingBytes <= 0n) return;
    state.next = end;
    this.#attempt = gap.attempt;
    const stream = nameOfStream(gap.stream);
    yield {
      stream,
      data: new Uint8Array(),
      text: "",
      time: undefined,
      attempt: gap.attempt,
      offset: end,
      missingBytes,
    };
  }

  /** Asked for the tail or the newest only, nobody misses what came before. */
  get #isPartial(): boolean {
    return this.#options.tailLines !== undefined || this.#options.since !== undefined;
  }

  #begin(stream: LogStream, offset: bigint): StreamState {
    const state = { next: offset, decoder: new TextDecoder() };
    this.#streams.set(stream, state);
    return state;
  }

  /**
   * After a cut, a stream of which nothing was received has no position, so the server sends it from its
   * start. What is older than the newest chunk received was outside the tail, or before `since`.
   */
  #isBeforeTheRead(time: Date | undefined): boolean {
    if (!this.#reopened || !this.#isPartial || time === undefined) return false;
    const { tailLines, since } = this.#options;
    const newestMs = tailLines === undefined ? Number.NEGATIVE_INFINITY : this.#newestMs;
    return time.getTime() < Math.max(newestMs, since?.getTime() ?? Number.NEGATIVE_INFINITY);
  }
}

function nameOfStream(stream: LogStream): "stdout" | "stderr" {
  return stream === LogStream.STDERR ? "stderr" : "stdout";
}

function isTime(date: Date): boolean {
  return date instanceof Date && !Number.isNaN(date.getTime());
}
