// Why a pull failed, from Docker's words.
import type { ImageReference } from "@clodei/proto/image-reference";
import { refusalOf } from "./docker-client.ts";
import { EngineError, type EngineErrorKind } from "./engine-error.ts";
import { PullRefusal } from "./pull-progress.ts";

/** An image for a person, without its registry. */
export function describeImage({ repository, tag, digest }: ImageReference): string {
  return `${repository}${digest === undefined ? `:${tag ?? "latest"}` : `@${digest}`}`;
}

/**
 * Docker tells failures of a registry apart by words alone: "no credentials" comes as status 500. Its words name this
 * node's resolver, proxy and addresses: they are kept as the cause, for the node's log, and the customer is told a
 * sentence of ours. What is no failure of the pull itself is returned as it is.
 */
export function pullError(error: unknown, reference: ImageReference): unknown {
  const cause = error instanceof EngineError ? error.cause : error;
  const refusal = refusalOf(error);
  const words = cause instanceof PullRefusal ? cause.message : refusal?.message;
  if (words === undefined) return error;
  const text = withoutNames(words, reference);
  const image = describeImage(reference);
  const { registry } = reference;
  if (refusal?.status === 404 || /manifest unknown|name unknown|repository does not exist|not found: /i.test(text)) {
    return new EngineError("image_not_found", `${registry} has no image ${image}`, { cause: error });
  }
  if (
    /unauthorized|authentication required|no basic auth credentials|access .*denied|denied: |forbidden|error parsing HTTP 40[13] /i.test(
      text,
    )
  ) {
    const message = `${registry} does not give ${image} to this node: it may not exist, or ask for credentials that the node does not have`;
    return new EngineError("unauthorized", message, { cause: error });
  }
  const [, kind, why] = pullFailures.find(([pattern]) => pattern.test(text)) ?? otherFailure;
  return new EngineError(kind, `${image} could not be pulled from ${registry}: ${why}`, { cause: error });
}

/** Names, which may hold any of the words that are looked for: a digest with "429" in it is no limit of the registry. */
function withoutNames(words: string, { registry, repository }: ImageReference): string {
  return (
    words
      .replaceAll(/https?:\/\/[^\s"]+/g, "an address")
      .replaceAll(`${registry}/${repository}`, "the image")
      .replaceAll(registry, "the registry")
      // What came instead of an answer: a proxy's page may hold any words.
      .replace(/(response body: .*?): ".*"$/s, "$1")
      .replaceAll(/sha256:[0-9a-f]+/g, "a digest")
  );
}

type PullFailure = readonly [pattern: RegExp, kind: EngineErrorKind, why: string];

const otherFailure: PullFailure = [/^/, "pull_failed", "the registry did not give it"];

/** What Docker's words mean, the most exact first. */
const pullFailures: readonly PullFailure[] = [
  [/error parsing HTTP \d+ response/i, "pull_failed", "what answered there did not speak as a registry"],
  [/toomanyrequests|too many requests/i, "pull_failed", "the registry limits how much is pulled, try again later"],
  [/no space left/i, "pull_failed", "the node's disk is full"],
  [/x509|certificate|tls:/i, "pull_failed", "the node does not trust the registry's certificate"],
  [/unsupported|no matching manifest/i, "pull_failed", "it has no version for this node's processor"],
  [/blob unknown|unknown blob/i, "damaged", "the registry lacks a part of it"],
  [/verification failed|invalid character|JSON/i, "damaged", "what came is not what its digest says"],
  [/dial |lookup |timeout|refused|no route|unreachable/i, "unreachable", "the node cannot reach the registry"],
  [/EOF|reset by peer|broken pipe|closed/i, "interrupted", "the connection to the registry broke again and again"],
];
