// How far a pull is, from the lines in which Docker tells each step of each layer.

/** Bytes of all layers so far known. */
export interface PullBytes {
  readonly bytesDone: number;
  readonly bytesTotal: number;
}

/** Progress is told at most so often. */
const progressIntervalMs = 250;
/** Docker's images have at most 127 layers; newer engines name other steps as well. */
const maxSteps = 4096;

/** The engine answered 200 and named a failure later, within the stream. */
export class PullRefusal extends Error {
  override readonly name = "PullRefusal";
}

/** Adds up the layers of a pull, line by line. What it tells never goes back. */
export class PullProgressCounter {
  readonly #layers = new Map<string, { done: number; total: number }>();
  readonly #onProgress: (bytes: PullBytes) => void;
  #toldAtMs = -Infinity;
  /** The manifest's, once the engine has said it. */
  digest: string | undefined;

  constructor(onProgress: (bytes: PullBytes) => void) {
    this.#onProgress = onProgress;
  }

  /** How far it is. */
  get bytes(): PullBytes {
    const layers = [...this.#layers.values()];
    return {
      bytesDone: layers.reduce((sum, { done }) => sum + done, 0),
      bytesTotal: layers.reduce((sum, { total }) => sum + total, 0),
    };
  }

  /** Takes a line of the engine. Throws PullRefusal where it says that the pull failed. */
  take(line: unknown): void {
    if (typeof line !== "object" || line === null) return;
    if ("error" in line && typeof line.error === "string") throw new PullRefusal(line.error);
    const status = "status" in line && typeof line.status === "string" ? line.status : "";
    const digest = /^Digest: (sha256:[0-9a-f]{64})$/.exec(status)?.[1];
    if (digest !== undefined) this.digest = digest;
    const id = "id" in line && typeof line.id === "string" ? line.id : undefined;
    if (id === undefined || (!this.#layers.has(id) && this.#layers.size >= maxSteps)) return;
    const detail: unknown = "progressDetail" in line ? line.progressDetail : undefined;
    if (status === "Downloading") this.#download(id, detail);
    else if (status === "Download complete" || status === "Pull complete") this.#complete(id);
    else return;
    if (performance.now() - this.#toldAtMs >= progressIntervalMs) this.#tell();
  }

  /** Everything has arrived. */
  finish(): void {
    for (const id of this.#layers.keys()) this.#complete(id);
    this.#tell();
  }

  #download(id: string, detail: unknown): void {
    if (typeof detail !== "object" || detail === null) return;
    const done = "current" in detail && typeof detail.current === "number" ? detail.current : 0;
    const total = "total" in detail && typeof detail.total === "number" ? detail.total : 0;
    const before = this.#layers.get(id) ?? { done: 0, total: 0 };
    // After a broken connection Docker counts what is left of the layer, or, from a registry that cannot go on in the
    // middle, the whole layer from its start. Never go back.
    const had = total > 0 && total < before.total ? before.total - total : 0;
    this.#layers.set(id, { done: Math.max(had + done, before.done), total: Math.max(had + total, done, before.total) });
  }

  #complete(id: string): void {
    const layer = this.#layers.get(id);
    if (layer !== undefined) layer.done = layer.total;
  }

  #tell(): void {
    this.#toldAtMs = performance.now();
    this.#onProgress(this.bytes);
  }
}
