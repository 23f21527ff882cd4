// Completes package-lock.json: every optional dependency that a locked package names must have an entry, or `npm ci`
// refuses the lock. `npm install` drops the entries of platforms whose packages its registry does not serve, so they
// are written here from the names and versions that the locked packages themselves state.
//
//   node tools/setup/complete-lock.mjs           adds what is missing
//   node tools/setup/complete-lock.mjs --check   only names it (a part of `npm run check`)
import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const systems = new Set([
  "android",
  "darwin",
  "freebsd",
  "linux",
  "netbsd",
  "openbsd",
  "openharmony",
  "sunos",
  "win32",
]);
const processors = new Map([
  ["aarch64", "arm64"],
  ["arm", "arm"],
  ["arm64", "arm64"],
  ["armv7", "arm"],
  ["ia32", "ia32"],
  ["loong64", "loong64"],
  ["ppc64", "ppc64"],
  ["riscv64", "riscv64"],
  ["s390x", "s390x"],
  ["wasm32", "wasm32"],
  ["x64", "x64"],
]);
const exactVersion = /^\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?$/;

/**
 * The operating system, processor and C library that a platform package's name states
 * (`@oxlint/binding-linux-x64-musl`), or undefined where it states none.
 * @param {string} name
 */
function platformOf(name) {
  const words = name.split(/[-/]/u);
  const os = words.find((word) => systems.has(word));
  const word = words.find((candidate) => processors.has(candidate));
  const cpu = word === undefined ? undefined : processors.get(word);
  if (cpu === undefined || (os === undefined && cpu !== "wasm32")) return undefined;
  const libc = words.some((part) => part.startsWith("musl")) ? "musl" : words.includes("gnu") ? "glibc" : undefined;
  return { os, cpu, libc };
}

/**
 * Adds the entries that `lock` misses, in place.
 * @param {{packages: Record<string, any>}} lock a parsed package-lock.json of version 3
 * @returns {{added: string[], unknown: string[]}} names added, and those that state no platform or exact version
 */
export function completeLock(lock) {
  const added = [];
  const unknown = [];
  for (const [place, entry] of Object.entries(lock.packages)) {
    for (const [name, version] of Object.entries(entry.optionalDependencies ?? {})) {
      const nested = `${place === "" ? "" : `${place}/`}node_modules/${name}`;
      const hoisted = `node_modules/${name}`;
      if (nested in lock.packages || lock.packages[hoisted]?.version === version) continue;
      const platform = platformOf(name);
      if (platform === undefined || !exactVersion.test(version)) {
        if (!(hoisted in lock.packages)) unknown.push(`${name}@${version} (of ${place})`);
        continue;
      }
      lock.packages[hoisted in lock.packages ? nested : hoisted] = {
        version,
        cpu: [platform.cpu],
        ...(entry.dev === true ? { dev: true } : {}),
        ...(platform.libc === undefined ? {} : { libc: [platform.libc] }),
        optional: true,
        ...(platform.os === undefined ? {} : { os: [platform.os] }),
      };
      added.push(`${name}@${version}`);
    }
  }
  // npm keeps its entries in this order: a later `npm install` then changes nothing else.
  const places = Object.keys(lock.packages).sort((left, right) => left.localeCompare(right, "en"));
  lock.packages = Object.fromEntries(places.map((place) => [place, lock.packages[place]]));
  return { added, unknown };
}

/** The parts of a package.json that the lock repeats. */
const lockedParts = ["dependencies", "devDependencies", "optionalDependencies", "peerDependencies"];

/**
 * Workspaces whose package.json says something else than the lock: `npm ci` would refuse them.
 * @param {{packages: Record<string, any>}} lock
 */
function staleWorkspaces(lock) {
  const manifest = (place) => JSON.parse(readFileSync(place === "" ? "package.json" : `${place}/package.json`, "utf8"));
  return ["", ...manifest("").workspaces].flatMap((place) => {
    const [locked, stated] = [lock.packages[place] ?? {}, manifest(place)];
    const sorted = (part) =>
      JSON.stringify(Object.entries(part ?? {}).sort(([left], [right]) => left.localeCompare(right, "en")));
    return lockedParts
      .filter((part) => sorted(locked[part]) !== sorted(stated[part]))
      .map((part) => `${place === "" ? "." : place}/package.json: ${part} are not those of package-lock.json`);
  });
}

function main() {
  const file = "package-lock.json";
  const lock = JSON.parse(readFileSync(file, "utf8"));
  const { added, unknown } = completeLock(lock);
  for (const name of unknown) console.error(`${name} has no entry in ${file}, and its name states no platform`);
  if (process.argv.includes("--check")) {
    for (const name of added) console.error(`${name} has no entry in ${file}`);
    if (added.length > 0) console.error("run: node tools/setup/complete-lock.mjs");
    const stale = staleWorkspaces(lock);
    for (const line of stale) console.error(line);
    if (stale.length > 0) console.error("run: npm install, then node tools/setup/complete-lock.mjs");
    process.exitCode = added.length + unknown.length + stale.length > 0 ? 1 : 0;
    return;
  }
  if (added.length > 0) writeFileSync(file, `${JSON.stringify(lock, undefined, 2)}\n`);
  console.log(`${added.length} entries added to ${file}`);
  process.exitCode = unknown.length > 0 ? 1 : 0;
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) main();
