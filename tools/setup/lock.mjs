// One set-up at a time in one checkout, and one `npm start` at a time in one data folder. The lock is a listening
// socket: the kernel gives it up when its holder ends, however that happens, so no stale lock can stand in the way.
import { createHash } from "node:crypto";
import { unlinkSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

/**
 * @param {string} purpose
 * @param {string} folder the folder that is locked
 */
function lockAddress(purpose, folder) {
  const name = `clodei-${purpose}-${createHash("sha256").update(folder).digest("hex").slice(0, 16)}`;
  if (process.platform === "win32") return String.raw`\\.\pipe\${name}`;
  // Linux's abstract sockets have no file that could outlive the process.
  return process.platform === "linux" ? `\0${name}` : join(tmpdir(), `${name}.sock`);
}

/** Settles once the holder ended, or at once where nobody listens. */
function holderEnds(address) {
  return new Promise((resolve) => {
    const socket = connect(address);
    socket.on("error", (error) => {
      if (error.code === "ECONNREFUSED" && !address.startsWith("\0")) unlinkSync(address);
      resolve(undefined);
    });
    socket.on("close", () => resolve(undefined));
    socket.resume();
  });
}

function listen(address) {
  return new Promise((resolve, reject) => {
    const server = createServer((socket) => socket.on("error", () => {}));
    server.once("error", reject);
    server.listen(address, () => resolve(server));
  });
}

/**
 * Runs `work` while no other process of this checkout holds the lock.
 * @template T
 * @param {string} root
 * @param {() => void} onWait called when somebody else holds it
 * @param {() => Promise<T>} work
 * @returns {Promise<T>}
 */
export async function withSetupLock(root, onWait, work) {
  const address = lockAddress("setup", root);
  for (let waited = false; ; waited = true) {
    let server;
    try {
      server = await listen(address);
    } catch (error) {
      if (error.code !== "EADDRINUSE") throw error;
      if (!waited) onWait();
      await holderEnds(address);
      // A holder that is just ending may refuse connections and still own the name.
      await new Promise((resolve) => setTimeout(resolve, 50));
      continue;
    }
    // Those who wait are connected: closing without ending them would never finish.
    const waiting = new Set();
    server.on("connection", (socket) => waiting.add(socket));
    try {
      return await work();
    } finally {
      for (const socket of waiting) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    }
  }
}

/**
 * Takes the lock that `npm start` holds on its data folder, or returns undefined where another start holds it.
 * @param {string} folder absolute
 * @returns {Promise<Disposable | undefined>}
 */
export async function lockDataFolder(folder) {
  const address = lockAddress("start", folder);
  try {
    const server = await listen(address);
    server.unref();
    return { [Symbol.dispose]: () => server.close() };
  } catch (error) {
    if (error.code === "EADDRINUSE") return undefined;
    throw error;
  }
}
