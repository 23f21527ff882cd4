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

/** What its process is told. */
export type RegistryOrder = { readonly id: number } & (
  | { readonly kind: "fault"; readonly repository: string; readonly fault: RegistryFault | undefined }
  | { readonly kind: "answers" }
);

/** What it says when an order is carried out, with all answers until then. */
export interface RegistryReply {
  readonly id: number;
  readonly answers: RegistryAnswer[];
}

/** The way to a registry, until it is closed. */
export class FaultyRegistry implements AsyncDisposable {
  /** Begins references that are pulled this way: "127.0.0.1:5100". */
  readonly host: string;
  readonly #process: ChildProcess;
  #orders = 0;

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
    await this.#tell((id) => ({ id, kind: "fault", repository, fault }));
  }

  /** What was sent of a repository so far, each time in the order of requests. */
  async answers(repository: string): Promise<RegistryAnswer[]> {
    const all = await this.#tell((id) => ({ id, kind: "answers" }));
    return all.filter(({ path }) => path.startsWith(`/v2/${repository}/`));
  }

  /** Tests that run beside each other may tell at once: each hears its own reply. */
  async #tell(orderOf: (id: number) => RegistryOrder): Promise<RegistryAnswer[]> {
    this.#orders += 1;
    const order = orderOf(this.#orders);
    const { promise, resolve, reject } = Promise.withResolvers<RegistryAnswer[]>();
    const onReply = ({ id, answers }: RegistryReply): void => {
      if (id === order.id) resolve(answers);
    };
    const onExit = (): void => reject(new Error("the process of the faulty registry ended"));
    this.#process.on("message", onReply).once("exit", onExit);
    this.#process.send(order);
    try {
      return await promise;
    } finally {
      this.#process.off("message", onReply).off("exit", onExit);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    const ended = once(this.#process, "exit");
    this.#process.kill("SIGKILL");
    await ended;
  }
}
