// The one screen at the end of a start: where everything listens, the keys, and lines to paste.
import type { ControlPlane } from "./control-plane.ts";
import type { Engine } from "./engine.ts";
import type { FirstRun } from "./first-instance.ts";
import type { Keys } from "./keys.ts";

/** What the screen tells of. */
export type Screen = {
  readonly plane: ControlPlane;
  readonly keys: Keys;
  readonly engine: Engine;
  readonly first: FirstRun;
  readonly dataFolder: string;
  /** What programs of the SDK read. */
  readonly settingsFile: string;
};

/** Lines that can be pasted into a shell in the checkout as they stand. */
export function pasteLines(
  screen: Pick<Screen, "plane" | "keys" | "settingsFile">,
): readonly (readonly [string, string])[] {
  const { plane, keys, settingsFile } = screen;
  const { publicUrl, caFile } = plane;
  const authority = publicUrl.replace("https://", "");
  const json = `-H 'Content-Type: application/json' -d '{}'`;
  const program = (name: string): string => `node_modules/.bin/node --env-file=${settingsFile} sdk/examples/${name}`;
  const bearer = (key: string): string => `-H 'Authorization: Bearer ${key}'`;
  return [
    ["SDK program", program("first-instance.ts")],
    ["SDK program with a GPU", program("gpu.ts")],
    [
      "buf curl",
      `node_modules/.bin/buf curl --cacert ${caFile} \\\n  ${bearer(keys.apiKey)} \\\n  ${publicUrl}/clodei.v1.CatalogService/ListOffers`,
    ],
    [
      "grpcurl, as operator",
      `grpcurl -cacert ${caFile} \\\n  ${bearer(keys.operatorKey)} \\\n  ${authority} clodei.v1.NodeService/ListNodes`,
    ],
    [
      "curl",
      `curl -sS --cacert ${caFile} \\\n  ${bearer(keys.apiKey)} \\\n  ${json} ${publicUrl}/clodei.v1.IdentityService/WhoAmI`,
    ],
  ];
}

/** The screen's text. */
export function screenOf(screen: Screen): string {
  const { plane, keys, engine, first, dataFolder } = screen;
  const age = keys.areNew ? "new, kept in" : "the same as before, from";
  const rows = [
    ["public API", `${plane.publicUrl}  (Connect, gRPC, gRPC-Web, JSON)`],
    ["nodes", `${plane.nodeEndpoint}  (mutual TLS)`],
    ["metrics", `${plane.operationsUrl}/metrics`],
    ["CA", plane.caFile],
    ["Docker", engine.what],
    ["data", `${dataFolder}  (npm start -- --data ${dataFolder} --reset empties it)`],
    ["logs", `${dataFolder}/logs`],
    ["first run", `${first.instanceId} in ${first.place}`],
    ["its output", first.output],
    ["keys", `${age} ${dataFolder}/keys`],
    ["  demo", keys.apiKey],
    ["  operator", keys.operatorKey],
    ["  SDK", screen.settingsFile],
  ];
  const table = rows.map(([name = "", value = ""]) => `  ${name.padEnd(12)}${value}`).join("\n");
  const pastes = pasteLines(screen).map(([name, line]) => `# ${name}\n${line}`);
  return `\nClodei runs.\n\n${table}\n\n${pastes.join("\n\n")}\n`;
}
