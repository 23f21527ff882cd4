// The launcher behind `npm start`, `npm test`, `npm run check`, `npm run bench`, `npm run build` and `npm run generate`.
// Plain JavaScript for Node 20: it runs before anything is installed, installs what is missing, and then runs the
// command's TypeScript under the pinned Node. What is there is not touched, so a second run starts at once.
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { runChild } from "./setup/child.mjs";
import { dockerAnswers, dockerSocketOf } from "./setup/docker-socket.mjs";
import { SetupError } from "./setup/fail.mjs";
import { withSetupLock } from "./setup/lock.mjs";
import { findNode } from "./setup/node.mjs";
import { installPackages, packagesMismatch } from "./setup/packages.mjs";
import { missingOf, provide } from "./setup/system.mjs";
import { findUnpacked, provideUnpacked, unpackedNames } from "./setup/unpacked.mjs";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const progress = (line) => process.stderr.write(`set-up: ${line}\n`);

const engineNeeds = ["engine", "busybox", "ip", "iptables", "namespaces"];

/**
 * Each command: its program, what it is for, what it needs, whether it runs servers that are unpacked, and whether it
 * can do a part of its work without.
 */
const commands = {
  start: { program: "tools/start/main.ts", what: "starts a control plane, an agent and a first instance here" },
  test: {
    program: "tools/test/main.ts",
    what: "runs the tests",
    needs: [...engineNeeds, "registry", "curl", "python", "browser", "clock"],
    unpacks: true,
    partial: true,
  },
  check: { program: "tools/check/main.ts", what: "checks types, lint, format, schema, imports and more", needs: [] },
  bench: { program: "test/bench/main.ts", what: "measures against bare tools", needs: engineNeeds },
  build: { program: "tools/build/main.ts", what: "builds what production runs", needs: [] },
  generate: { program: "tools/generate/main.ts", what: "regenerates what is generated", needs: [] },
};

function usage() {
  const lines = Object.entries(commands).map(([name, { what }]) => `  ${name.padEnd(10)}${what}`);
  return `usage: node tools/run.mjs COMMAND [OPTIONS]\n\n${lines.join("\n")}\n\nnode tools/run.mjs COMMAND --help tells a command's options.`;
}

/** What `npm start` needs depends on whether an engine answers already. */
async function needsOfStart() {
  const socket = dockerSocketOf(process.env["DOCKER_HOST"]);
  if ("refused" in socket) throw new SetupError(socket.refused);
  if (await dockerAnswers(socket.path)) return ["busybox", "namespaces"];
  if (socket.named) throw new SetupError(`no Docker engine answers at ${socket.path}, which DOCKER_HOST names`);
  return [...engineNeeds, "certificates"];
}

async function setUp(name) {
  const command = commands[name];
  const needs = command.needs ?? (await needsOfStart());
  const unpacks = command.unpacks === true && unpackedNames.some((program) => findUnpacked(program) === undefined);
  if (packagesMismatch(root) === undefined && missingOf(needs).length === 0 && !unpacks) return;
  const onWait = () => progress("another run is setting up this checkout; waiting for it");
  await withSetupLock(root, onWait, async () => {
    await installPackages(root, progress);
    const missing = [await provide(needs, progress), unpacks ? await provideUnpacked(progress) : undefined];
    for (const message of missing) {
      if (message === undefined) continue;
      if (command.partial !== true) throw new SetupError(message);
      progress(`${message} What needs it is skipped.`);
    }
  });
}

async function main() {
  const [name = "", ...parameters] = process.argv.slice(2);
  if (name === "--help" || name === "-h") {
    console.log(usage());
    return 0;
  }
  if (!Object.hasOwn(commands, name)) {
    console.error(usage());
    return 2;
  }
  if (parameters.includes("--help") || parameters.includes("-h")) {
    // Help needs the packages for nothing but the Node that understands TypeScript.
    await withSetupLock(
      root,
      () => {},
      () => installPackages(root, progress),
    );
  } else {
    await setUp(name);
  }
  const node = findNode(root);
  return runChild(node, [join(root, commands[name].program), ...parameters], {
    cwd: root,
    env: { ...process.env, PATH: `${dirname(node)}:${process.env["PATH"] ?? ""}` },
  });
}

try {
  process.exitCode = await main();
} catch (error) {
  if (!(error instanceof SetupError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}
