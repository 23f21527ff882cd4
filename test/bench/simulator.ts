// A process of simulated agents, from its parent's side.
import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";

/** Agents by their numbers, with a folder for each in `folder`. */
export interface AgentRange {
  readonly folder: string;
  readonly first: number;
  readonly count: number;
}

/** What a simulator is told. It answers each with its state. */
export type SimulatorCommand =
  | ({ readonly do: "enroll"; readonly url: string; readonly token: string } & AgentRange)
  /** `endpoint`: an echo server's, in place of the node listener's. */
  | ({ readonly do: "connect"; readonly endpoint?: string } & AgentRange)
  | { readonly do: "tell" };

/** What a simulator says. */
export interface SimulatorState {
  /** Links that run. */
  readonly connected: number;
  /** Sessions that began: more than links where one broke. */
  readonly welcomes: number;
}

/** A process of simulated agents. */
export class Simulator implements Disposable {
  readonly #child: ChildProcess;

  constructor() {
    // They stand for other machines: none of their threads may take the core that a server would have for itself.
    this.#child = fork(new URL("simulated-agents.ts", import.meta.url), {
      execPath: "nice",
      execArgv: ["-n", "19", process.execPath, ...process.execArgv],
    });
  }

  /** Has a command carried out. One at a time. */
  async tell(command: SimulatorCommand): Promise<SimulatorState> {
    const ended = new AbortController();
    this.#child.send(command);
    try {
      const [answer] = (await Promise.race([
        once(this.#child, "message", { signal: ended.signal }),
        once(this.#child, "exit", { signal: ended.signal }).then(() => [{ error: "it ended" }]),
      ])) as [SimulatorState | { readonly error: string }];
      if ("error" in answer) throw new Error(`a simulator failed: ${answer.error}`);
      return answer;
    } finally {
      ended.abort();
    }
  }

  [Symbol.dispose](): void {
    this.#child.kill("SIGKILL");
  }
}

/** Several processes, each with its share of the agents. */
export class Simulators implements Disposable {
  readonly #folder: string;
  readonly #simulators: readonly Simulator[];

  constructor(folder: string, processes: number) {
    this.#folder = folder;
    this.#simulators = Array.from({ length: processes }, () => new Simulator());
  }

  /** Enrolls the agents from `first` on. */
  async enroll(first: number, count: number, url: string, token: string): Promise<void> {
    await this.#share(first, count, (range) => ({ do: "enroll", url, token, ...range }));
  }

  /** Connects the agents from `first` on, to an echo server where its endpoint is given. */
  async connect(first: number, count: number, endpoint?: string): Promise<void> {
    await this.#share(first, count, (range) => ({
      do: "connect",
      ...(endpoint === undefined ? {} : { endpoint }),
      ...range,
    }));
  }

  /** Throws where not so many links stand since they began. */
  async expectSteady(count: number): Promise<void> {
    const states = await Promise.all(this.#simulators.map((simulator) => simulator.tell({ do: "tell" })));
    const connected = states.reduce((sum, state) => sum + state.connected, 0);
    const welcomes = states.reduce((sum, state) => sum + state.welcomes, 0);
    if (connected !== count || welcomes !== count)
      throw new Error(`of ${count} links ${connected} stand, after ${welcomes} sessions: the figures say nothing`);
  }

  async #share(first: number, count: number, command: (range: AgentRange) => SimulatorCommand): Promise<void> {
    const share = Math.ceil(count / this.#simulators.length);
    const shares = this.#simulators.map((simulator, index) =>
      simulator.tell(
        command({
          folder: this.#folder,
          first: first + index * share,
          count: Math.max(0, Math.min(share, count - index * share)),
        }),
      ),
    );
    await Promise.all(shares);
  }

  [Symbol.dispose](): void {
    for (const simulator of this.#simulators) simulator[Symbol.dispose]();
  }
}
