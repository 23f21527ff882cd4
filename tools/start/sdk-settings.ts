// What programs of the SDK need to reach this start, in a file that Node reads: node --env-file=FILE PROGRAM.
import { rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { ControlPlane, Places } from "./control-plane.ts";
import { demoImage } from "./engine.ts";
import type { Keys } from "./keys.ts";

/** Writes the file, beside the keys that it repeats, and returns its path. */
export async function writeSdkSettings({ dataFolder }: Places, plane: ControlPlane, keys: Keys): Promise<string> {
  const file = join(dataFolder, "keys", "sdk.env");
  const settings = {
    CLODEI_ENDPOINT: plane.publicUrl,
    CLODEI_CA_FILE: plane.caFile,
    CLODEI_API_KEY: keys.apiKey,
    // One that is there: a machine without a way out can pull none.
    CLODEI_IMAGE: demoImage,
  };
  const lines = Object.entries(settings).map(([name, value]) => `${name}="${value}"\n`);
  await writeFile(`${file}.new`, lines.join(""), { mode: 0o600 });
  await rename(`${file}.new`, file);
  return file;
}
