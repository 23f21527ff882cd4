// Servers that tests run and this machine must not: Debian's packages, unpacked into the checkout's cache. Installing
// nginx or PostgreSQL would start them as services of the machine, now and at each boot. What is installed is used.
import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const cache = join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), ".cache", "debian");
const execute = promisify(execFile);
/** What it prints is in English: reasons are read from it. */
const run = (program, parameters, options = {}) =>
  execute(program, parameters, { ...options, env: { ...process.env, LC_ALL: "C" } });
/** After which a package that no list had is asked for again. */
const askAgainMs = 24 * 60 * 60 * 1000;

/**
 * Each program: its packages, its file, and what it loads. Of one installation, or of one unpacking: nginx takes modules
 * of its own version alone.
 */
const programs = {
  haproxy: { packages: ["haproxy"], files: ["usr/sbin/haproxy"] },
  nginx: {
    packages: ["nginx", "libnginx-mod-stream"],
    files: ["usr/sbin/nginx", "usr/lib/nginx/modules/ngx_stream_module.so"],
  },
  pgbouncer: { packages: ["pgbouncer"], files: ["usr/sbin/pgbouncer"] },
  "postgresql-15": { packages: ["postgresql-15"], files: ["usr/lib/postgresql/15/bin/postgres"] },
};

/** @typedef {keyof typeof programs} UnpackedName */

/** All of them. */
export const unpackedNames = /** @type {UnpackedName[]} */ (Object.keys(programs));

/**
 * Where a program is, and what it loads, and where the libraries are that it needs beside the system's.
 * @param {UnpackedName} name
 * @returns {{ path: string, modules: string[], libraries: string | undefined } | undefined}
 */
export function findUnpacked(name) {
  const folder = ["/", join(cache, name)].find((each) => isWhole(each, name));
  if (folder === undefined) return undefined;
  const [path, ...modules] = filesIn(folder, name);
  return { path, modules, libraries: folder === "/" ? undefined : librariesIn(folder) };
}

function librariesIn(folder) {
  const folders = ["usr/lib", "lib"].flatMap((place) => {
    const parent = join(folder, place);
    if (!existsSync(parent)) return [];
    return readdirSync(parent)
      .filter((entry) => entry.endsWith("-linux-gnu"))
      .map((entry) => join(parent, entry));
  });
  return folders.join(":");
}

function filesIn(folder, name) {
  return programs[name].files.map((file) => join(folder, file));
}

function isWhole(folder, name) {
  return filesIn(folder, name).every((file) => existsSync(file));
}

/**
 * Downloads and unpacks what is missing, and what that needs and this machine lacks. Takes no root. What is not in lists
 * that were updated is asked for again after a day: another release of Debian has no PostgreSQL 15.
 * @param {(line: string) => void} progress
 * @returns {Promise<string | undefined>} what is still missing and why, in one message for a person
 */
export async function provideUnpacked(progress) {
  const missing = unpackedNames.filter((name) => findUnpacked(name) === undefined);
  if (missing.length === 0) return undefined;
  if (!existsSync("/usr/bin/apt-get") || !existsSync("/usr/bin/dpkg-deb")) {
    return `missing: ${missing.join(", ")}, which are unpacked on Debian alone.`;
  }
  const refused = missing.filter(wasRefused);
  const asked = missing.filter((name) => !refused.includes(name));
  const reasons = asked.length === 0 ? [] : await unpackAll(asked, progress);
  for (const name of refused) {
    reasons.push(`${name} (no list has it; asked for again after a day, or without ${refusalFile(name)})`);
  }
  return reasons.length === 0 ? undefined : `missing: ${reasons.join("; ")}.`;
}

/** Returns a line for each that could not be had. */
async function unpackAll(names, progress) {
  progress(`Debian packages: unpacking ${names.join(", ")} into .cache/debian`);
  const failed = await tryEach(names);
  if (failed.size === 0 || process.getuid?.() !== 0) return [...failed.values()];
  // The lists of a fresh machine are empty and those of an old one name files that are gone: update, once.
  const isUpdated = await run("apt-get", ["-qq", "update", "--error-on=any"]).then(
    () => true,
    () => false,
  );
  // Some of the lists are new nevertheless, and an apt that does not know the option has updated none.
  if (!isUpdated) await run("apt-get", ["-qq", "update"]).catch(() => undefined);
  const again = await tryEach([...failed.keys()]);
  if (isUpdated) for (const [name, reason] of again) noteRefusal(name, reason);
  return [...again.values()];
}

/** Unpacks each that can be had: one that cannot keeps none of the others away. Returns why, for each that failed. */
async function tryEach(names) {
  const failed = new Map();
  for (const name of names) {
    try {
      await unpack(name);
    } catch (error) {
      const lines = String(error.stderr || error.message)
        .trim()
        .split("\n");
      failed.set(name, `${name} (${lines.find((line) => line.startsWith("E: ")) ?? lines[0]})`);
    }
  }
  return failed;
}

/** A file that is there once no list had the package. */
function refusalFile(name) {
  return join(cache, `${name}.refused`);
}

function wasRefused(name) {
  const refusedMs = statSync(refusalFile(name), { throwIfNoEntry: false })?.mtimeMs ?? 0;
  return Date.now() - refusedMs < askAgainMs;
}

function noteRefusal(name, reason) {
  if (!/Unable to locate package|no installation candidate/.test(reason)) return;
  try {
    writeFileSync(refusalFile(name), "");
  } catch {
    // It is asked for again the next time.
  }
}

async function unpack(name) {
  const folder = join(cache, name);
  const attempt = `${folder}.new`;
  const downloads = join(attempt, "downloads");
  rmSync(attempt, { recursive: true, force: true });
  mkdirSync(downloads, { recursive: true });
  await run("apt-get", ["-qq", "download", ...(await neededPackages(name))], { cwd: downloads });
  for (const file of readdirSync(downloads)) await run("dpkg-deb", ["--extract", join(downloads, file), attempt]);
  rmSync(downloads, { recursive: true });
  if (!isWhole(attempt, name)) throw new Error(`the packages lack one of ${programs[name].files.join(", ")}`);
  // In one step: what an interrupted attempt left looks like a package.
  rmSync(folder, { recursive: true, force: true });
  renameSync(attempt, folder);
}

/** The program's packages, and those that they need and that are not installed in whichever version. */
async function neededPackages(name) {
  const { packages } = programs[name];
  const { stdout } = await run("apt-get", ["-qq", "install", "--simulate", "--no-install-recommends", ...packages]);
  const lines = stdout.split("\n").filter((line) => line.startsWith("Inst "));
  const fresh = lines.filter((line) => !/^Inst \S+ \[/.test(line)).map((line) => line.split(" ")[1] ?? "");
  return [...new Set([...fresh, ...packages])];
}
