// Pulls an image and tells how far it is: Docker sends a line of JSON for each step of each layer.
import type { Readable } from "node:stream";
import type { ImageReference } from "@clodei/proto/image-reference";
import { type DockerClient, refusalOf } from "./docker-client.ts";
import { EngineError, type EngineErrorKind } from "./engine-error.ts";
import { jsonLines } from "./json-lines.ts";
import { type PullBytes, PullProgressCounter, PullRefusal } from "./pull-progress.ts";
import type { RegistryCredentials } from "./registry-auth.ts";

/** Images of 30 GB at 10 MB/s, and some. */
const pullTimeoutMs = 2 * 60 * 60 * 1000;
/** A pull that says nothing for so long is stuck. Unpacking a layer of 10 GB says something every few seconds. */
export const defaultPullSilenceMs = 5 * 60 * 1000;
/** What is pulled, and how. */
export interface PullOptions {
  readonly reference: ImageReference;
  readonly credentials: RegistryCredentials | undefined;
  /** A pull that says nothing for so long is given up. */
  readonly silenceMs: number;
  /** Is told at the start, of no bytes, and of each step. */
  readonly onProgress: (bytes: PullBytes) => void;
  readonly signal: AbortSignal;
}

/**
 * Pulls. The engine itself takes up a connection that broke where it was, five times with growing pauses; a pull that
 * failed in spite of it begins anew. Returns the manifest's digest, where the registry said one.
 * Throws EngineError: away, or one of the kinds of an image that cannot be had.
 */
export async function pullImage(client: DockerClient, options: PullOptions): Promise<string | undefined> {
  const { reference, credentials, silenceMs, onProgress, signal } = options;
  const silence = new AbortController();
  const timer = setTimeout(() => silence.abort(), silenceMs);
  const limits = { signal: AbortSignal.any([signal, silence.signal]), timeoutMs: pullTimeoutMs };
  const progress = new PullProgressCounter(onProgress);
  // A registry that never answers is a pull as well.
  onProgress({ bytesDone: 0, bytesTotal: 0 });
  try {
    await client.call("pull the image", limits, async (docker, abortSignal) => {
      const query = {
        fromImage: `${reference.registry}/${reference.repository}`,
        tag: reference.digest ?? reference.tag ?? "latest",
        abortSignal,
      };
      const stream = await docker.createImage(credentials ?? {}, query);
      for await (const line of jsonLines(stream as Readable)) {
        timer.refresh();
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

function describeImage({ repository, tag, digest }: ImageReference): string {
  return `${repository}${digest === undefined ? `:${tag ?? "latest"}` : `@${digest}`}`;
}

/**
 * Docker tells failures of a registry apart by words alone: "no credentials" comes as status 500. Its words name this
 * node's resolver, proxy and addresses: they are kept as the cause, for the node's log, and the customer is told a
 * sentence of ours.
 */
function pullError(error: unknown, reference: ImageReference): unknown {
  const cause = error instanceof EngineError ? error.cause : error;
  const refusal = refusalOf(error);
  const words = cause instanceof PullRefusal ? cause.message : refusal?.message;
  if (words === undefined) return error;
  const text = words.replaceAll(/sha256:[0-9a-f]+/g, "a digest");
  const image = describeImage(reference);
  const { registry } = reference;
  if (refusal?.status === 404 || /manifest unknown|name unknown|repository does not exist|not found: /i.test(text)) {
    return new EngineError("image_not_found", `${registry} has no image ${image}`, { cause: error });
  }
  if (/unauthorized|authentication required|no basic auth credentials|denied|forbidden/i.test(text)) {
    const message = `${registry} does not give ${image} to this node: it may not exist, or ask for credentials that the node does not have`;
    return new EngineError("unauthorized", message, { cause: error });
  }
  const [, kind, why] = pullFailures.find(([pattern]) => pattern.test(text)) ?? otherFailure;
  return new EngineError(kind, `${image} could not be pulled from ${registry}: ${why}`, { cause: error });
}

type PullFailure = readonly [pattern: RegExp, kind: EngineErrorKind, why: string];

const otherFailure: PullFailure = [/^/, "pull_failed", "the registry did not give it"];

/** What Docker's words mean, the most exact first. */
const pullFailures: readonly PullFailure[] = [
  [/toomanyrequests|too many requests/i, "pull_failed", "the registry limits how much is pulled, try again later"],
  [/no space left/i, "pull_failed", "the node's disk is full"],
  [/x509|certificate|tls:/i, "pull_failed", "the node does not trust the registry's certificate"],
  [/unsupported|no matching manifest/i, "pull_failed", "it has no version for this node's processor"],
  [/blob unknown|unknown blob/i, "damaged", "the registry lacks a part of it"],
  [/verification failed|invalid character|JSON/i, "damaged", "what came is not what its digest says"],
  [/dial |lookup |timeout|refused|no route|unreachable/i, "unreachable", "the node cannot reach the registry"],
  [/EOF|reset by peer|broken pipe|closed/i, "interrupted", "the connection to the registry broke again and again"],
];
