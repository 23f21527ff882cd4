/** Watches: a snapshot, then changes, through every break of the connection. */
import type { CallOptions } from "./calls.ts";
import { checkOptions, optionNames } from "./request-check.ts";
import { readResuming, type ResumePolicy } from "./resume.ts";

/** What a watch says. */
export type WatchEvent<T> =
  /** An object as it was when the snapshot was taken. */
  | { readonly type: "snapshot"; readonly value: T }
  /** An object after a change. */
  | { readonly type: "change"; readonly value: T; readonly cursor: string }
  /** Everything up to here was said. The first one ends the snapshot; it comes again from time to time. */
  | { readonly type: "bookmark"; readonly cursor: string }
  /**
   * Forget what was said so far: a new snapshot follows. Happens when a snapshot was cut, or when the watch was
   * away for so long that the server no longer holds what was missed.
   */
  | { readonly type: "reset" };

/** Options of a watch. The signal ends it; it has no deadline. */
export type WatchOptions = Pick<CallOptions, "signal"> & {
  /** Goes on after the event that had this cursor, instead of beginning with a snapshot. Kept for 24 hours. */
  readonly cursor?: string | undefined;
};

/** The options of every watch. */
export const watchNames = optionNames<WatchOptions>({ signal: true, cursor: true });

/** A message of any of the watch methods, as generated. */
type WatchMessage<T> = {
  readonly event:
    | { readonly case: "snapshot" | "change"; readonly value: T }
    | { readonly case: "bookmark"; readonly value: object }
    | { readonly case: undefined; readonly value?: undefined };
  readonly cursor: string;
};

/** Opens a watch method from a cursor; an empty one asks for a snapshot. */
export type OpenWatch<T> = (cursor: string, signal: AbortSignal) => AsyncIterable<WatchMessage<T>>;

/** Watches until the signal is aborted or the loop is left. */
export async function* watch<T>(
  open: OpenWatch<T>,
  policy: ResumePolicy,
  options: WatchOptions,
  names: readonly string[] = watchNames,
): AsyncGenerator<WatchEvent<T>, void, undefined> {
  checkOptions(options, names);
  let cursor = options.cursor ?? "";
  /** Whether something was said that a new snapshot makes void. */
  let said = cursor !== "";
  let mustReset = false;
  const stream = {
    open(signal: AbortSignal) {
      mustReset = cursor === "" && said;
      return open(cursor, signal);
    },
    isComplete: () => false,
    recover(error: { readonly reason: string }) {
      if (error.reason !== "CURSOR_EXPIRED" || cursor === "") return false;
      cursor = "";
      return true;
    },
  };
  for await (const message of readResuming(stream, policy, options.signal)) {
    if (mustReset) {
      mustReset = false;
      yield { type: "reset" };
    }
    said = true;
    if (message.cursor !== "") cursor = message.cursor;
    const { event } = message;
    switch (event.case) {
      case "snapshot":
        yield { type: "snapshot", value: event.value };
        break;
      case "change":
        yield { type: "change", value: event.value, cursor: message.cursor };
        break;
      case "bookmark":
        yield { type: "bookmark", cursor: message.cursor };
        break;
      case undefined:
        // An event that a newer server knows: its cursor counts, its content cannot be shown.
        break;
    }
  }
}
