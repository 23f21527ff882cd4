import { readdirSync } from "node:fs";
import { join } from "node:path";

/** A test file and how it may be run. */
export type TestFile = {
  readonly path: string;
  /** Kills, cuts off or starts whole systems: runs alone. */
  readonly isHeavy: boolean;
};

const folders = ["proto", "control-plane", "agent", "sdk", "tools", "test"];
const heavyFolders = ["test/faults/", "test/invariants/", "test/system/", "tools/start/"];
const ignoredFolders = new Set(["node_modules", "dist", "gen"]);

function filesBelow(root: string, folder: string): string[] {
  return readdirSync(join(root, folder), { withFileTypes: true })
    .toSorted((left, right) => (left.name < right.name ? -1 : 1))
    .flatMap((entry) => {
      if (entry.isDirectory()) return ignoredFolders.has(entry.name) ? [] : filesBelow(root, `${folder}/${entry.name}`);
      return entry.name.endsWith(".test.ts") ? [`${folder}/${entry.name}`] : [];
    });
}

/** All test files whose path matches one of the patterns, or all where there is none; light ones first. */
export function findTestFiles(root: string, patterns: readonly RegExp[]): TestFile[] {
  const files = folders
    .flatMap((folder) => filesBelow(root, folder))
    .filter((path) => patterns.length === 0 || patterns.some((pattern) => pattern.test(path)))
    .map((path) => ({ path, isHeavy: heavyFolders.some((folder) => path.startsWith(folder)) }));
  return [...files.filter(({ isHeavy }) => !isHeavy), ...files.filter(({ isHeavy }) => isHeavy)];
}
