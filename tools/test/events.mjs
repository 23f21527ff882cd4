// A reporter of node:test that writes what happens in one test file as JSON lines, for tools/test/main.ts to read.
// Plain JavaScript and no dependency: every test file's process loads it.
import { inspect } from "node:util";

/** Errors carry their causes; one that is larger than this says nothing more to a person. */
const maxErrorCharacters = 20_000;

function textOf(error) {
  // node:test wraps what was thrown.
  const cause = error?.code === "ERR_TEST_FAILURE" ? (error.cause ?? error) : error;
  const text = typeof cause === "string" ? cause : inspect(cause, { depth: 6, colors: false });
  return text.slice(0, maxErrorCharacters);
}

/** @param {AsyncIterable<{type: string, data: any}>} source */
export default async function* events(source) {
  for await (const { type, data } of source) {
    if (type !== "test:dequeue" && type !== "test:pass" && type !== "test:fail") continue;
    yield `${JSON.stringify({
      type: type.slice("test:".length),
      name: data.name,
      nesting: data.nesting,
      file: data.file,
      line: data.line,
      column: data.column,
      isSuite: data.details?.type === "suite",
      durationMs: data.details?.duration_ms,
      failure: data.details?.error?.failureType,
      error: data.details?.error === undefined ? undefined : textOf(data.details.error),
      skip: data.skip,
      todo: data.todo,
    })}\n`;
  }
  // Without this line, the process ended before its tests did.
  yield `${JSON.stringify({ type: "end" })}\n`;
}
