// This machine as a node: enrolled once, and run as long as the start runs.
import { execFile } from "node:child_process";
import { readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { createClient } from "@clodei/sdk";
import { Child } from "./child.ts";
import type { ControlPlane, Places } from "./control-plane.ts";

const enrollTimeoutMs = 60_000;
const readyTimeoutMs = 60_000;
/** The first datacenter of the fleet stands in for this machine's place. */
const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };

/** What the agent writes down about its enrollment, as far as we read and correct it. */
type NodeFile = { readonly nodeId: string; readonly controlPlaneUrl: string; readonly nodeEndpoint: string };

const stateOf = (places: Places): string => join(places.dataFolder, "agent");
const program = (places: Places): string => join(places.root, "agent/src/main.ts");

function environment(extra: Readonly<Record<string, string>>): NodeJS.ProcessEnv {
  const inherited = Object.entries(process.env).filter(([variable]) => !variable.startsWith("CLODEI_"));
  return { ...Object.fromEntries(inherited), ...extra };
}

async function readNodeFile(places: Places): Promise<NodeFile | undefined> {
  try {
    return JSON.parse(await readFile(join(stateOf(places), "identity", "node.json"), "utf8")) as NodeFile;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** Enrolled on other ports: the same control plane has moved, as this start chose the ports that are free now. */
async function correctAddresses(places: Places, known: NodeFile, plane: ControlPlane): Promise<void> {
  if (known.controlPlaneUrl === plane.publicUrl && known.nodeEndpoint === plane.nodeEndpoint) return;
  const file = join(stateOf(places), "identity", "node.json");
  const corrected = { ...known, controlPlaneUrl: plane.publicUrl, nodeEndpoint: plane.nodeEndpoint };
  await writeFile(`${file}.new`, `${JSON.stringify(corrected, undefined, 2)}\n`, { mode: 0o600 });
  await rename(`${file}.new`, file);
}

/** Enrolls this machine unless it is enrolled. Returns the node's id. */
export async function enrollNode(places: Places, plane: ControlPlane, operatorKey: string): Promise<string> {
  const known = await readNodeFile(places);
  if (known !== undefined) {
    await correctAddresses(places, known, plane);
    return known.nodeId;
  }
  using operator = createClient({ endpoint: plane.publicUrl, apiKey: operatorKey, ca: plane.ca });
  const { token } = await operator.nodes.createEnrollmentToken({ location });
  const parameters = [program(places), "enroll", "--state", stateOf(places), "--control-plane", plane.publicUrl];
  await promisify(execFile)(process.execPath, parameters, {
    // Not on the command line, which every user of the machine can read.
    env: environment({ CLODEI_ENROLLMENT_TOKEN: token }),
    timeout: enrollTimeoutMs,
  });
  const enrolled = await readNodeFile(places);
  if (enrolled === undefined) throw new Error("the agent enrolled and wrote no identity");
  return enrolled.nodeId;
}

/** How the agent is run. */
export type AgentOptions = {
  readonly places: Places;
  readonly plane: ControlPlane;
  readonly operatorKey: string;
  readonly nodeId: string;
  readonly dockerSocket: string;
  readonly simulatedGpus: string | undefined;
};

/** Starts the agent and waits until the control plane counts the node as ready. */
export async function startAgent(
  options: AgentOptions,
  onChild: (child: Child) => Promise<void>,
  signal: AbortSignal,
): Promise<Child> {
  const { places, plane, operatorKey, nodeId, dockerSocket, simulatedGpus } = options;
  const child = await Child.start({
    name: "the agent",
    parameters: [
      program(places),
      "run",
      ...["--state", stateOf(places), "--docker-socket", dockerSocket],
      ...(simulatedGpus === undefined ? [] : ["--simulate-gpus", simulatedGpus]),
    ],
    environment: environment({}),
    logFile: join(places.dataFolder, "logs", "agent.log"),
  });
  await onChild(child);
  using operator = createClient({ endpoint: plane.publicUrl, apiKey: operatorKey, ca: plane.ca });
  const isReady = async (): Promise<true | undefined> => {
    const node = await operator.nodes.get(nodeId, { signal });
    return node.connected && node.acceptingWork ? true : undefined;
  };
  await child.waitFor("the node is connected and takes work", readyTimeoutMs, isReady, signal);
  return child;
}
