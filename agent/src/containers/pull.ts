// Pulls an image and tells how far it is: Docker sends a line of JSON for each step of each layer.
import type { Readable } from "node:stream";
import type { ImageReference } from "@clodei/proto/image-reference";
import { type DockerClient, refusalOf } from "./docker-client.ts";
import { EngineError } from "./engine-error.ts";
import { jsonLines } from "./json-lines.ts";
import type { RegistryCredentials } from "./registry-auth.ts";

/** Bytes of all layers so far known. */
export interface PullBytes {
  readonly bytesDone: number;
  readonly bytesTotal: number;
}

/** Images of 30 GB at 10 MB/s, and some. */
const pullTimeoutMs = 2 * 60 * 60 * 1000;
/** A pull that says nothing for so long is stuck. Unpacking a layer of 10 GB says something every few seconds. */
const silenceTimeoutMs = 5 * 60 * 1000;
/** Progress is told at most so often. */
const progressIntervalMs = 250;
/** Docker's images have at most 127 layers; newer engines name other steps as well. */
const maxSteps = 4096;

/**
 * Pulls. Returns the manifest's digest, where the registry said one.
 * Throws EngineError: image_not_found, unauthorized, pull_failed or away.
 */
export async function pullImage(
  client: DockerClient,
  reference: ImageReference,
  credentials: RegistryCredentials | undefined,
  onProgress: (bytes: PullBytes) => void,
  signal: AbortSignal,
): Promise<string | undefined> {
  const silence = new AbortController();
  const timer = setTimeout(() => silence.abort(), silenceTimeoutMs);
  const limits = { signal: AbortSignal.any([signal, silence.signal]), timeoutMs: pullTimeoutMs };
  const progress = new PullProgressCounter(onProgress);
  try {
    await client.call("pull the image", limits, async (docker, abortSignal) => {
      const options = {
        fromImage: `${reference.registry}/${reference.repository}`,
        tag: reference.digest ?? reference.tag ?? "latest",
        abortSignal,
      };
      const stream = await docker.createImage(credentials ?? {}, options);
      for await (const line of jsonLines(stream as Readable)) {
        timer.refresh();
        progress.take(line);
      }
    });
  } catch (error) {
    signal.throwIfAborted();
    if (silence.signal.aborted) {
      throw new EngineError("pull_failed", `the pull stood still for ${silenceTimeoutMs / 1000} seconds`);
    }
    throw pullError(error, reference);
  } finally {
    clearTimeout(timer);
  }
  progress.finish();
  return progress.digest;
}

/** Adds up the layers. */
class PullProgressCounter {
  readonly #layers = new Map<string, { done: number; total: number }>();
  readonly #onProgress: (bytes: PullBytes) => void;
  #toldAtMs = -Infinity;
  digest: string | undefined;

  constructor(onProgress: (bytes: PullBytes) => void) {
    this.#onProgress = onProgress;
  }

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

  finish(): void {
    for (const id of this.#layers.keys()) this.#complete(id);
    this.#tell();
  }

  #download(id: string, detail: unknown): void {
    if (typeof detail !== "object" || detail === null) return;
    const done = "current" in detail && typeof detail.current === "number" ? detail.current : 0;
    const total = "total" in detail && typeof detail.total === "number" ? detail.total : 0;
    // A layer that is fetched again after a broken connection counts from the start; never go back.
    const before = this.#layers.get(id);
    this.#layers.set(id, { done: Math.max(done, before?.done ?? 0), total: Math.max(total, done, before?.total ?? 0) });
  }

  #complete(id: string): void {
    const layer = this.#layers.get(id);
    if (layer !== undefined) layer.done = layer.total;
  }

  #tell(): void {
    let bytesDone = 0;
    let bytesTotal = 0;
    for (const layer of this.#layers.values()) {
      bytesDone += layer.done;
      bytesTotal += layer.total;
    }
    this.#toldAtMs = performance.now();
    this.#onProgress({ bytesDone, bytesTotal });
  }
}

/** The engine answered 200 and named a failure later, within the stream. */
class PullRefusal extends Error {
  override readonly name = "PullRefusal";
}

/**
 * Docker tells failures of a registry apart by words alone: "no credentials" comes as status 500. Its words name this
 * node's resolver, proxy and addresses: they are kept as the cause, for the node's log, and the customer is told a
 * sentence of ours.
 */
function pullError(error: unknown, { registry, repository, tag, digest }: ImageReference): unknown {
  const cause = error instanceof EngineError ? error.cause : error;
  const refusal = refusalOf(error);
  const text = cause instanceof PullRefusal ? cause.message : refusal?.message;
  if (text === undefined) return error;
  const image = `${repository}${digest === undefined ? `:${tag ?? "latest"}` : `@${digest}`}`;
  if (refusal?.status === 404 || /manifest unknown|name unknown|repository does not exist|not found: /i.test(text)) {
    return new EngineError("image_not_found", `${registry} has no image ${image}`, { cause: error });
  }
  if (/unauthorized|authentication required|no basic auth credentials|denied|forbidden/i.test(text)) {
    const message = `${registry} does not give ${image} to this node: it may not exist, or ask for credentials that the node does not have`;
    return new EngineError("unauthorized", message, { cause: error });
  }
  const why = pullFailures.find(([words]) => words.test(text))?.[1] ?? "the registry did not give it";
  return new EngineError("pull_failed", `${image} could not be pulled from ${registry}: ${why}`, { cause: error });
}

/** What Docker's words mean, the most exact first. */
const pullFailures: readonly (readonly [RegExp, string])[] = [
  [/toomanyrequests|too many requests|429/i, "the registry limits how much is pulled, try again later"],
  [/no space left/i, "the node's disk is full"],
  [/x509|certificate|tls:/i, "the node does not trust the registry's certificate"],
  [/unsupported|no matching manifest/i, "it has no version for this node's processor"],
  [/digest|verification failed|unexpected EOF/i, "what came was damaged"],
  [/dial |lookup |timeout|refused|no route|unreachable|reset by peer/i, "the node cannot reach the registry"],
];
