// The calls to Docker that the baselines make, past every part of ours.
import { callEngine, callEngineJson } from "../../tools/engine/api.ts";

/** Creates a container, and returns its id. */
export async function createContainer(socketPath: string, body: object): Promise<string> {
  const created = await callEngineJson(socketPath, { method: "POST", path: "/containers/create", body });
  return (created as { readonly Id: string }).Id;
}

/** Removes a container, whatever it does. */
export async function removeContainer(socketPath: string, containerId: string): Promise<void> {
  await callEngine(socketPath, { method: "DELETE", path: `/containers/${containerId}`, query: { force: "true" } });
}
