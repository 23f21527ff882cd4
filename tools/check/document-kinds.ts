// Kinds about what a reader relies on: the lock file, and documents that are generated or that quote code.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { configurationDocument, configurationDocumentText } from "../docs/configuration.ts";
import { errorsDocument, errorsDocumentOf } from "../docs/errors.ts";
import { exampleProblem } from "../docs/readme.ts";
import { buildCommentedImage } from "../schema/schema.ts";
import type { CheckContext, Kind, Outcome } from "./kind.ts";
import { runTool } from "./run-tool.ts";

/** Markdown links to files of ours: no scheme, no fragment of the same page. */
const relativeLink = /\]\((?![a-z]+:|#)([^)\s#]+)(?:#[^)]*)?\)/gu;

async function checkLock({ root }: CheckContext): Promise<Outcome> {
  const { ok, output } = await runTool(root, process.execPath, ["tools/setup/complete-lock.mjs", "--check"]);
  return ok ? { ok } : { ok, output };
}

function markdownFiles(root: string): string[] {
  const folders = ["docs", "control-plane/src", "agent/src", "sdk", "proto/src", "test", "tools"];
  const found = folders
    .filter((folder) => existsSync(join(root, folder)))
    .flatMap((folder) =>
      readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
        .filter((name) => name.endsWith(".md") && !name.includes("node_modules"))
        .map((name) => join(folder, name)),
    );
  return ["README.md", ...found].filter((file) => existsSync(join(root, file)));
}

function brokenLinks(root: string): string[] {
  return markdownFiles(root).flatMap((file) =>
    [...readFileSync(join(root, file), "utf8").matchAll(relativeLink)]
      .map((match) => match[1] ?? "")
      .filter((target) => !existsSync(join(root, normalize(join(dirname(file), target)))))
      .map((target) => `${file} links to ${target}, which is not there`),
  );
}

async function checkDocuments({ root, temporaryFolder }: CheckContext): Promise<Outcome> {
  const image = join(temporaryFolder, "commented.binpb");
  await buildCommentedImage(root, image);
  const problems = brokenLinks(root);
  const generated = [
    [errorsDocument, errorsDocumentOf(image)],
    [configurationDocument, configurationDocumentText()],
  ] as const;
  for (const [file, text] of generated) {
    const committed = existsSync(join(root, file)) ? readFileSync(join(root, file), "utf8") : "";
    if (committed !== text) problems.push(`${file} is stale: npm run generate`);
  }
  const example = exampleProblem(root);
  if (example !== undefined) problems.push(example);
  return problems.length === 0 ? { ok: true } : { ok: false, output: problems.join("\n") };
}

/** The kinds about the lock file and documents, in the order in which they are printed. */
export const documentKinds: readonly Kind[] = [
  {
    name: "lock",
    what: "package-lock.json is complete for every platform and agrees with package.json",
    run: checkLock,
  },
  {
    name: "documents",
    what: "generated documents are fresh, links lead somewhere, quoted programs are real",
    run: checkDocuments,
  },
];
