/** The last line of tools/test/events.mjs. */
export type EndEvent = { readonly type: "end" };

/** Another line of tools/test/events.mjs. */
export type TestEvent = {
  readonly type: "dequeue" | "pass" | "fail";
  readonly name: string;
  readonly nesting: number;
  readonly file?: string;
  readonly line?: number;
  readonly column?: number;
  readonly isSuite: boolean;
  readonly durationMs?: number;
  /** Why it failed, in node:test's words, such as `subtestsFailed`. */
  readonly failure?: string;
  readonly error?: string;
  readonly skip?: string | boolean;
  readonly todo?: string | boolean;
};

/** A test that failed, or a failure of a file as a whole. */
export type Failure = { readonly name: string; readonly place: string | undefined; readonly text: string };

/** What one file came to. */
export type FileResult = {
  readonly file: string;
  readonly passed: number;
  readonly failures: readonly Failure[];
  readonly skipped: readonly { readonly name: string; readonly reason: string }[];
  /** The end of what it printed. */
  readonly printed: string;
  readonly durationMs: number;
};
