// The README shows sdk/examples/first-instance.ts word for word, between two markers.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

/** The program that the README shows; a test runs it. */
export const examplePath = "sdk/examples/first-instance.ts";
const marker = `<!-- ${examplePath} -->`;
const block = new RegExp(`${marker}\\n\`\`\`ts\\n(?<program>[^]*?)\`\`\`\\n`, "u");

/** The README with the program as it stands now. */
export function withExample(readme: string, program: string): string {
  if (!block.test(readme)) throw new Error(`README.md has no "${marker}" followed by a block of ts`);
  return readme.replace(block, () => `${marker}\n\`\`\`ts\n${program}\`\`\`\n`);
}

/** What is wrong with the README's program, if anything. */
export function exampleProblem(root: string): string | undefined {
  for (const file of ["README.md", examplePath]) {
    if (!existsSync(join(root, file))) return `${file} is missing`;
  }
  const readme = readFileSync(join(root, "README.md"), "utf8");
  const shown = block.exec(readme)?.groups?.["program"];
  if (shown === undefined) return `README.md has no "${marker}" followed by a block of ts`;
  if (shown === readFileSync(join(root, examplePath), "utf8")) return undefined;
  return `README.md shows another program than ${examplePath}: npm run generate`;
}
