// Pulls an image and tells how far it is: Docker sends a line of JSON for each step of each layer.
import type { ImageReference } from "@clodei/proto/image-reference";
import type { DockerClient, EngineCall } from "./docker-client.ts";
import { EngineError } from "./engine-error.ts";
import { jsonLines } from "./json-lines.ts";
import { describeImage, pullError } from "./pull-failure.ts";
import { type PullBytes, PullProgressCounter } from "./pull-progress.ts";
import type { RegistryCredentials } from "./registry-auth.ts";

/** Images of 30 GB at 10 MB/s, and some. */
const pullTimeoutMs = 2 * 60 * 60 * 1000;
/** A pull that says nothing for so long is stuck. Unpacking a layer of 10 GB says something every few seconds. */
export const defaultPullSilenceMs = 5 * 60 * 1000;

/** What is pulled, and how. */
export interface PullOptions {
  readonly reference: ImageReference;
  readonly credentials: RegistryCredentials | undefined;
  /** A pull is given up when neither it nor any other of this agent said anything for so long. */
  readonly silenceMs: number;
  /** Of all pulls: the engine fetches some layers at a time, and those of a pull may wait for another's. */
  readonly activity: PullActivity;
  /** Is told at the start, of no bytes, and of each step. */
  readonly onProgress: (bytes: PullBytes) => void;
  readonly signal: AbortSignal;
}

/** When the last word of any pull came, by `performance.now()`. */
export type PullActivity = { heardMs: number };

/**
 * Pulls. The engine itself takes up a connection that broke where it was, five times with growing pauses; a pull that
 * failed in spite of it begins anew. Returns the manifest's digest, where the registry said one.
 * Throws EngineError: away, or one of the kinds of an image that cannot be had.
 */
export async function pullImage(client: DockerClient, options: PullOptions): Promise<string | undefined> {
  const { reference, credentials, silenceMs, activity, onProgress, signal } = options;
  const silence = new AbortController();
  activity.heardMs = performance.now();
  const listen = (): void => {
    const leftMs = silenceMs - (performance.now() - activity.heardMs);
    if (leftMs <= 0) silence.abort();
    else timer = setTimeout(listen, leftMs);
  };
  let timer = setTimeout(listen, silenceMs);
  const progress = new PullProgressCounter(onProgress);
  // A registry that never answers is a pull as well.
  onProgress({ bytesDone: 0, bytesTotal: 0 });
  try {
    const end = AbortSignal.any([signal, silence.signal]);
    await client.read("pull the image", pullCall(reference, credentials), end, async (body) => {
      for await (const line of jsonLines(body)) {
        activity.heardMs = performance.now();
        progress.take(line);
      }
    });
  } catch (error) {
    signal.throwIfAborted();
    if (silence.signal.aborted) {
      const message = `${describeImage(reference)} could not be pulled from ${reference.registry}: nothing came for ${silenceMs / 1000} seconds`;
      throw new EngineError("stalled", message);
    }
    throw pullError(error, reference);
  } finally {
    clearTimeout(timer);
  }
  progress.finish();
  return progress.digest;
}

function pullCall(
  { registry, repository, digest, tag }: ImageReference,
  credentials: RegistryCredentials | undefined,
): EngineCall {
  // As Docker decodes it: base64 for URLs, and padded.
  const json = Buffer.from(JSON.stringify(credentials ?? {})).toString("base64");
  return {
    method: "POST",
    path: "/images/create",
    query: { fromImage: `${registry}/${repository}`, tag: digest ?? tag ?? "latest" },
    headers: { "x-registry-auth": json.replaceAll("+", "-").replaceAll("/", "_") },
    timeoutMs: pullTimeoutMs,
  };
}
