// The rules of the node link, without I/O: which of two sessions is the node, how far a journal is committed, and
// where a log stream goes on. Time is an argument.
import { create } from "@bufbuild/protobuf";
import {
  LogPositionSchema,
  type LogChunk,
  type LogGap,
  type LogPosition,
  type LogStream,
} from "@clodei/proto/gen/clodei/v1/instance_service";

/** A node's session as the database knows it. Secrets are hashes throughout. */
export type SessionRecord = {
  readonly sessionId: string;
  readonly secretHash: Buffer;
  /** What the agent showed when this session began. Set until the session's own secret was shown to have arrived. */
  readonly previousSecretHash: Buffer | undefined;
  readonly heartbeatTime: Date;
  readonly endTime: Date | undefined;
};

/** What becomes of a Hello: it takes the node's session, or the older session is asked whether it is there. */
export type HelloDecision = "take" | "probe";

/**
 * Decides between a Hello and the session that stands.
 *
 * The secret of the session before is good as well until the session has sent a heartbeat: an agent that died
 * between Welcome and its disk shows the old one, and is no clone.
 */
export function decideHello(
  standing: SessionRecord | undefined,
  shownSecretHash: Buffer,
  now: Date,
  leaseMs: number,
): HelloDecision {
  if (standing === undefined || standing.endTime !== undefined) return "take";
  if (standing.secretHash.equals(shownSecretHash)) return "take";
  if (standing.previousSecretHash?.equals(shownSecretHash) === true) return "take";
  // Nothing was heard for a lease: there is nobody left to ask.
  return now.getTime() - standing.heartbeatTime.getTime() > leaseMs ? "take" : "probe";
}

/** The part of a report that may be applied now. */
export type ReportPlan<E> = {
  /** Entries right after the watermark, in order and without a hole. */
  readonly apply: readonly E[];
  /** The journal's position once they are committed. */
  readonly watermark: bigint;
  /** Entries that were committed before. */
  readonly replayed: number;
  /** Whether entries stand beyond a hole: they are left, and come again after the acknowledgement says where we are. */
  readonly gap: boolean;
};

/** Cuts a report to what continues the journal. */
export function planReport<E extends { readonly sequence: bigint }>(
  watermark: bigint,
  entries: readonly E[],
): ReportPlan<E> {
  const apply: E[] = [];
  let position = watermark;
  let replayed = 0;
  for (const entry of entries) {
    if (entry.sequence <= position) {
      replayed += 1;
    } else if (entry.sequence === position + 1n) {
      apply.push(entry);
      position = entry.sequence;
    } else {
      return { apply, watermark: position, replayed, gap: true };
    }
  }
  return { apply, watermark: position, replayed, gap: false };
}

/**
 * How far each stream of an attempt has been handed to the reader. What comes again after a broken link is cut off
 * here, so that the reader gets every byte once.
 */
export class LogCursor {
  readonly #offsets = new Map<LogStream, bigint>();
  readonly #isPartial: boolean;
  /** When the engine read the first chunk that was handed over. */
  #firstTimeNs: bigint | undefined;
  #isAgain = false;
  /** Where a loss of unknown length was told last, in each stream. */
  readonly #toldLosses = new Map<LogStream, bigint>();

  /** @param isPartial the reader asked for the last lines, or for what came after a time. */
  constructor(positions: readonly LogPosition[], isPartial = false) {
    for (const position of positions) this.#offsets.set(position.stream, position.offset);
    this.#isPartial = isPartial && positions.length === 0;
  }

  /** Where to go on, once something was handed over. Empty at the beginning. */
  positions(): LogPosition[] {
    return [...this.#offsets].map(([stream, offset]) => create(LogPositionSchema, { stream, offset }));
  }

  /**
   * The stream is opened again. An agent that goes on after positions begins a stream without one at its start, which
   * a reader of the last lines did not ask for: what is older than the first chunk of the other stream is left out.
   */
  again(): void {
    this.#isAgain = this.#isPartial && this.#offsets.size > 0;
  }

  /** The part of a chunk that the reader does not have, or undefined. Notes it as handed over. */
  takeChunk(chunk: LogChunk): LogChunk | undefined {
    const timeNs =
      chunk.time === undefined ? undefined : chunk.time.seconds * 1_000_000_000n + BigInt(chunk.time.nanos);
    const known = this.#offsets.get(chunk.stream);
    const from = known ?? chunk.offset;
    const end = chunk.offset + BigInt(chunk.data.length);
    if (known === undefined && this.#isAgain && timeNs !== undefined && timeNs < (this.#firstTimeNs ?? 0n)) {
      // Not noted as a position: the next chunk of the stream is judged by its own time.
      return undefined;
    }
    if (end <= from) return undefined;
    this.#offsets.set(chunk.stream, end);
    this.#firstTimeNs ??= timeNs;
    if (chunk.offset >= from) return chunk;
    return { ...chunk, offset: from, data: chunk.data.subarray(Number(from - chunk.offset)) };
  }

  /** The part of a gap that the reader has not passed, or undefined. Notes it as passed. */
  takeGap(gap: LogGap): LogGap | undefined {
    const known = this.#offsets.get(gap.stream);
    if (known === undefined && this.#isAgain) return undefined;
    const from = known ?? gap.offset;
    if (gap.lengthBytes === 0n) {
      // A loss of unknown length: it moves nothing, and is told once.
      if (gap.offset < from || this.#toldLosses.get(gap.stream) === gap.offset) return undefined;
      this.#toldLosses.set(gap.stream, gap.offset);
      return gap;
    }
    const end = gap.offset + gap.lengthBytes;
    if (end <= from) return undefined;
    this.#offsets.set(gap.stream, end);
    if (gap.offset >= from) return gap;
    return { ...gap, offset: from, lengthBytes: end - from };
  }
}

/** A time from zero up to this one, so that many agents do not come back at once. */
export function jitterMs(uptoMs: number, random: () => number = Math.random): number {
  return Math.floor(random() * uptoMs);
}
