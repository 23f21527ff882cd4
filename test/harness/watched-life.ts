// An instance's life as a client sees it on whatever way its streams take: a proxy, a pooler, a database of one's own.
import assert from "node:assert/strict";
import type { ClodeiClient, RunSpec } from "@clodei/sdk";
import { eventually } from "./eventually.ts";
import { testImage } from "./system.ts";

const patienceMs = 60_000;

/** Creates an instance, follows its output, stops and deletes it, and watches all of that. */
export async function checkWatchedLife(client: ClodeiClient, spec: Pick<RunSpec, "gpu"> = {}): Promise<void> {
  const watching = new AbortController();
  const types: string[] = [];
  const states = new Set<number>();
  const watch = (async () => {
    for await (const event of client.instances.watch({ signal: watching.signal })) {
      types.push(event.type);
      if ("value" in event) states.add(event.value.state);
    }
  })().catch((error: unknown) => {
    if (!watching.signal.aborted) throw error;
  });
  // It writes its second line when we stop it: what came before was not held back on the way.
  const instance = await client.instances.run({
    image: testImage,
    command: ["sh", "-c", "trap 'echo second; exit 0' TERM; echo first; while :; do sleep 0.1; done"],
    cpuMillis: 100,
    memoryMib: 32,
    ...spec,
  });
  const lines: string[] = [];
  for await (const line of instance.logs({ follow: true }).lines()) {
    lines.push(line.text);
    if (lines.length === 1) await instance.stop();
  }
  assert.deepEqual(lines, ["first", "second"]);
  await instance.delete();
  await instance.waitUntilDeleted({ timeoutMs: patienceMs });
  await eventually(patienceMs, () => {
    assert.ok(states.size > 2, [...states].join(" "));
    assert.ok(types.length > 3, types.join(" "));
  });
  watching.abort();
  await watch;
}
