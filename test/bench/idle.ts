// What a control plane and an agent cost that have nothing to do but to stay connected: built, with production's flags
// and times, the agent with eight simulated GPUs. The control plane's figures are of its own process: its embedded
// PostgreSQL, which production does not have, is not counted.
import { setTimeout as sleep } from "node:timers/promises";
import { TestSystem } from "../harness/system.ts";
import { type Figure, rounded } from "./figures.ts";
import { usageOf } from "./process-usage.ts";
import { buildForProduction, productionEnv } from "./production.ts";

/** After it, what the start left was collected, and the prepared networks stand. */
const settleMs = 60_000;
const windowMs = 60_000;

/** Runs the bench. */
export async function benchIdle(): Promise<Figure[]> {
  await using system = await TestSystem.start({
    agents: [{ name: "mad-1", simulateGpus: "8xH100-SXM" }],
    controlPlaneEnv: productionEnv,
    programs: await buildForProduction(),
  });
  await sleep(settleMs);
  const pids = [system.agent("mad-1").program.pid, system.controlPlane.program.pid];
  const [agent, controlPlane] = await usageOf(pids, windowMs);
  if (agent === undefined || controlPlane === undefined) throw new Error("a process was not watched");
  return [
    atMost("agent_rss_mb", agent.rssMib, "MiB", 100),
    atMost("control_plane_rss_mb", controlPlane.rssMib, "MiB", 130),
    atMost("agent_cpu_percent", agent.cpuPercent, "% of a core", 1),
    atMost("control_plane_cpu_percent", controlPlane.cpuPercent, "% of a core", 1),
  ];
}

function atMost(metric: string, value: number, unit: string, most: number): Figure {
  return {
    bench: "idle",
    metric,
    value: rounded(value),
    unit,
    baseline: null,
    ratio: null,
    goal: `<= ${most}`,
    ok: value <= most,
  };
}
