// docs/configuration.md, generated from the tables that the two programs read their settings by.
import { agentSettings } from "../../agent/src/config.ts";
import { controlPlaneSettings } from "../../control-plane/src/config.ts";

/** The document, relative to the checkout. */
export const configurationDocument = "docs/configuration.md";

/** A setting as both programs tell theirs. */
interface DocumentedSetting {
  /** None where a command line must not carry it. */
  readonly flag: string | undefined;
  readonly variable: string | undefined;
  readonly fallback: string | undefined;
  readonly help: string;
}

function rowOf({ flag, variable, fallback, help }: DocumentedSetting): string {
  const code = (text: string | undefined): string => (text === undefined || text === "" ? "" : `\`${text}\``);
  // A list of many has a place to break.
  const value = code(fallback?.replaceAll(",", ", "));
  return `| ${code(variable)} | ${code(flag)} | ${value} | ${help.replaceAll("|", String.raw`\|`)} |`;
}

function tableOf(settings: readonly DocumentedSetting[]): string[] {
  return ["| variable | flag | default | what it is |", "|---|---|---|---|", ...settings.map(rowOf)];
}

/** The text of docs/configuration.md. */
export function configurationDocumentText(): string {
  return [
    "# Configuration",
    "",
    "A flag wins over its variable. Everybody on the machine sees command lines: give secrets by variables or files. A value",
    "that cannot be used stops the start, with its name and what is allowed; all such values at once. `--help` of each",
    "program says the same as this file, which is generated from `control-plane/src/config.ts` and `agent/src/config.ts` by",
    "`npm run generate`.",
    "",
    "## Control plane",
    "",
    ...tableOf(controlPlaneSettings()),
    "",
    "## Agent",
    "",
    ...tableOf(agentSettings()),
    "",
  ].join("\n");
}
