// `clodei-agent doctor`: looks at everything that this node needs, changes nothing, and says what is wrong and how to
// mend it.

import type { DoctorConfig } from "../config.ts";
import { messageOf } from "../error-reason.ts";
import { IdentityStore } from "../identity/identity-store.ts";
import type { Identity } from "../identity/identity-store.ts";
import { statePaths } from "../identity/state-folder.ts";
import { readGpus, simulateGpus } from "../inventory/gpu.ts";
import type { GpuReadings } from "../inventory/readings.ts";
import { checkEngine, readEngine } from "./engine-checks.ts";
import type { EngineInfo } from "../containers/engine-info.ts";
import type { Finding } from "./finding.ts";
import { findingsOf } from "./finding.ts";
import { checkGpus, checkToolkit } from "./gpu-checks.ts";
import { checkCertificate, checkControlPlane, checkNodeLink } from "./link-checks.ts";
import { checkDisk, checkFileDescriptors, checkUserNamespaces } from "./machine-checks.ts";

/** Makes all checks, in the order in which a person would mend them. */
export async function examine(config: DoctorConfig): Promise<Finding[]> {
  const [engine, gpus, { identity, problem }] = await Promise.all([
    readEngine(config.dockerSocket),
    readings(config),
    loadIdentity(config.stateFolder),
  ]);
  const info: EngineInfo | undefined = "check" in engine ? undefined : engine;
  const [engineFindings, machine, toolkit, link, controlPlane] = await Promise.all([
    "check" in engine ? withoutEngine(engine) : checkEngine(engine),
    Promise.all([checkUserNamespaces(), checkFileDescriptors(), checkDisk(config.stateFolder, config.minFreeMib)]),
    checkToolkit(gpus, info, config.searchPath),
    identity === undefined ? notEnrolled("node-link") : checkNodeLink(identity),
    identity === undefined ? [notEnrolled("control-plane"), notEnrolled("clock")] : checkControlPlane(identity),
  ]);
  const certificate = checkCertificate(identity, problem, Date.now());
  return [...engineFindings, ...machine, checkGpus(gpus), toolkit, certificate, link, ...controlPlane];
}

async function readings({ simulatedGpus, nvidiaSmi, rocmSmi, searchPath }: DoctorConfig): Promise<GpuReadings> {
  if (simulatedGpus !== undefined) return simulateGpus(simulatedGpus, "doctor");
  return await readGpus({ nvidiaSmi, rocmSmi, searchPath });
}

async function loadIdentity(stateFolder: string): Promise<{ identity: Identity | undefined; problem: string }> {
  try {
    return { identity: await new IdentityStore(statePaths(stateFolder).identity).load(), problem: "" };
  } catch (error) {
    return { identity: undefined, problem: messageOf(error) };
  }
}

function withoutEngine(finding: Finding): Finding[] {
  const others = ["cgroups", "seccomp", "docker-logs"];
  return [finding, ...others.map((check) => findingsOf(check).skipped("the engine cannot be asked"))];
}

function notEnrolled(check: string): Finding {
  return findingsOf(check).skipped("the node is not enrolled");
}
