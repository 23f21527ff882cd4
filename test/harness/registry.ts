// Debian's docker-registry inside a test engine's network namespace: real pulls, and no packet that leaves it.
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { randomBytes, randomInt } from "node:crypto";
import { once } from "node:events";
import { mkdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { callEngine } from "../../tools/engine/api.ts";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { writeTar } from "../../tools/engine/tar.ts";

const startTimeoutMs = 20_000;

export interface RegistryCredentials {
  readonly username: string;
  readonly password: string;
}

export interface RegistryOptions {
  /** The port on the namespace's loopback. Another engine may use the same. */
  readonly port?: number;
  /** Asked for on every request. */
  readonly credentials?: RegistryCredentials;
}

/** A registry that runs until it is closed. */
export class TestRegistry implements AsyncDisposable {
  /** Begins the references of its images: "127.0.0.1:5000". */
  readonly host: string;
  readonly #engine: PrivateEngine;
  readonly #process: ChildProcess;
  readonly #folder: string;
  readonly #credentials: RegistryCredentials | undefined;

  constructor(
    engine: PrivateEngine,
    host: string,
    program: ChildProcess,
    folder: string,
    credentials?: RegistryCredentials,
  ) {
    this.#engine = engine;
    this.host = host;
    this.#process = program;
    this.#folder = folder;
    this.#credentials = credentials;
  }

  /**
   * Pushes an image that the engine has under another name, and removes the engine's own copy.
   * Returns the reference under which it can be pulled.
   */
  async push(image: string, name: string, tag = "latest"): Promise<string> {
    const repository = `${this.host}/${name}`;
    const { socketPath } = this.#engine;
    await callEngine(socketPath, {
      method: "POST",
      path: `/images/${image}/tag`,
      query: { repo: repository, tag },
    });
    const login = { ...this.#credentials, serveraddress: this.host };
    await callEngine(socketPath, {
      method: "POST",
      path: `/images/${repository}/push`,
      query: { tag },
      headers: { "x-registry-auth": Buffer.from(JSON.stringify(login)).toString("base64url") },
    });
    await callEngine(socketPath, { method: "DELETE", path: `/images/${repository}:${tag}` });
    await callEngine(socketPath, { method: "DELETE", path: `/images/${image}` });
    return `${repository}:${tag}`;
  }

  /**
   * Makes an image of busybox with further layers of so many random bytes, which compress to nothing less, and pushes it.
   * The engine has nothing of it afterwards. Returns the reference under which it can be pulled.
   */
  async pushLayers(name: string, layerBytes: readonly number[], tag = "latest"): Promise<string> {
    const { socketPath } = this.#engine;
    // Several may be made at once.
    const base = `local/base/${name}:${tag}`;
    const made = `local/made/${name}:${tag}`;
    await importBusybox(socketPath, base);
    const files = layerBytes.map((bytes, index) => ({ path: `layer${index}`, data: randomBytes(bytes) }));
    const steps = [`FROM ${base}`, ...files.map(({ path }) => `COPY ${path} /${path}`)];
    const context = [{ path: "Dockerfile", data: Buffer.from(steps.join("\n")) }, ...files];
    const body = writeTar(context.map((file) => ({ ...file, kind: "file" as const })));
    await callEngine(socketPath, { method: "POST", path: "/build", query: { t: made }, body });
    const reference = await this.push(made, name, tag);
    await callEngine(socketPath, { method: "DELETE", path: `/images/${base}` });
    return reference;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#process.exitCode === null && this.#process.signalCode === null) {
      const ended = once(this.#process, "exit");
      this.#process.kill("SIGKILL");
      await ended;
    }
    await rm(this.#folder, { recursive: true, force: true });
  }
}

/** Starts a registry that the engine reaches as 127.0.0.1. */
export async function startRegistry(engine: PrivateEngine, options: RegistryOptions = {}): Promise<TestRegistry> {
  const host = `127.0.0.1:${options.port ?? 5000}`;
  // Below the engine's run folder, so that an engine's clearing also ends a registry whose test was killed.
  const folder = join(engine.runFolder, `registry-${options.port ?? 5000}`);
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const passwords = join(folder, "passwords");
  if (options.credentials !== undefined) await writeFile(passwords, await passwordLine(options.credentials));
  const configuration = {
    version: "0.1",
    log: { level: "info", accesslog: { disabled: true } },
    storage: { filesystem: { rootdirectory: join(folder, "data") }, delete: { enabled: true } },
    http: { addr: host },
    ...(options.credentials === undefined ? {} : { auth: { htpasswd: { realm: "test", path: passwords } } }),
  };
  const file = join(folder, "config.yml");
  // JSON is YAML.
  await writeFile(file, JSON.stringify(configuration));
  const args = [`--net=/run/netns/${engine.namespace}`, "docker-registry", "serve", file];
  const program = spawn("nsenter", args, {
    stdio: ["ignore", "ignore", "pipe"],
    env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin" },
  });
  await listening(program, host);
  return new TestRegistry(engine, host, program, folder, options.credentials);
}

async function listening(program: ChildProcess, host: string): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let output = "";
  const timer = setTimeout(() => reject(new Error(`the registry does not listen:\n${output}`)), startTimeoutMs);
  program.stderr?.setEncoding("utf8").on("data", (text: string) => {
    output = (output + text).slice(-4000);
    if (output.includes(`listening on ${host}`)) resolve();
  });
  program.once("error", reject);
  program.once("exit", () => reject(new Error(`the registry ended:\n${output}`)));
  try {
    await promise;
  } catch (error) {
    program.kill("SIGKILL");
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

/** The registry takes bcrypt alone; the C library's crypt, by way of perl, which every Debian has, makes it. */
async function passwordLine(credentials: RegistryCredentials): Promise<string> {
  const alphabet = "abcdefghijklmnopqrstuvwxyz";
  // The last character of a salt holds two bits only.
  const salt = `${Array.from({ length: 21 }, () => alphabet[randomInt(alphabet.length)]).join("")}u`;
  const script = "print crypt($ARGV[0], $ARGV[1])";
  const { stdout } = await promisify(execFile)("perl", ["-e", script, credentials.password, `$2y$05$${salt}`]);
  if (!stdout.startsWith("$2y$")) throw new Error("this system's crypt has no bcrypt");
  return `${credentials.username}:${stdout}\n`;
}
