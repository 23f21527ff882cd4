// Shows a user's instances in a page, and every change of them. A bundler that knows the condition "browser" makes a
// script of it, such as esbuild --bundle --format=esm; docs/clients.md tells what the control plane must be told.
import { createClient, type Instance } from "@clodei/sdk";

/**
 * Goes on until the signal is aborted, which it rejects with.
 *
 * @param token The user's token, from wherever the page keeps it. Asked for before every request.
 * @param show Called for each instance that there is, and after each change.
 */
export async function showInstances(
  endpoint: string,
  token: () => Promise<string>,
  show: (instance: Instance) => void,
  signal: AbortSignal,
): Promise<void> {
  using client = createClient({ endpoint, token });
  for await (const event of client.instances.watch({ signal })) {
    if (event.type === "snapshot" || event.type === "change") show(event.value);
  }
}
