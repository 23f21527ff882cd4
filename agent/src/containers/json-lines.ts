// Reads one JSON value a line from an answer of the engine. By the stream's own iterator: node:readline takes a
// connection that broke for an answer that ended, or waits for ever.
/** Docker's lines are some hundred bytes; nothing that is longer than this is one. */
const maxLineCharacters = 1024 * 1024;

/** Throws when the connection breaks, when a line is no JSON, and when one is without end. */
export async function* jsonLines(stream: AsyncIterable<Buffer>): AsyncGenerator {
  let rest = "";
  const decoder = new TextDecoder();
  for await (const part of stream) {
    const lines = (rest + decoder.decode(part, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    if (rest.length > maxLineCharacters) throw new Error("the container engine sends a line without end");
    for (const line of lines) if (line.trim() !== "") yield JSON.parse(line) as unknown;
  }
  if (rest.trim() !== "") yield JSON.parse(rest) as unknown;
}
