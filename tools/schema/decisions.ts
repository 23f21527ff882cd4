// The decision records about the schema: docs/decisions/NNNN-schema-NAME.md. The newest names the image it accepted.
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

/** Where decision records stand. */
export const decisionsFolder = "docs/decisions";
const recordName = /^(\d{4})-[a-z0-9-]+\.md$/u;
const schemaRecordName = /^\d{4}-schema-[a-z0-9-]+\.md$/u;
const imageLine = /^Image: sha256 ([0-9a-f]{64})$/mu;

/** The newest record about the schema and the image digest that it names, if any. */
export function newestSchemaRecord(root: string): { file: string; digest: string | undefined } | undefined {
  const newest = readdirSync(join(root, decisionsFolder))
    .filter((name) => schemaRecordName.test(name))
    .sort()
    .at(-1);
  if (newest === undefined) return undefined;
  const file = `${decisionsFolder}/${newest}`;
  return { file, digest: imageLine.exec(readFileSync(join(root, file), "utf8"))?.[1] };
}

/** The number that the next record gets. */
export function nextRecordNumber(root: string): string {
  const numbers = readdirSync(join(root, decisionsFolder)).map((name) => Number(recordName.exec(name)?.[1] ?? 0));
  return String(Math.max(0, ...numbers) + 1).padStart(4, "0");
}
