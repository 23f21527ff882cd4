// Servers that tests run and this machine must not: Debian's packages, unpacked into the checkout's cache. Installing
// nginx or PostgreSQL would start them as services of the machine, now and at each boot. What is installed is used.
import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const cache = join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), ".cache", "debian");
const run = promisify(execFile);

/** Each package, and the program of it that is wanted. */
const programs = {
  haproxy: "usr/sbin/haproxy",
  nginx: "usr/sbin/nginx",
  pgbouncer: "usr/sbin/pgbouncer",
  "postgresql-15": "usr/lib/postgresql/15/bin/postgres",
};

/** @typedef {keyof typeof programs} UnpackedName */

/** All of them. */
export const unpackedNames = /** @type {UnpackedName[]} */ (Object.keys(programs));

/**
 * Where a package's program is, and where the libraries are that it needs beside the system's.
 * @param {UnpackedName} name
 * @returns {{ path: string, libraries: string | undefined } | undefined}
 */
export function findUnpacked(name) {
  const installed = join("/", programs[name]);
  if (existsSync(installed)) return { path: installed, libraries: undefined };
  const folder = join(cache, name);
  const path = join(folder, programs[name]);
  if (!existsSync(path)) return undefined;
  const libraries = ["usr/lib", "lib"].flatMap((place) => {
    const parent = join(folder, place);
    if (!existsSync(parent)) return [];
    return readdirSync(parent)
      .filter((entry) => entry.endsWith("-linux-gnu"))
      .map((entry) => join(parent, entry));
  });
  return { path, libraries: libraries.join(":") };
}

/**
 * Downloads and unpacks what is missing, and what that needs and this machine lacks. Takes no root.
 * @param {(line: string) => void} progress
 * @returns {Promise<string | undefined>} what is still missing and why, in one message for a person
 */
export async function provideUnpacked(progress) {
  const missing = unpackedNames.filter((name) => findUnpacked(name) === undefined);
  if (missing.length === 0) return undefined;
  if (!existsSync("/usr/bin/apt-get") || !existsSync("/usr/bin/dpkg-deb")) {
    return `missing: ${missing.join(", ")}, which are unpacked on Debian alone.`;
  }
  progress(`Debian packages: unpacking ${missing.join(", ")} into .cache/debian`);
  try {
    await unpackAll(missing);
    return undefined;
  } catch (first) {
    // The lists of a fresh machine are empty and those of an old one name files that are gone: update, once.
    if (process.getuid?.() !== 0) return failure(missing, first);
  }
  try {
    await run("apt-get", ["-qq", "update"]);
    await unpackAll(missing.filter((name) => findUnpacked(name) === undefined));
    return undefined;
  } catch (second) {
    return failure(missing, second);
  }
}

function failure(missing, error) {
  return `missing: ${missing.join(", ")}, which could not be downloaded: ${String(error.stderr ?? error.message).trim()}.`;
}

async function unpackAll(names) {
  for (const name of names) {
    const folder = join(cache, name);
    const attempt = `${folder}.new`;
    const downloads = join(attempt, "downloads");
    rmSync(attempt, { recursive: true, force: true });
    mkdirSync(downloads, { recursive: true });
    await run("apt-get", ["-qq", "download", ...(await neededPackages(name))], { cwd: downloads });
    for (const file of readdirSync(downloads)) await run("dpkg-deb", ["--extract", join(downloads, file), attempt]);
    rmSync(downloads, { recursive: true });
    // In one step: what an interrupted attempt left looks like a package.
    rmSync(folder, { recursive: true, force: true });
    renameSync(attempt, folder);
  }
}

/** The package, and those that it needs and that are not installed in whichever version. */
async function neededPackages(name) {
  const { stdout } = await run("apt-get", ["-qq", "install", "--simulate", "--no-install-recommends", name]);
  const lines = stdout.split("\n").filter((line) => line.startsWith("Inst "));
  const fresh = lines.filter((line) => !/^Inst \S+ \[/.test(line)).map((line) => line.split(" ")[1] ?? "");
  return [...new Set([name, ...fresh])];
}
