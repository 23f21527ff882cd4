// The Node that runs everything: the platform package that the lock pins, else the system's where it is new enough.
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { SetupError } from "./fail.mjs";

/** Type stripping and node:sqlite without a flag. */
export const minimumNodeMajor = 24;

/** @param {string} version `v24.21.0` */
function isNewEnough(version) {
  return Number(/^v(\d+)\./u.exec(version)?.[1] ?? 0) >= minimumNodeMajor;
}

/**
 * The path of a Node that is new enough.
 * @param {string} root
 */
export function findNode(root) {
  const pinned = join(root, "node_modules", ".bin", "node");
  if (existsSync(pinned)) {
    const { status, stdout } = spawnSync(pinned, ["--version"], { encoding: "utf8" });
    if (status === 0 && isNewEnough(stdout)) return pinned;
  }
  if (isNewEnough(process.version)) return process.execPath;
  throw new SetupError(
    `Node ${minimumNodeMajor} or newer is missing: this is ${process.version}, and npm has a packaged one only for ` +
      `Linux on x64 and arm64 (here: ${process.platform} on ${process.arch}). Install it from https://nodejs.org/ ` +
      `or with your system's package manager.`,
  );
}
