// A Docker engine of our own in a network namespace of its own: it touches no rule, bridge or container of the
// machine, and everything that it makes can be taken away by name. `npm start` runs one where no engine answers,
// tests always do.
import { type ChildProcess, spawn } from "node:child_process";
import { mkdir, open, readFile, realpath, rm, writeFile } from "node:fs/promises";
import { Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as wait } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { callEngine, callEngineJson } from "./api.ts";
import { type EngineLayout, type EngineNote, layoutOf, readNote, writeNote } from "./layout.ts";
import { removeLeftovers } from "./leftovers.ts";
import { connectOutside, planOutsideLink, usableResolvers } from "./outside.ts";
import { identify, isAlive, killAll } from "./processes.ts";
import { runTool } from "./shell.ts";

/** A first start on a slow disk; 0.5 s is usual. */
const startTimeoutMs = 60_000;
const stopTimeoutMs = 15_000;
const pollMs = 20;
const logTailBytes = 4000;
/** Networks that callers make without addresses of their own. Inside the namespace only: the same for every engine. */
const addressPool = "base=10.211.0.0/16,size=28";
/** What the engine may take from its starter's environment, where it may go out. */
const proxyVariables = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];

export interface PrivateEngineOptions {
  /** Images and containers stay in it. One engine a folder; a folder survives a stop. */
  readonly folder: string;
  /** Begins the namespace's name: letters, digits and "-", at most 20. */
  readonly name: string;
  /** Whether the engine and its containers reach what the machine reaches. Without it they reach nothing. */
  readonly internet: boolean;
  /** The folder goes, too, when the engine does. */
  readonly temporary?: boolean;
  /** Further arguments of dockerd. */
  readonly daemonArguments?: readonly string[];
  /** Shell commands that run before dockerd, in a mount namespace of its own: how a test breaks a machine. */
  readonly prelude?: string;
  /** Is told what is being done. */
  readonly progress?: (line: string) => void;
}

/** An engine that runs until it is closed; it also ends when this process dies, however that happens. */
export interface PrivateEngine extends AsyncDisposable {
  readonly socketPath: string;
  /** For what else runs for it: whoever has this path in an argument ends with an engine that is `temporary`. */
  readonly runFolder: string;
  /** Name of its network namespace: `nsenter --net=/run/netns/NAME` enters it. */
  readonly namespace: string;
  readonly folder: string;
  /** Resolvers for containers; none where the engine reaches nothing. */
  readonly resolvers: readonly string[];
  /** The engine's process. */
  readonly pid: number;
  /** Kills the engine as a crash would. Containers go on. */
  kill(): Promise<void>;
  /** Ends the engine in order. Containers go on. */
  stopDaemon(): Promise<void>;
  /** Starts it again after `kill` or `stopDaemon`: it takes up its containers. */
  startDaemon(): Promise<void>;
  /** Removes containers and networks, stops the engine, and takes away all that it made outside of its folder. */
  close(): Promise<void>;
}

/**
 * Starts an engine, after clearing away what a killed predecessor in the same folder left. Needs root on Linux with
 * Docker's engine installed.
 */
export async function startPrivateEngine(options: PrivateEngineOptions): Promise<PrivateEngine> {
  if (!/^[a-z0-9][a-z0-9-]{0,19}$/.test(options.name)) throw new RangeError(`no name for an engine: ${options.name}`);
  await mkdir(options.folder, { recursive: true });
  const layout = layoutOf(await realpath(options.folder), options.name);
  await clearPredecessor(layout);
  const owner = await identify(process.pid);
  if (owner === undefined) throw new Error("this process is not in /proc");
  const outside = options.internet ? await planOutsideLink(layout.namespace, layout.id) : undefined;
  let note: EngineNote = { owner, layout, outside, watchdog: undefined, temporary: options.temporary ?? false };
  await writeNote(note);
  const watchdog = startWatchdog(layout.folder);
  try {
    note = { ...note, watchdog: watchdog.pid === undefined ? undefined : await identify(watchdog.pid) };
    await writeNote(note);
    await mkdir(layout.runFolder, { recursive: true, mode: 0o700 });
    await mkdir(layout.dataRoot, { recursive: true });
    options.progress?.(`network namespace ${layout.namespace}`);
    await runTool("ip", "netns", "add", layout.namespace);
    await runTool("ip", "-n", layout.namespace, "link", "set", "lo", "up");
    if (outside !== undefined) await connectOutside(outside);
    const engine = new RunningEngine(note, watchdog, options.internet ? await usableResolvers() : [], options);
    options.progress?.("Docker engine");
    await engine.startDaemon();
    await clearObjects(layout.socketPath);
    return engine;
  } catch (error) {
    watchdog.kill("SIGKILL");
    await removeLeftovers(note);
    throw error;
  }
}

async function clearPredecessor(layout: EngineLayout): Promise<void> {
  const note = await readNote(layout.folder);
  if (note === undefined) return;
  if (await isAlive(note.owner)) {
    throw new Error(`the engine in ${layout.folder} belongs to process ${note.owner.pid}, which runs`);
  }
  if (note.watchdog !== undefined && (await isAlive(note.watchdog))) await killAll([note.watchdog.pid]);
  await removeLeftovers(note);
}

/** A shell waits for the pipe's end, because it needs a twentieth of Node's memory; Node comes only when there is work. */
function startWatchdog(folder: string): ChildProcess {
  const script = 'read -r line; [ "$line" = stop ] || exec "$0" "$@"';
  const program = fileURLToPath(new URL("watchdog.ts", import.meta.url));
  const child = spawn("/bin/sh", ["-c", script, process.execPath, program, folder], {
    stdio: ["pipe", "ignore", "ignore"],
    // A session of its own: Ctrl-C in the terminal must not end it before its owner.
    detached: true,
  });
  child.on("error", () => {});
  child.stdin?.on("error", () => {});
  child.unref();
  // A pipe of a child is a socket, which would keep this process alive.
  if (child.stdin instanceof Socket) child.stdin.unref();
  return child;
}

class RunningEngine implements PrivateEngine {
  readonly #note: EngineNote;
  readonly #watchdog: ChildProcess;
  readonly resolvers: readonly string[];
  readonly #options: PrivateEngineOptions;
  #daemon: ChildProcess | undefined;
  #closed: Promise<void> | undefined;

  constructor(note: EngineNote, watchdog: ChildProcess, resolvers: readonly string[], options: PrivateEngineOptions) {
    this.#options = options;
    this.#note = note;
    this.#watchdog = watchdog;
    this.resolvers = resolvers;
  }

  get socketPath(): string {
    return this.#note.layout.socketPath;
  }

  get namespace(): string {
    return this.#note.layout.namespace;
  }

  get runFolder(): string {
    return this.#note.layout.runFolder;
  }

  get folder(): string {
    return this.#note.layout.folder;
  }

  get pid(): number {
    if (this.#daemon?.pid === undefined) throw new Error("the engine does not run");
    return this.#daemon.pid;
  }

  async kill(): Promise<void> {
    await this.#end("SIGKILL");
  }

  async stopDaemon(): Promise<void> {
    await this.#end("SIGTERM");
  }

  async startDaemon(): Promise<void> {
    if (this.#daemon !== undefined) throw new Error("the engine runs already");
    const { layout } = this.#note;
    // After a kill the engine would wait for the processes that these name, or refuse to start because of them.
    await rm(join(layout.runFolder, "docker.pid"), { force: true });
    await rm(join(layout.execRoot, "containerd", "containerd.pid"), { force: true });
    const command = await daemonCommand(this.#note, this.resolvers, this.#options);
    const log = await open(layout.logFile, "w", 0o600);
    const [program = "", ...args] = command;
    const daemon = spawn(program, args, {
      stdio: ["ignore", log.fd, log.fd],
      detached: true,
      env: daemonEnvironment(this.#note.outside !== undefined),
    });
    await log.close();
    let failure: Error | undefined;
    daemon.on("error", (error) => (failure = error));
    daemon.unref();
    this.#daemon = daemon;
    const deadline = performance.now() + startTimeoutMs;
    for (;;) {
      if (await answers(layout.socketPath)) return;
      const ended = failure !== undefined || daemon.exitCode !== null || daemon.signalCode !== null;
      if (ended || performance.now() > deadline) {
        const tail = (await readFile(layout.logFile, "utf8").catch(() => "")).slice(-logTailBytes);
        await this.kill();
        throw new Error(`the Docker engine ${ended ? "ended" : "does not answer"}: ${failure?.message ?? ""}\n${tail}`);
      }
      await wait(pollMs);
    }
  }

  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    if (this.#daemon !== undefined) {
      // Whatever the engine does not manage in order is taken away below.
      await clearObjects(this.socketPath).catch(() => {});
      await this.stopDaemon();
    }
    await removeLeftovers(this.#note);
    this.#watchdog.stdin?.end("stop\n");
  }

  async #end(signal: "SIGTERM" | "SIGKILL"): Promise<void> {
    const daemon = this.#daemon;
    this.#daemon = undefined;
    if (daemon?.pid === undefined) return;
    const identity = await identify(daemon.pid);
    daemon.kill(signal);
    const deadline = performance.now() + stopTimeoutMs;
    if (identity === undefined) return;
    while (await isAlive(identity)) {
      if (performance.now() > deadline) await killAll([identity.pid]);
      await wait(pollMs);
    }
  }
}

async function daemonCommand(
  note: EngineNote,
  resolvers: readonly string[],
  { daemonArguments = [], prelude = "" }: PrivateEngineOptions,
): Promise<string[]> {
  const { layout } = note;
  const daemon = [
    "dockerd",
    ...["--data-root", layout.dataRoot, "--exec-root", layout.execRoot],
    ...["--pidfile", join(layout.runFolder, "docker.pid"), "--host", `unix://${layout.socketPath}`],
    // Without this file the engine would read the machine's own configuration.
    ...["--config-file", await emptyConfiguration(layout)],
    ...["--live-restore", "--default-address-pool", addressPool, "--log-level", "warn"],
    // One name for all of its containers' groups, whatever the machine's service manager is.
    ...["--cgroup-parent", `/${layout.controlGroup}`, "--exec-opt", "native.cgroupdriver=cgroupfs"],
    ...daemonArguments,
  ];
  const command = ["nsenter", `--net=/run/netns/${layout.namespace}`];
  const isConnected = note.outside !== undefined && resolvers.length > 0;
  if (!isConnected && prelude === "") return [...command, ...daemon];
  // A resolver on the host's loopback does not answer inside: the engine sees a resolv.conf of its own.
  const resolverFile = join(layout.runFolder, "resolv.conf");
  await writeFile(resolverFile, resolvers.map((server) => `nameserver ${server}\n`).join(""));
  const steps = [isConnected ? 'mount --bind "$0" /etc/resolv.conf' : "", prelude, 'exec "$@"'];
  const script = steps.filter((step) => step !== "").join(" && ");
  return [...command, "unshare", "--mount", "--propagation", "slave", "sh", "-c", script, resolverFile, ...daemon];
}

async function emptyConfiguration(layout: EngineLayout): Promise<string> {
  const path = join(layout.runFolder, "daemon.json");
  await writeFile(path, "{}");
  return path;
}

function daemonEnvironment(outside: boolean): NodeJS.ProcessEnv {
  const environment: NodeJS.ProcessEnv = {
    PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    HOME: "/root",
  };
  for (const name of outside ? proxyVariables : []) {
    if (process.env[name] !== undefined) environment[name] = process.env[name];
  }
  return environment;
}

async function answers(socketPath: string): Promise<boolean> {
  try {
    await callEngine(socketPath, { path: "/_ping", timeoutMs: 5000 });
    return true;
  } catch {
    return false;
  }
}

/** Removes every container, and every network and volume that was made for one. Images stay. */
async function clearObjects(socketPath: string): Promise<void> {
  const containers = await callEngineJson(socketPath, { path: "/containers/json", query: { all: "true" } });
  const ids = (Array.isArray(containers) ? containers : []).map((container: { Id: string }) => container.Id);
  await Promise.all(
    ids.map((id) =>
      callEngine(socketPath, { method: "DELETE", path: `/containers/${id}`, query: { force: "true", v: "true" } }),
    ),
  );
  await callEngine(socketPath, { method: "POST", path: "/networks/prune" });
  await callEngine(socketPath, { method: "POST", path: "/volumes/prune" });
}
