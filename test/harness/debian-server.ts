// A server of Debian for a test: HAProxy, nginx, PgBouncer. It listens on a free port or a socket, and ends with the test.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { connect, createServer, type Server } from "node:net";
import { findUnpacked, type UnpackedName } from "../../tools/setup/unpacked.mjs";
import { eventually } from "./eventually.ts";

const startTimeoutMs = 30_000;
const stopTimeoutMs = 10_000;
const keptOutputCharacters = 8_000;
/** Another program can take a port between our look and the server's. */
const maxPortTries = 5;

/** Why servers of these packages cannot be run here; undefined where they can. For `test(name, {skip}, …)`. */
export function serverUnavailable(...packages: readonly UnpackedName[]): string | undefined {
  if (process.platform !== "linux") return "needs Linux: Debian's servers";
  const missing = packages.find((name) => findUnpacked(name) === undefined);
  return missing === undefined ? undefined : `needs ${missing} (Debian's ${missing}, which \`npm test\` unpacks)`;
}

/** A server that runs. */
export class DebianServer implements AsyncDisposable {
  readonly #child: ChildProcess;
  #output = "";

  private constructor(child: ChildProcess) {
    this.#child = child;
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => {
        this.#output = (this.#output + text).slice(-keptOutputCharacters);
      });
    }
  }

  /** Starts a program in the foreground and waits until it listens at all of the places. */
  static async start(options: {
    readonly package: UnpackedName;
    readonly args: readonly string[];
    /** Ports of 127.0.0.1, or paths of sockets. */
    readonly listens: readonly (number | string)[];
    /** Whose files it uses, where root must not run it. */
    readonly ownerId?: number | undefined;
  }): Promise<DebianServer> {
    const found = findUnpacked(options.package);
    if (found === undefined) throw new Error(`${options.package} is missing`);
    const [program = "", ...args] = [...commandPrefix(options.ownerId), found.path, ...options.args];
    const child = spawn(program, args, {
      cwd: "/",
      env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", LD_LIBRARY_PATH: found.libraries ?? "" },
      stdio: ["ignore", "pipe", "pipe"],
    });
    const server = new DebianServer(child);
    try {
      await eventually(startTimeoutMs, () => server.#check(options.listens));
      if (!server.#isRunning) throw new Error("it ended");
      return server;
    } catch (error) {
      await server[Symbol.asyncDispose]();
      throw new Error(`${options.package} does not listen:\n${server.output}`, { cause: error });
    }
  }

  /** What it said last. */
  get output(): string {
    return this.#output;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#isRunning) return;
    const ended = once(this.#child, "exit");
    this.#child.kill("SIGTERM");
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), stopTimeoutMs);
    await ended;
    clearTimeout(timer);
  }

  get #isRunning(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  async #check(places: readonly (number | string)[]): Promise<void> {
    if (!this.#isRunning) return;
    for (const place of places) {
      const socket = typeof place === "number" ? connect(place, "127.0.0.1") : connect(place);
      await once(socket, "connect");
      socket.destroy();
    }
  }
}

/** Ties the server's life to ours, and makes it no root: root's own files belong to "nobody" in a user namespace. */
function commandPrefix(ownerId: number | undefined): string[] {
  const tied = ["setpriv", "--pdeathsig", "KILL"];
  if (ownerId === undefined || process.getuid?.() !== 0) return [...tied, "--"];
  if (ownerId === 0) return ["unshare", "--user", "--map-user=65534", "--map-group=65534", "--", ...tied, "--"];
  return [...tied, `--reuid=${ownerId}`, `--regid=${ownerId}`, "--clear-groups", "--"];
}

/** Starts what listens on ports, again on others where one of them was taken meanwhile. */
export async function withFreePorts<T>(count: number, start: (ports: readonly number[]) => Promise<T>): Promise<T> {
  for (let tries = 1; ; tries += 1) {
    try {
      return await start(await freePorts(count));
    } catch (error) {
      if (tries === maxPortTries) throw error;
    }
  }
}

async function freePorts(count: number): Promise<number[]> {
  const ports: number[] = [];
  const servers: Server[] = [];
  for (let index = 0; index < count; index += 1) {
    const server = createServer().listen(0, "127.0.0.1");
    await once(server, "listening");
    servers.push(server);
    const address = server.address();
    if (address !== null && typeof address !== "string") ports.push(address.port);
  }
  for (const server of servers) {
    const closed = once(server, "close");
    server.close();
    await closed;
  }
  return ports;
}
