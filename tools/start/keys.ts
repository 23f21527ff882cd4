// The demo organization's API key and the operator's key: made at the first start, kept in DATA/keys.
import { mkdir, readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { ClodeiError, createClient } from "@clodei/sdk";
import { type ControlPlane, type Places, runCommand } from "./control-plane.ts";

/** Both keys, and whether this start made them. */
export type Keys = { readonly apiKey: string; readonly operatorKey: string; readonly areNew: boolean };

const organizationName = "demo";
const operatorName = "demo";
const keyPattern = /clodei_sk_[A-Za-z0-9_]+/u;
const checkTimeoutMs = 10_000;

async function readKept(file: string): Promise<string | undefined> {
  try {
    return keyPattern.exec(await readFile(file, "utf8"))?.[0];
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** Whether the control plane still takes a key: its database may have been made anew. */
async function isTaken(plane: ControlPlane, apiKey: string): Promise<boolean> {
  using client = createClient({ endpoint: plane.publicUrl, apiKey, ca: plane.ca });
  try {
    await client.identity.whoAmI({ timeoutMs: checkTimeoutMs });
    return true;
  } catch (error) {
    if (error instanceof ClodeiError && error.code === "unauthenticated") return false;
    throw error;
  }
}

async function keyOf(places: Places, plane: ControlPlane, file: string, command: readonly string[]) {
  const path = join(places.dataFolder, "keys", file);
  const kept = await readKept(path);
  if (kept !== undefined && (await isTaken(plane, kept))) return { key: kept, isNew: false };
  const key = keyPattern.exec(await runCommand(places, command))?.[0];
  if (key === undefined) throw new Error(`${command[0] ?? ""} printed no key`);
  await mkdir(join(places.dataFolder, "keys"), { recursive: true, mode: 0o700 });
  await writeFile(`${path}.new`, `${key}\n`, { mode: 0o600 });
  await rename(`${path}.new`, path);
  return { key, isNew: true };
}

/** The keys of the demonstration. */
export async function provideKeys(places: Places, plane: ControlPlane): Promise<Keys> {
  const organization = await keyOf(places, plane, "organization", ["create-organization", "--name", organizationName]);
  const operator = await keyOf(places, plane, "operator", ["create-operator", "--name", operatorName]);
  return { apiKey: organization.key, operatorKey: operator.key, areNew: organization.isNew || operator.isNew };
}
