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
/** The name in the certificate by which everything here reaches it. */
const name = "localhost";
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

async function portsOf(): Promise<{ publicPort: number; nodePort: number; operationsPort: number }> {
  const publicPort = await nextFreePort(host, usualPorts.public, []);
  const nodePort = await nextFreePort(host, usualPorts.node, [publicPort]);
  const operationsPort = await nextFreePort(host, usualPorts.operations, [publicPort, nodePort]);
  return { publicPort, nodePort, operationsPort };
}

/** Starts the control plane and waits until it is ready. `onChild` learns of the process at once. */
export async function startControlPlane(
  { root, dataFolder }: Places,
  onChild: (child: Child) => Promise<void>,
  signal: AbortSignal,
): Promise<ControlPlane> {
  const { publicPort, nodePort, operationsPort } = await portsOf();
  const settings = {
    "--data": dataFolder,
    "--public-host": host,
    "--public-port": publicPort,
    "--node-host": host,
    "--node-port": nodePort,
    "--operations-port": operationsPort,
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
  const operationsUrl = `http://${host}:${operationsPort}`;
  const isReady = async (): Promise<true | undefined> => {
    const response = await fetch(`${operationsUrl}/readyz`, { signal }).catch(() => undefined);
    return response?.status === 200 ? true : undefined;
  };
  try {
    await child.waitFor("the control plane is ready", readyTimeoutMs, isReady, signal);
  } catch (error) {
    throw isOfOtherVersion(error) ? otherVersion(dataFolder, error) : error;
  }
  const caFile = join(dataFolder, "ca", "certificate.pem");
  return {
    child,
    publicUrl: `https://${name}:${publicPort}`,
    nodeEndpoint: `${name}:${nodePort}`,
    operationsUrl,
    caFile,
    ca: await readFile(caFile, "utf8"),
  };
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
