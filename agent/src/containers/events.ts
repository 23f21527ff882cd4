// Hints that a container changed. They only say "look again": what is true is read from the engine afterwards, so a
// hint that is lost with a connection costs the time until the next regular look.
import { type InstanceId, parseId } from "@clodei/proto/ids";
import { containerLabels } from "@clodei/proto/node-link";
import type { AttemptKey } from "./container-body.ts";
import { jsonLines } from "./json-lines.ts";

/** A container's attempt, by its labels; undefined where they name none. */
export function attemptOf(labels: Readonly<Record<string, string | undefined>>): AttemptKey | undefined {
  const instanceId: InstanceId | undefined = parseId("ins", labels[containerLabels.instanceId] ?? "");
  const attemptText = labels[containerLabels.attempt] ?? "";
  if (instanceId === undefined || !/^[1-9][0-9]{0,9}$/.test(attemptText)) return undefined;
  return { instanceId, attempt: Number(attemptText) };
}

/** Reads the engine's stream of events until it breaks. */
export async function* attemptsOf(stream: AsyncIterable<Buffer>): AsyncGenerator<AttemptKey> {
  for await (const event of jsonLines(stream)) {
    const key = attemptOf(labelsOf(event));
    if (key !== undefined) yield key;
  }
}

function labelsOf(event: unknown): Record<string, string> {
  if (typeof event !== "object" || event === null || !("Actor" in event)) return {};
  const actor = event.Actor;
  if (typeof actor !== "object" || actor === null || !("Attributes" in actor)) return {};
  const attributes = actor.Attributes;
  if (typeof attributes !== "object" || attributes === null) return {};
  return Object.fromEntries(
    Object.entries(attributes).filter((entry): entry is [string, string] => typeof entry[1] === "string"),
  );
}
