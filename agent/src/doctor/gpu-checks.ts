// The node's GPUs, and whether the engine can give them to containers.

import { access, constants } from "node:fs/promises";
import { delimiter, join } from "node:path";
import { GpuHealth } from "@clodei/proto/gen/clodei/v1/inventory";
import type { GpuReadings } from "../inventory/readings.ts";
import type { EngineInfo } from "../containers/engine-info.ts";
import type { Finding } from "./finding.ts";
import { findingsOf } from "./finding.ts";

/** By this program Docker hands devices to a container; without it each start with a GPU fails. */
const toolkitHook = "nvidia-container-runtime-hook";

/** What the drivers tell. */
export function checkGpus({ gpus, error }: GpuReadings): Finding {
  const { ok, skipped, failed } = findingsOf("gpus");
  const remedy = "look at `nvidia-smi` and `dmesg`; after a driver's update, restart the node";
  if (error !== "") return failed(error, remedy);
  if (gpus.length === 0) return skipped("there are none, or no driver is installed");
  const sick = gpus.filter(({ health }) => health !== GpuHealth.HEALTHY);
  if (sick.length > 0) {
    const each = sick.map(({ index, uuid, healthMessage }) => `GPU ${index} (${uuid}): ${healthMessage}`);
    return failed(
      each.join("; "),
      "drain the node, then reset the GPU by `nvidia-smi --gpu-reset` or restart the node",
    );
  }
  const unknown = gpus.filter(({ model, simulated }) => model === "" && !simulated);
  if (unknown.length > 0) {
    const names = new Set(unknown.map(({ productName }) => productName));
    return failed(
      `no offer knows ${[...names].join(", ")}: it is shown, and never placed on`,
      "ask for its model to be added",
    );
  }
  const [first] = gpus;
  const driver = first === undefined || first.driverVersion === "" ? "" : `, driver ${first.driverVersion}`;
  return ok(`${gpus.length} healthy${driver}`);
}

/** NVIDIA's container toolkit, where there is a device for it. */
export async function checkToolkit(
  { gpus }: GpuReadings,
  engine: EngineInfo | undefined,
  searchPath: string,
): Promise<Finding> {
  const { ok, skipped, failed } = findingsOf("container-toolkit");
  // CUDA is NVIDIA's alone.
  if (!gpus.some(({ simulated, cudaVersion }) => !simulated && cudaVersion !== ""))
    return skipped("there is no NVIDIA GPU for it");
  const folders = [...searchPath.split(delimiter), "/usr/bin", "/usr/local/bin"].filter((folder) => folder !== "");
  const found = await Promise.all(
    folders.map((folder) =>
      access(join(folder, toolkitHook), constants.X_OK).then(
        () => true,
        () => false,
      ),
    ),
  );
  if (found.includes(true)) return ok(`${toolkitHook} is installed`);
  if (engine?.runtimes.includes("nvidia") === true) return ok("the engine has the runtime nvidia");
  return failed(
    `${toolkitHook} is not installed: no container can get a GPU`,
    "install nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`, and restart the engine",
  );
}
