// Credentials for pulls, in Docker's own file format. Read again for each pull, so that a rotated file takes effect.
import { readFile } from "node:fs/promises";

/** What Docker's API takes as credentials of one registry. */
export interface RegistryCredentials {
  readonly username: string;
  readonly password: string;
  readonly identitytoken?: string;
  readonly serveraddress: string;
}

/** The file cannot be used. The message names the file, never what is in it. */
export class RegistryAuthError extends Error {
  override readonly name = "RegistryAuthError";
}

/** A Docker config.json: its `auths`. Credential helpers are refused, because they are programs. */
export class RegistryAuth {
  readonly #file: string;

  constructor(file: string) {
    this.#file = file;
  }

  /** The credentials for a registry, as an image reference names it; undefined where the file has none. */
  async credentialsFor(registry: string): Promise<RegistryCredentials | undefined> {
    for (const [name, entry] of Object.entries(await this.#read())) {
      if (registryOf(name) === registry) return this.#credentials(entry, registry);
    }
    return undefined;
  }

  async #read(): Promise<Record<string, unknown>> {
    let parsed: unknown;
    try {
      parsed = JSON.parse(await readFile(this.#file, "utf8"));
    } catch (error) {
      // A parser's message quotes what it read.
      const reason = error instanceof SyntaxError ? "is not JSON" : "cannot be read";
      throw new RegistryAuthError(`the registry credentials in ${this.#file} ${reason}`);
    }
    if (!isRecord(parsed)) throw new RegistryAuthError(`${this.#file} holds no object`);
    if (parsed["credsStore"] !== undefined || parsed["credHelpers"] !== undefined) {
      throw new RegistryAuthError(`${this.#file} names a credential helper; only "auths" is supported`);
    }
    const auths = parsed["auths"] ?? {};
    if (!isRecord(auths)) throw new RegistryAuthError(`"auths" in ${this.#file} is no object`);
    return auths;
  }

  #credentials(entry: unknown, serveraddress: string): RegistryCredentials {
    if (!isRecord(entry)) throw new RegistryAuthError(`the entry of ${serveraddress} in ${this.#file} is no object`);
    const text = (name: string): string => {
      const value = entry[name];
      return typeof value === "string" ? value : "";
    };
    const decoded = Buffer.from(text("auth"), "base64").toString("utf8");
    // The password may hold colons, the name may not.
    const colon = decoded.indexOf(":");
    const username = colon < 0 ? text("username") : decoded.slice(0, colon);
    const password = colon < 0 ? text("password") : decoded.slice(colon + 1);
    const identitytoken = text("identitytoken");
    if (identitytoken === "" && (username === "" || password === "")) {
      throw new RegistryAuthError(`the entry of ${serveraddress} in ${this.#file} has neither "auth" nor a token`);
    }
    return { username, password, serveraddress, ...(identitytoken === "" ? {} : { identitytoken }) };
  }
}

/** The file's keys are host names or, from older tools, URLs; Docker Hub has a name of its own there. */
function registryOf(key: string): string {
  const host = key.replace(/^https?:\/\//, "").split("/")[0] ?? "";
  return host === "index.docker.io" || host === "registry-1.docker.io" ? "docker.io" : host;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
