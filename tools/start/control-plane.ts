// The control plane as a child process, and the two commands of it that make keys.
import { execFile } from "node:child_process";
import { readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { Child } from "./child.ts";
import { nextFreePort } from "./ports.ts";

/** The first start makes a database. */
const readyTimeoutMs = 90_000;
const commandTimeoutMs = 60_000;
/** Nobody but us talks to it while it stops: what is open then may be cut soon. */
const drainMs = 3000;
const host = "127.0.0.1";
const usualPorts = { public: 8443, node: 8444, operations: 9464 };

/** Where the control plane listens. */
export type ControlPlane = {
  readonly child: Child;
  readonly publicUrl: string;
  readonly nodeEndpoint: string;
  readonly operationsUrl: string;
  /** The CA of both listeners, in PEM. */
  readonly caFile: string;
  readonly ca: string;
};

/** What the control plane writes down once it serves. */
type Listening = {
  readonly publicUrl: string;
  readonly nodeEndpoint: string;
  readonly operationsUrl: string;
  readonly caPem: string;
};

/** Where a start puts things. */
export type Places = { readonly root: string; readonly dataFolder: string };

function program(root: string): string {
  return join(root, "control-plane/src/main.ts");
}

/** The environment without settings that would point the control plane of a demonstration elsewhere. */
function environment(): NodeJS.ProcessEnv {
  return Object.fromEntries(
    Object.entries(process.env).filter(([variable]) => !/^(?:CLODEI_|DATABASE_)/u.test(variable)),
  );
}

/** Ports of 127.0.0.1, by listener. */
type Ports = { readonly public: number; readonly node: number; readonly operations: number };

/** The system gives free ones at the moment of listening. */
const anyPorts: Ports = { public: 0, node: 0, operations: 0 };

/** Free at the moment of the look: another program may take one before the control plane listens. */
async function freePorts(): Promise<Ports> {
  const publicPort = await nextFreePort(host, usualPorts.public, []);
  const node = await nextFreePort(host, usualPorts.node, [publicPort]);
  const operations = await nextFreePort(host, usualPorts.operations, [publicPort, node]);
  return { public: publicPort, node, operations };
}

/** Starts the control plane and waits until it is ready. `onChild` learns of each process at once. */
export async function startControlPlane(
  places: Places,
  onChild: (child: Child) => Promise<void>,
  signal: AbortSignal,
): Promise<ControlPlane> {
  const start = (ports: Ports): Promise<ControlPlane> => startOn(ports, places, onChild, signal);
  try {
    return await start(await freePorts()).catch((error: unknown) => {
      if (!isPortTaken(error)) throw error;
      return start(anyPorts);
    });
  } catch (error) {
    throw isOfOtherVersion(error) ? otherVersion(places.dataFolder, error) : error;
  }
}

async function startOn(
  ports: Ports,
  { root, dataFolder }: Places,
  onChild: (child: Child) => Promise<void>,
  signal: AbortSignal,
): Promise<ControlPlane> {
  const settings = {
    "--data": dataFolder,
    "--public-host": host,
    "--public-port": ports.public,
    "--node-host": host,
    "--node-port": ports.node,
    "--operations-port": ports.operations,
    "--drain-ms": drainMs,
  };
  const listeningFile = join(dataFolder, "run", "listening.json");
  await rm(listeningFile, { force: true });
  const child = await Child.start({
    name: "the control plane",
    parameters: [program(root), "serve", ...Object.entries(settings).flatMap(([flag, value]) => [flag, String(value)])],
    environment: environment(),
    logFile: join(dataFolder, "logs", "control-plane.log"),
  });
  await onChild(child);
  // Not a request to its ports: whoever took one could answer it.
  const readListening = (): Promise<Listening | undefined> =>
    readFile(listeningFile, "utf8").then(
      (text) => JSON.parse(text) as Listening,
      () => undefined,
    );
  const listening = await child.waitFor("the control plane is ready", readyTimeoutMs, readListening, signal);
  const { publicUrl, nodeEndpoint, operationsUrl, caPem } = listening;
  const caFile = join(dataFolder, "ca", "certificate.pem");
  return { child, publicUrl, nodeEndpoint, operationsUrl, caFile, ca: caPem };
}

/** Whether the control plane came too late for a port: what it writes is in the message. */
function isPortTaken(error: unknown): boolean {
  return (
    error instanceof Error && /clodei-control-plane: cannot listen on .*: another process listens/u.test(error.message)
  );
}

/** Whether the control plane refused the database in the data folder: what it writes is in the message. */
function isOfOtherVersion(error: unknown): error is Error {
  return (
    error instanceof Error && /clodei-control-plane: (?:the database's schema is|migration \d)/u.test(error.message)
  );
}

function otherVersion(dataFolder: string, cause: Error): Error {
  const advice = `${dataFolder} was made by another version of Clodei, which this one cannot take over.
Use another folder:     npm start -- --data DIR
Or empty this one, with its instances, workspaces and keys:
                        npm start -- --data ${dataFolder} --reset`;
  return new Error(`${cause.message}\n${advice}`, { cause });
}

/** Runs a command of the control plane beside the running one, and returns what it printed. */
export async function runCommand({ root, dataFolder }: Places, parameters: readonly string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(process.execPath, [program(root), ...parameters, "--data", dataFolder], {
    env: environment(),
    timeout: commandTimeoutMs,
  });
  return stdout;
}
