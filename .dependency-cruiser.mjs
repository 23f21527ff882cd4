// Who may import whom. `npm run check` runs these rules as its kind "imports" and also asserts that modules were looked
// at: without @swc/core and `parser: "swc"` dependency-cruiser reads no TypeScript and reports success.

/** The slices of the control plane, in order: each may use the services of those before it. */
const slices = [
  "audit",
  "mail",
  "identity",
  "organizations",
  "nodes",
  "placement",
  "catalog",
  "wallet",
  "secrets",
  "instances",
  "dispatch",
  "governance",
];
const anySlice = `^control-plane/src/(${slices.join("|")})/`;

/** Composition roots of tests (test-fleet.ts): they build parts as start.ts does. */
const testFile = "\\.test\\.ts$";
const testHarness = ["/test-[^/]+\\.ts$", "-tests?\\.ts$", "/scripted-[^/]+\\.ts$", "/testing/"];

const sliceOrder = slices.slice(0, -1).map((slice, index) => ({
  name: "slice-order",
  comment: `${slice} may use only the slices before it: ${slices.slice(0, index).join(", ") || "none"}`,
  severity: "error",
  from: { path: `^control-plane/src/${slice}/` },
  to: { path: `^control-plane/src/(${slices.slice(index + 1).join("|")})/` },
}));

export default {
  forbidden: [
    {
      name: "package-boundary",
      comment: "a package imports no other package but proto; proto imports none; nothing imports test or tools",
      severity: "error",
      from: { path: "^(proto|control-plane|agent|sdk)/", pathNot: testFile },
      to: { path: "^(control-plane|agent|sdk|test|tools)/", pathNot: "^$1/" },
    },
    {
      name: "package-boundary",
      comment: "a package's tests may use the harness and a private engine besides, and no other package either",
      severity: "error",
      from: { path: `^(proto|control-plane|agent|sdk)/.*${testFile}` },
      to: { path: "^(control-plane|agent|sdk|test|tools)/", pathNot: ["^$1/", "^test/harness/", "^tools/engine/"] },
    },
    {
      name: "proto-through-exports",
      comment: "other packages reach proto by its name (@clodei/proto/...), never by a path into its folder",
      severity: "error",
      from: { path: "^(control-plane|agent|sdk|test|tools)/" },
      to: { path: "^proto/", dependencyTypes: ["local"] },
    },
    ...sliceOrder,
    {
      name: "slice-service-only",
      comment: "a slice reaches another only through its service.ts",
      severity: "error",
      from: { path: anySlice, pathNot: [testFile, ...testHarness] },
      to: { path: anySlice, pathNot: ["^control-plane/src/$1/", "^control-plane/src/[^/]+/service\\.ts$"] },
    },
    {
      name: "slice-rpc",
      comment: "slices know callers and request contexts; only the node listener shares more of rpc/",
      severity: "error",
      from: { path: anySlice, pathNot: ["^control-plane/src/dispatch/", testFile, ...testHarness] },
      to: { path: "^control-plane/src/rpc/", pathNot: "^control-plane/src/rpc/(caller|context)\\.ts$" },
    },
    {
      name: "rpc-below-slices",
      comment: "rpc/ serves every slice and knows none",
      severity: "error",
      from: { path: "^control-plane/src/rpc/", pathNot: [testFile, ...testHarness] },
      to: { path: anySlice },
    },
    {
      name: "platform-below-all",
      comment: "platform/ knows neither slices nor rpc/",
      severity: "error",
      from: { path: "^control-plane/src/platform/" },
      to: { path: [anySlice, "^control-plane/src/rpc/"] },
    },
    {
      name: "composition-root-above-all",
      comment: "only main.ts and start.ts build the parts: nothing but tests imports them",
      severity: "error",
      from: { path: "^control-plane/src/", pathNot: ["^control-plane/src/(main|start)\\.ts$", testFile] },
      to: { path: "^control-plane/src/(main|start)\\.ts$" },
    },
    {
      name: "docker-only-in-containers",
      comment: "agent/src/containers is the only part of the agent that talks to Docker",
      severity: "error",
      // The doctor asks the engine before there is an agent.
      from: { path: "^agent/", pathNot: ["^agent/src/containers/", "^agent/src/doctor/engine-checks\\.ts$"] },
      to: { path: ["^agent/src/containers/docker-client\\.ts$", "^(node:)?http$"] },
    },
    {
      name: "no-test-code-in-programs",
      comment: "programs import no test file and no test harness",
      severity: "error",
      from: { path: "^(proto|control-plane|agent|sdk)/", pathNot: [testFile, ...testHarness] },
      to: { path: [testFile, ...testHarness] },
    },
    { name: "no-cycles", severity: "error", from: {}, to: { circular: true } },
    { name: "no-unresolvable", severity: "error", from: {}, to: { couldNotResolve: true } },
  ],
  options: {
    parser: "swc",
    // A function of ours may be called "require".
    moduleSystems: ["es6"],
    tsPreCompilationDeps: true,
    doNotFollow: { path: "(^|/)node_modules/" },
    exclude: { path: ["^proto/gen/", "(^|/)dist/"] },
    enhancedResolveOptions: {
      exportsFields: ["exports"],
      conditionNames: ["source", "import", "node", "default"],
      extensions: [".ts", ".mjs", ".js", ".json"],
    },
  },
};
