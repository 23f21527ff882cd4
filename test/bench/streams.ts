// What a control plane spends on agents that are connected and have nothing to do but to beat every ten seconds: 500,
// 1,000 and 2,000 of them, simulated around the real agent's link and journal, in processes of their own. Beside it, in
// the same minute, as many of the same agents beat into a bare grpc-js server: what of the cost is gRPC's and TLS's.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { createClient } from "@clodei/sdk";
import { Program } from "../harness/process.ts";
import { keyIn, madrid, TestControlPlane } from "../harness/system.ts";
import { type Figure, rounded } from "./figures.ts";
import { rssMib, usageOf } from "./process-usage.ts";
import { buildForProduction, controlPlaneFlags, productionEnv } from "./production.ts";
import { Simulators } from "./simulator.ts";

const steps = [500, 1000, 2000] as const;
const most = steps[2];
const simulatorProcesses = 4;
/** A token is good for no more. */
const maxUses = 1000;
/** After it, a process has collected what connecting left. */
const settleMs = 30_000;
const memoryWindowMs = 10_000;
const windowMs = 60_000;
const kibPerAgentGoal = 125;
const cpuRatioGoal = 1.7;
const delayGoalMs = 20;
const eventLoopProbe = new URL("event-loop-probe.mjs", import.meta.url).href;

/** One machine is the whole fleet: what bounds an address is out of the way. */
const oneAddress = {
  CLODEI_ADDRESS_RATE: "1000000",
  CLODEI_PUBLIC_CONNECTIONS_PER_ADDRESS: "10000",
  CLODEI_NODE_CONNECTIONS_PER_ADDRESS: "18000",
} as const;

/** Says where the bench stands, to a person. */
function progress(line: string): void {
  if (process.stderr.isTTY) process.stderr.write(`${line}\n`);
}

/** What is resident once it is steady. */
async function steadyRssMib(pid: number): Promise<number> {
  await sleep(settleMs);
  const [usage] = await usageOf([pid], memoryWindowMs);
  return usage?.rssMib ?? (await rssMib(pid));
}

async function enrollAll(controlPlane: TestControlPlane, simulators: Simulators): Promise<void> {
  const apiKey = keyIn(await controlPlane.command("create-operator", "--name", "olga"));
  const { publicUrl: endpoint, caPem: ca } = controlPlane.listening;
  const operator = createClient({ endpoint, apiKey, ca });
  try {
    for (let first = 0; first < most; first += maxUses) {
      const { token } = await operator.nodes.createEnrollmentToken({ location: madrid, maxUses });
      await simulators.enroll(first, Math.min(maxUses, most - first), endpoint, token);
    }
  } finally {
    operator.close();
  }
}

/** The 99th percentile of the delay of each program's event loop, in the same window. The timer's own 10 ms are in it. */
async function eventLoopP99Ms(programs: readonly Program[]): Promise<number[]> {
  for (const { pid } of programs) process.kill(pid, "SIGUSR2");
  await sleep(windowMs);
  for (const { pid } of programs) process.kill(pid, "SIGUSR2");
  return Promise.all(
    programs.map((program) =>
      program.until("the event loop's delay", () => {
        const line = program.stdout.split("\n").find((text) => text.startsWith('{"eventLoop"'));
        return line === undefined ? undefined : (JSON.parse(line) as { eventLoop: { p99Ms: number } }).eventLoop.p99Ms;
      }),
    ),
  );
}

async function startEcho(dataFolder: string): Promise<{ program: Program; endpoint: string }> {
  const path = new URL("echo-server.ts", import.meta.url).pathname;
  // The same flags as the control plane: its memory is compared with it.
  const args = ["--import", eventLoopProbe, ...controlPlaneFlags, path, dataFolder];
  const program = new Program({ name: "echo server", args });
  const port = await program.until("its port", () => {
    const line = program.stdout.split("\n").find((text) => text.startsWith('{"port"'));
    return line === undefined ? undefined : (JSON.parse(line) as { port: number }).port;
  });
  return { program, endpoint: `localhost:${port}` };
}

/** KiB of each agent that was connected meanwhile. */
function kibPerAgent(beforeMib: number, afterMib: number, agents: number): number {
  return ((afterMib - beforeMib) * 1024) / agents;
}

/** Runs the bench. */
export async function benchStreams(): Promise<Figure[]> {
  const programs = await buildForProduction();
  await using closing = new AsyncDisposableStack();
  const folder = await mkdtemp(join(tmpdir(), "clodei-bench-"));
  closing.defer(() => rm(folder, { recursive: true, force: true }));
  const env = { ...productionEnv, ...oneAddress };
  const controlPlane = new TestControlPlane(join(folder, "control-plane"), env, {
    ...programs,
    controlPlane: ["--import", eventLoopProbe, ...programs.controlPlane],
  });
  closing.use(controlPlane);
  await controlPlane.start();
  const agents = closing.use(new Simulators(join(folder, "agents"), simulatorProcesses));
  progress(`enrolling ${most} agents`);
  await enrollAll(controlPlane, agents);
  // Anew: what enrolling them all took is no cost of a stream.
  await controlPlane.program.stop();
  await controlPlane.start();
  const { program } = controlPlane;
  const baseMib = await steadyRssMib(program.pid);
  const kib: number[] = [];
  let connected = 0;
  for (const step of steps) {
    progress(`connecting up to ${step}`);
    await agents.connect(connected, step - connected);
    connected = step;
    kib.push(kibPerAgent(baseMib, await steadyRssMib(program.pid), step));
  }
  const echo = await startEcho(controlPlane.folder);
  closing.use(echo.program);
  progress("measuring the event loop");
  // Beside that of a process that has nothing to do. Before the echo server has as many agents: on two cores they would
  // be in the way.
  const [delayMs, idleDelayMs] = await eventLoopP99Ms([program, echo.program]);
  const echoAgents = closing.use(new Simulators(join(folder, "agents"), simulatorProcesses));
  const echoBaseMib = await steadyRssMib(echo.program.pid);
  progress("connecting the same number to the echo server");
  await echoAgents.connect(0, most, echo.endpoint);
  const echoKib = kibPerAgent(echoBaseMib, await steadyRssMib(echo.program.pid), most);
  progress("measuring the CPU");
  const [ours, bare] = await usageOf([program.pid, echo.program.pid], windowMs);
  await agents.expectSteady(most);
  await echoAgents.expectSteady(most);
  return [
    ...steps.map((step, index) => memoryFigure(step, kib[index] ?? Number.NaN, step === most ? echoKib : null)),
    cpuFigure(ours?.cpuPercent ?? Number.NaN, bare?.cpuPercent ?? Number.NaN),
    delayFigure(delayMs ?? Number.NaN, idleDelayMs ?? Number.NaN),
  ];
}

function memoryFigure(agents: number, kib: number, bareKib: number | null): Figure {
  // The fewer there are, the more of what the process itself grew by falls to each: the goal is for the most.
  const hasGoal = agents === most;
  return {
    bench: "streams",
    metric: `kib_per_agent_${agents}`,
    value: rounded(kib),
    unit: "KiB",
    baseline: bareKib === null ? null : rounded(bareKib),
    ratio: bareKib === null ? null : rounded(kib / bareKib),
    goal: hasGoal ? `<= ${kibPerAgentGoal}` : "none",
    ok: !hasGoal || kib <= kibPerAgentGoal,
  };
}

function cpuFigure(percent: number, barePercent: number): Figure {
  const ratio = percent / barePercent;
  return {
    bench: "streams",
    metric: `cpu_${most}`,
    value: rounded(percent),
    unit: "% of a core",
    baseline: rounded(barePercent),
    ratio: rounded(ratio),
    goal: `ratio <= ${cpuRatioGoal}`,
    ok: ratio <= cpuRatioGoal,
  };
}

function delayFigure(ms: number, idleMs: number): Figure {
  return {
    bench: "streams",
    metric: "event_loop_delay_p99_ms",
    value: rounded(ms),
    unit: "ms",
    baseline: rounded(idleMs),
    ratio: rounded(ms / idleMs),
    goal: `<= ${delayGoalMs}`,
    ok: ms <= delayGoalMs,
  };
}
