// The system as production runs it: built JavaScript with its flags, and the times of production.
import { dirname } from "node:path";
import { buildPrograms, builtPrograms, nodeArguments } from "../../tools/build/programs.ts";
import type { Programs } from "../harness/system.ts";

const root = dirname(dirname(import.meta.dirname));

/** Production's own: tests have shorter ones. */
export const productionEnv = {
  CLODEI_HEARTBEAT_INTERVAL_MS: "10000",
  CLODEI_LEASE_MS: "30000",
  CLODEI_LOG_LEVEL: "info",
} as const;

/** Builds the programs, and tells how they are run. */
export async function buildForProduction(): Promise<Programs> {
  await buildPrograms(root);
  return {
    controlPlane: nodeArguments(root, builtPrograms.controlPlane),
    agent: nodeArguments(root, builtPrograms.agent),
  };
}

/** What Node is given for a control plane. */
export const controlPlaneFlags: readonly string[] = builtPrograms.controlPlane.nodeFlags;
