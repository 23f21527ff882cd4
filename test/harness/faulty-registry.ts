// A bad network before a real registry: answers that are slow, break off, go silent or are damaged, and a record of what
// was sent. It stands in a process of its own, because the registry is in the engine's network namespace.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import type { TestRegistry } from "./registry.ts";

const program = new URL("faulty-registry-program.ts", import.meta.url).pathname;

/** What happens to answers. */
export type RegistryFault = (
  | { readonly kind: "slow"; readonly bytesPerSecond: number }
  /** The connection is reset. */
  | { readonly kind: "cut"; readonly afterBytes: number }
  /** The connection stays open, and nothing follows. */
  | { readonly kind: "stall"; readonly afterBytes: number }
  /** Bits are turned; a manifest names another layer. */
  | { readonly kind: "damage" }
) & {
  /** Which answers. Layers and the image's configuration where absent. */
  readonly of?: "blobs" | "manifests";
  /** Only answers of at least so many bytes: layers, and not the configuration. */
  readonly leastBytes?: number;
  /** How many answers; all where absent. */
  readonly times?: number;
};

/** An answer to a GET. */
export interface RegistryAnswer {
  readonly path: string;
  /** What of it was asked for. */
  readonly range: string | undefined;
  readonly status: number;
  /** How many bytes of the body were sent. */
  readonly bytes: number;
}

/** What its process is told. It answers with all answers so far. */
export type RegistryOrder =
  | { readonly kind: "fault"; readonly repository: string; readonly fault: RegistryFault | undefined }
  | { readonly kind: "answers" };

/** The way to a registry, until it is closed. */
export class FaultyRegistry implements AsyncDisposable {
  /** Begins references that are pulled this way: "127.0.0.1:5100". */
  readonly host: string;
  readonly #process: ChildProcess;

  private constructor(host: string, child: ChildProcess) {
    this.host = host;
    this.#process = child;
  }

  /** @param port On the loopback of the engine's namespace. Another engine may use the same. */
  static async start(engine: PrivateEngine, registry: TestRegistry, port = 5100): Promise<FaultyRegistry> {
    // Its run folder among the arguments, so that an engine's clearing also ends this.
    const args = [process.execPath, program, String(port), registry.host, engine.runFolder];
    const child = spawn("nsenter", [`--net=/run/netns/${engine.namespace}`, ...args], {
      stdio: ["ignore", "inherit", "inherit", "ipc"],
    });
    const faulty = new FaultyRegistry(`127.0.0.1:${port}`, child);
    const failed = once(child, "exit").then(([code]) => {
      throw new Error(`the process of the faulty registry ended with ${code}`);
    });
    await Promise.race([once(child, "message"), failed]);
    failed.catch(() => {});
    return faulty;
  }

  /** From now on a repository's answers have this fault; none where it is absent. */
  async break(repository: string, fault?: RegistryFault): Promise<void> {
    await this.#tell({ kind: "fault", repository, fault });
  }

  /** What was sent of a repository so far, each time in the order of requests. */
  async answers(repository: string): Promise<RegistryAnswer[]> {
    const all = await this.#tell({ kind: "answers" });
    return all.filter(({ path }) => path.startsWith(`/v2/${repository}/`));
  }

  async #tell(order: RegistryOrder): Promise<RegistryAnswer[]> {
    const answered = once(this.#process, "message");
    this.#process.send(order);
    const [answers] = (await answered) as [RegistryAnswer[]];
    return answers;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    const ended = once(this.#process, "exit");
    this.#process.kill("SIGKILL");
    await ended;
  }
}
