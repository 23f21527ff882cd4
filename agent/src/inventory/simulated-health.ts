// How a simulated GPU falls ill: by a file, which is read again with each inventory.
import { readFile } from "node:fs/promises";

/** More than any tool says of one GPU. */
const maxWordsCharacters = 512;

/**
 * Reads which simulated GPUs are ill, and why, by index. A file that is not there makes none ill.
 *
 * @throws Error that says what is wrong with the file.
 * @example the file {"1": "GPU is lost"} gives a map of 1 to "simulated: GPU is lost"
 */
export async function readSimulatedHealth(path: string): Promise<ReadonlyMap<number, string>> {
  let parsed: unknown;
  try {
    parsed = JSON.parse(await readFile(path, "utf8"));
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return new Map();
    throw new Error(`simulated: ${path} cannot be read as JSON`, { cause: error });
  }
  if (typeof parsed !== "object" || parsed === null || Array.isArray(parsed)) {
    throw new Error(`simulated: ${path} holds no object`);
  }
  return new Map(
    Object.entries(parsed).map(([index, words]: [string, unknown]) => [
      Number(index),
      // Whoever reads it anywhere must not take it for a real GPU's.
      `simulated: ${typeof words === "string" ? words.slice(0, maxWordsCharacters) : "ill"}`,
    ]),
  );
}
