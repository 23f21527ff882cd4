// Kinds about code: types, lint, format, who imports whom, and what nobody uses.
import type { CheckContext, Kind, Outcome } from "./kind.ts";
import { packageProgram, runTool } from "./run-tool.ts";

/** Folders with modules of ours. */
const codeFolders = ["proto", "control-plane", "agent", "sdk", "test", "tools"];

function toolKind(name: string, what: string, program: string, parameters: readonly string[]): Kind {
  return {
    name,
    what,
    run: async ({ root }) => {
      const { ok, output } = await runTool(root, packageProgram(root, program), parameters);
      return ok ? { ok } : { ok, output };
    },
  };
}

/** The part of dependency-cruiser's JSON report that we read. */
type CruiseReport = {
  readonly summary: {
    readonly totalCruised: number;
    readonly violations: readonly {
      readonly from: string;
      readonly to: string;
      readonly rule: { readonly name: string };
      readonly comment?: string;
      readonly cycle?: readonly { readonly name: string }[];
    }[];
  };
};

async function checkImports({ root }: CheckContext): Promise<Outcome> {
  const { output, stdout } = await runTool(root, process.execPath, [
    "--import",
    "./tools/check/swc-using.mjs",
    packageProgram(root, "depcruise"),
    "--config",
    ".dependency-cruiser.mjs",
    "--output-type",
    "json",
    ...codeFolders,
  ]);
  // Its exit status is the number of violations: the report alone tells a violation from a failure.
  if (!stdout.startsWith("{")) return { ok: false, output };
  const { summary } = JSON.parse(stdout) as CruiseReport;
  if (summary.totalCruised === 0)
    return { ok: false, output: "dependency-cruiser looked at no module: see facts in .dependency-cruiser.mjs" };
  if (summary.violations.length === 0) return { ok: true, note: `${summary.totalCruised} modules` };
  const lines = summary.violations.map(({ rule, from, to, comment, cycle }) => {
    const way = cycle === undefined ? to : cycle.map(({ name }) => name).join(" → ");
    return `${rule.name}: ${from} → ${way}${comment === undefined ? "" : `\n  ${comment}`}`;
  });
  return { ok: false, output: lines.join("\n") };
}

/** The kinds about code, in the order in which they are printed. */
export const codeKinds: readonly Kind[] = [
  toolKind("types", "TypeScript's types agree", "tsc", ["--project", "."]),
  toolKind("lint", "oxlint, with the rules that know types", "oxlint", [
    "--type-aware",
    "--deny-warnings",
    "--report-unused-disable-directives",
    "--format=unix",
  ]),
  toolKind("format", "files stand in oxfmt's format", "oxfmt", ["--check"]),
  { name: "imports", what: "packages and slices import only what they may", run: checkImports },
  toolKind("dead-code", "knip: nothing is unused or undeclared", "knip", ["--no-progress"]),
];
