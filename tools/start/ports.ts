import { once } from "node:events";
import { createServer } from "node:net";

/** How many ports after the usual one are tried. */
const maxTries = 200;

async function isFree(host: string, port: number): Promise<boolean> {
  const server = createServer();
  try {
    server.listen(port, host);
    await once(server, "listening");
    return true;
  } catch {
    return false;
  } finally {
    server.close();
  }
}

/** The first free port at or after the usual one that is not among those taken already. */
export async function nextFreePort(host: string, usual: number, taken: readonly number[]): Promise<number> {
  for (let port = usual; port < usual + maxTries; port += 1) {
    if (!taken.includes(port) && (await isFree(host, port))) return port;
  }
  throw new Error(`no port from ${usual} to ${usual + maxTries - 1} is free on ${host}`);
}
