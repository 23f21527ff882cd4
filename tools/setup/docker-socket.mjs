// Where a Docker engine may answer, and whether one does.
import { existsSync } from "node:fs";
import { request } from "node:http";

/** Where Docker's own packages put the socket. */
export const usualDockerSocket = "/var/run/docker.sock";
const pingTimeoutMs = 2000;

/**
 * The socket that DOCKER_HOST names, else the usual one. DOCKER_HOST with tcp:// or ssh:// is refused by name: the
 * agent reads each container's isolation back from this machine's kernel, so the engine must be here.
 * @param {string | undefined} dockerHost
 * @returns {{path: string, named: boolean} | {refused: string}}
 */
export function dockerSocketOf(dockerHost) {
  if (dockerHost === undefined || dockerHost === "") return { path: usualDockerSocket, named: false };
  if (dockerHost.startsWith("unix://")) return { path: dockerHost.slice("unix://".length), named: true };
  return { refused: `DOCKER_HOST is ${dockerHost}: only unix:// sockets of this machine can be used` };
}

/**
 * Whether an engine answers on this socket.
 * @param {string} path
 * @returns {Promise<boolean>}
 */
export function dockerAnswers(path) {
  if (!existsSync(path)) return Promise.resolve(false);
  return new Promise((resolve) => {
    const ping = request({ socketPath: path, path: "/_ping", timeout: pingTimeoutMs }, (response) => {
      response.resume();
      resolve(response.statusCode === 200);
    });
    ping.once("timeout", () => ping.destroy());
    ping.once("error", () => resolve(false));
    ping.end();
  });
}
