// npm packages: `npm ci`, only where what is installed is not what the lock file says.
import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { SetupError } from "./fail.mjs";

function readJson(path) {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    if (error.code === "ENOENT" || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/**
 * Why node_modules is not what the lock says, or undefined where it is. npm writes the list of what it installed as its
 * last act, so an installation that was cut short has none.
 * @param {string} root
 */
export function packagesMismatch(root) {
  const lock = readJson(join(root, "package-lock.json"));
  if (lock === undefined) throw new SetupError("package-lock.json is missing or not JSON");
  const installed = readJson(join(root, "node_modules", ".package-lock.json"));
  if (installed === undefined) return "no npm packages are installed";
  for (const [place, entry] of Object.entries(lock.packages)) {
    if (place === "" || entry.link === true || !place.includes("node_modules/")) continue;
    const found = installed.packages[place];
    // An optional package is absent where its platform is another, or where its install failed.
    if (found === undefined && entry.optional !== true) return `${place} is not installed`;
    if (found !== undefined && (found.version !== entry.version || found.integrity !== entry.integrity)) {
      return `${place} is ${found.version}, the lock says ${entry.version}`;
    }
  }
  return undefined;
}

/**
 * @param {string} root
 * @param {(line: string) => void} progress
 */
export async function installPackages(root, progress) {
  const mismatch = packagesMismatch(root);
  if (mismatch === undefined) return;
  progress(`npm packages: ${mismatch}; running npm ci`);
  const startMs = Date.now();
  // npm tells its scripts where it is; npm itself may be no file in the PATH (corepack).
  const npmScript = process.env["npm_execpath"];
  const [command, prefix] = npmScript?.endsWith(".js") ? [process.execPath, [npmScript]] : ["npm", []];
  const parameters = ["ci", "--no-audit", "--no-fund", "--loglevel=error"];
  // Variables of the outer npm would be read as options of this one.
  const environment = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^npm_/iu.test(name)));
  for (const name of ["npm_config_cache", "npm_config_registry", "npm_config_userconfig"]) {
    if (process.env[name] !== undefined) environment[name] = process.env[name];
  }
  const code = await new Promise((resolve, reject) => {
    const child = spawn(command, [...prefix, ...parameters], {
      cwd: root,
      env: environment,
      stdio: ["ignore", 2, 2],
    });
    child.once("error", (error) => reject(new SetupError(`npm cannot be run: ${error.message}`)));
    child.once("exit", (exitCode, signal) => resolve(signal ?? exitCode));
  });
  if (code !== 0) throw new SetupError(`npm ci ended with ${code}: see its output above`);
  progress(`npm packages: installed in ${Math.round((Date.now() - startMs) / 1000)} s`);
}
