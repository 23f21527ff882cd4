// `npm run generate`: writes again what is generated, and accepts additions to the schema.
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { packageProgram, runTool } from "../check/run-tool.ts";
import { configurationDocument, configurationDocumentText } from "../docs/configuration.ts";
import { errorsDocument, errorsDocumentOf } from "../docs/errors.ts";
import { examplePath, withExample } from "../docs/readme.ts";
import { decisionsFolder, nextRecordNumber } from "../schema/decisions.ts";
import {
  buildCommentedImage,
  buildImage,
  formatSchema,
  generateCode,
  imagePath,
  prepareSchema,
  sha256Of,
} from "../schema/schema.ts";

const help = `usage: npm run generate [-- --accept-schema "WHY"]

Formats the schemas and writes again what is generated: proto/gen, docs/errors.md, docs/configuration.md, the program in
README.md.

  --accept-schema WHY   also makes the present schema the one that later changes are compared with:
                        refuses a breaking change, writes proto/image.binpb, and adds a decision
                        record docs/decisions/NNNN-schema-....md that tells WHY and names the image`;

async function acceptSchema(root: string, why: string): Promise<void> {
  const image = join(root, imagePath);
  if (existsSync(image)) {
    const parameters = ["breaking", "proto/schema", "--against", imagePath];
    const { ok, output } = await runTool(root, packageProgram(root, "buf"), parameters);
    if (!ok) throw new Error(`this change breaks clients, and so needs a new package version:\n${output}`);
  }
  await buildImage(root, image);
  const digest = sha256Of(readFileSync(image));
  const words = why
    .toLowerCase()
    .replaceAll(/[^a-z0-9]+/gu, "-")
    .split("-")
    .filter((word) => word !== "");
  const number = nextRecordNumber(root);
  const name = `${number}-schema-${words.slice(0, 6).join("-")}.md`;
  const text = [`# ${Number(number)}. Schema: ${why}`, "", `Image: sha256 ${digest}`, ""];
  writeFileSync(join(root, decisionsFolder, name), text.join("\n"));
  console.log(`accepted: ${imagePath}, and ${decisionsFolder}/${name} (say more there)`);
}

async function generate(root: string, why: string | undefined): Promise<void> {
  prepareSchema(root);
  await formatSchema(root);
  await generateCode(root, root);
  console.log("written: proto/gen");
  const folder = mkdtempSync(join(tmpdir(), "clodei-generate-"));
  try {
    const image = join(folder, "commented.binpb");
    await buildCommentedImage(root, image);
    writeFileSync(join(root, errorsDocument), errorsDocumentOf(image));
    console.log(`written: ${errorsDocument}`);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  writeFileSync(join(root, configurationDocument), configurationDocumentText());
  console.log(`written: ${configurationDocument}`);
  const readme = join(root, "README.md");
  writeFileSync(readme, withExample(readFileSync(readme, "utf8"), readFileSync(join(root, examplePath), "utf8")));
  console.log("written: the program in README.md");
  if (why !== undefined) await acceptSchema(root, why);
}

const { values } = parseArgs({
  options: { help: { type: "boolean", short: "h" }, "accept-schema": { type: "string" } },
});
if (values.help === true) console.log(help);
else await generate(dirname(dirname(import.meta.dirname)), values["accept-schema"]);
