// The only reader of command line and environment. Every setting stands once in the table below: its flag,
// its variable, its default, its check and its help, so `--help` cannot tell another story than the program.
// A wrong value stops the start and names every wrong setting at once, not only the first.

import { parseArgs } from "node:util";
import { resolve } from "node:path";
import { defaultImageAllowlist } from "@clodei/proto/image-reference";
import { parseSimulatedGpus } from "@clodei/proto/gpu-models";
import {
  addresses,
  allowlist,
  folder,
  httpsUrl,
  network,
  oneOf,
  socketPath,
  text,
  wholeNumber,
} from "./config-values.ts";

/** A setting that the command line or the environment gives. */
interface Setting<T> {
  /** What stands behind the flag in `--help`; absent for a switch. */
  readonly value?: string;
  readonly variable?: string;
  readonly help: string;
  readonly fallback?: string;
  /** Throws an Error whose message says what is allowed. */
  readonly parse: (text: string) => T;
}

const settings = {
  state: {
    value: "DIR",
    variable: "CLODEI_STATE",
    fallback: "/var/lib/clodei-agent",
    help: "State folder (0700): key, certificate, journal, workspaces, logs.",
    parse: folder,
  },
  "control-plane": {
    value: "URL",
    variable: "CLODEI_CONTROL_PLANE",
    help: "The control plane's public listener, https only.",
    parse: httpsUrl,
  },
  "token-file": {
    value: "FILE",
    help: "File that holds the enrollment token; - reads it from standard input.",
    parse: text,
  },
  token: {
    value: "TOKEN",
    variable: "CLODEI_ENROLLMENT_TOKEN",
    help: "The enrollment token. As a flag it shows in the process list: prefer --token-file or the variable.",
    parse: text,
  },
  "docker-socket": {
    value: "PATH",
    variable: "CLODEI_DOCKER_SOCKET",
    fallback: "/var/run/docker.sock",
    help: "Unix socket of the Docker engine.",
    parse: socketPath,
  },
  "simulate-gpus": {
    value: "LIST",
    variable: "CLODEI_SIMULATE_GPUS",
    help: 'GPUs to simulate instead of reading real ones, for example "8xH100-SXM,4xL40S". Marked as simulated everywhere.',
    parse: parseSimulatedGpus,
  },
  "simulated-gpu-health": {
    value: "FILE",
    variable: "CLODEI_SIMULATED_GPU_HEALTH",
    help: 'A JSON file that makes simulated GPUs ill by their index, for example {"1": "GPU is lost"}. Read again with each inventory.',
    parse: folder,
  },
  "nvidia-smi": {
    value: "PATH",
    variable: "CLODEI_NVIDIA_SMI",
    fallback: "nvidia-smi",
    help: "The tool that tells what NVIDIA GPUs there are.",
    parse: text,
  },
  "rocm-smi": {
    value: "PATH",
    variable: "CLODEI_ROCM_SMI",
    fallback: "rocm-smi",
    help: "The tool that tells what AMD GPUs there are. They are shown, and not placed on.",
    parse: text,
  },
  "inventory-interval-ms": {
    value: "MS",
    variable: "CLODEI_INVENTORY_INTERVAL_MS",
    fallback: "10000",
    help: "How often the tools are asked. What changed is told at once.",
    parse: wholeNumber(100, 600_000),
  },
  "image-allowlist": {
    value: "LIST",
    variable: "CLODEI_IMAGE_ALLOWLIST",
    fallback: defaultImageAllowlist.join(","),
    help: "Prefixes of images that this node runs, whatever the control plane asks for.",
    parse: allowlist,
  },
  "registry-auth-file": {
    value: "FILE",
    variable: "CLODEI_REGISTRY_AUTH_FILE",
    help: "A Docker config.json with the credentials for pulls.",
    parse: folder,
  },
  "pull-silence-ms": {
    value: "MS",
    variable: "CLODEI_PULL_SILENCE_MS",
    fallback: "300000",
    help: "A pull in which nothing comes for so long is given up.",
    parse: wholeNumber(1000, 3_600_000),
  },
  "dns-servers": {
    value: "LIST",
    variable: "CLODEI_DNS_SERVERS",
    help: "Resolvers for containers. Default: the node's own, without those on loopback.",
    parse: addresses,
  },
  "network-pool": {
    value: "CIDR",
    variable: "CLODEI_NETWORK_POOL",
    fallback: "10.213.0.0/16",
    help: "IPv4 range from which each container's network is taken. Agents on one engine may share it.",
    parse: network,
  },
  "min-free-mib": {
    value: "MIB",
    variable: "CLODEI_MIN_FREE_MIB",
    fallback: "512",
    help: "Below so much free space in the state folder's file system the node takes no new work.",
    parse: wholeNumber(0, 1_000_000_000),
  },
  "usage-interval-ms": {
    value: "MS",
    variable: "CLODEI_USAGE_INTERVAL_MS",
    fallback: "10000",
    help: "How often the time that containers ran is journaled.",
    parse: wholeNumber(100, 600_000),
  },
  "log-level": {
    value: "LEVEL",
    variable: "CLODEI_LOG_LEVEL",
    fallback: "info",
    help: "trace, debug, info, warn, error or silent.",
    parse: oneOf("trace", "debug", "info", "warn", "error", "silent"),
  },
} as const satisfies Record<string, Setting<unknown>>;

type SettingName = keyof typeof settings;
type SettingValue<N extends SettingName> = ReturnType<(typeof settings)[N]["parse"]>;

const commands = {
  enroll: {
    help: "Makes a key on this node and gets a certificate for it, by an enrollment token.",
    settings: ["state", "control-plane", "token-file", "token", "log-level"],
  },
  run: {
    help: "Connects to the control plane and runs what it asks for. SIGTERM leaves containers running.",
    settings: [
      "state",
      "docker-socket",
      "simulate-gpus",
      "simulated-gpu-health",
      "nvidia-smi",
      "rocm-smi",
      "inventory-interval-ms",
      "image-allowlist",
      "registry-auth-file",
      "pull-silence-ms",
      "dns-servers",
      "network-pool",
      "min-free-mib",
      "usage-interval-ms",
      "log-level",
    ],
  },
  inventory: {
    help: "Prints what the node has. --json prints it as the control plane is told.",
    settings: ["state", "docker-socket", "simulate-gpus", "nvidia-smi", "rocm-smi", "log-level"],
  },
  doctor: {
    help: "Looks whether this node has what it needs, and says what is wrong and how to mend it. Changes nothing.",
    settings: ["state", "docker-socket", "simulate-gpus", "nvidia-smi", "rocm-smi", "min-free-mib", "log-level"],
  },
} as const satisfies Record<string, { help: string; settings: readonly SettingName[] }>;

/** The configuration of `enroll`. */
export interface EnrollConfig {
  readonly stateFolder: string;
  readonly controlPlaneUrl: string;
  readonly tokenSource:
    | { readonly kind: "file"; readonly path: string }
    | { readonly kind: "text"; readonly token: string }
    | { readonly kind: "stdin" };
  readonly tokenOnCommandLine: boolean;
  readonly logLevel: SettingValue<"log-level">;
}

/** The configuration of `inventory`. */
export interface InventoryConfig {
  readonly stateFolder: string;
  readonly dockerSocket: string;
  readonly simulatedGpus: SettingValue<"simulate-gpus"> | undefined;
  readonly nvidiaSmi: string;
  readonly rocmSmi: string;
  /** PATH, for tools that the agent starts. */
  readonly searchPath: string;
  readonly logLevel: SettingValue<"log-level">;
}

/** The configuration of `doctor`. */
export interface DoctorConfig extends InventoryConfig {
  readonly minFreeMib: number;
}

/** The configuration of `run`. */
export interface RunConfig extends DoctorConfig {
  readonly imageAllowlist: readonly string[];
  readonly registryAuthFile: string | undefined;
  readonly pullSilenceMs: number;
  readonly simulatedGpuHealth: string | undefined;
  readonly inventoryIntervalMs: number;
  readonly dnsServers: readonly string[] | undefined;
  readonly networkPool: string;
  readonly usageIntervalMs: number;
}

/** What the command line asks for. */
export type Command =
  | { readonly kind: "help" }
  | { readonly kind: "version" }
  | { readonly kind: "enroll"; readonly config: EnrollConfig }
  | { readonly kind: "run"; readonly config: RunConfig }
  | { readonly kind: "inventory"; readonly json: boolean; readonly config: InventoryConfig }
  | { readonly kind: "doctor"; readonly json: boolean; readonly config: DoctorConfig };

/** The configuration is wrong. The message names every wrong setting. */
export class ConfigError extends Error {
  override readonly name = "ConfigError";
}

/** Reads command line and environment. Throws ConfigError. */
export function readCommand(args: readonly string[], environment: Environment = process.env): Command {
  const [name, ...rest] = args;
  if (name === undefined || name === "--help" || name === "-h" || name === "help") return { kind: "help" };
  if (name === "--version" || name === "version") return { kind: "version" };
  if (!isCommand(name)) {
    const known = Object.keys(commands).join(", ");
    throw new ConfigError(`unknown command ${JSON.stringify(name)}: there are ${known} (see --help)`);
  }
  const flags = parseFlags(name, rest);
  if (flags["help"] === true) return { kind: "help" };
  const reader = new Reader(name, flags, environment);
  switch (name) {
    case "enroll": {
      const config = enrollConfig(reader, flags, environment);
      reader.finish();
      return { kind: "enroll", config };
    }
    case "run": {
      const config = {
        ...doctorConfig(reader, environment),
        imageAllowlist: reader.required("image-allowlist") ?? [],
        registryAuthFile: reader.optional("registry-auth-file"),
        simulatedGpuHealth: reader.optional("simulated-gpu-health"),
        inventoryIntervalMs: reader.required("inventory-interval-ms") ?? 0,
        pullSilenceMs: reader.required("pull-silence-ms") ?? 0,
        dnsServers: reader.optional("dns-servers"),
        networkPool: reader.required("network-pool") ?? "",
        usageIntervalMs: reader.required("usage-interval-ms") ?? 0,
      };
      reader.finish();
      return { kind: "run", config };
    }
    case "inventory": {
      const config = inventoryConfig(reader, environment);
      reader.finish();
      return { kind: "inventory", json: flags["json"] === true, config };
    }
    case "doctor": {
      const config = doctorConfig(reader, environment);
      reader.finish();
      return { kind: "doctor", json: flags["json"] === true, config };
    }
  }
}

function inventoryConfig(reader: Reader, environment: Environment): InventoryConfig {
  return {
    stateFolder: reader.required("state") ?? "",
    dockerSocket: reader.required("docker-socket") ?? "",
    simulatedGpus: reader.optional("simulate-gpus"),
    nvidiaSmi: reader.required("nvidia-smi") ?? "",
    rocmSmi: reader.required("rocm-smi") ?? "",
    searchPath: environment["PATH"] ?? "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    logLevel: reader.required("log-level") ?? "info",
  };
}

function doctorConfig(reader: Reader, environment: Environment): DoctorConfig {
  return { ...inventoryConfig(reader, environment), minFreeMib: reader.required("min-free-mib") ?? 0 };
}

function enrollConfig(reader: Reader, flags: Flags, environment: Environment): EnrollConfig {
  const tokenFile = reader.optional("token-file");
  const token = reader.optional("token");
  if (flags["token"] !== undefined && tokenFile !== undefined)
    reader.problem("--token and --token-file exclude each other");
  const config: EnrollConfig = {
    stateFolder: reader.required("state") ?? "",
    controlPlaneUrl: reader.required("control-plane") ?? "",
    tokenSource:
      tokenFile === "-" || (tokenFile === undefined && token === undefined)
        ? { kind: "stdin" }
        : tokenFile !== undefined
          ? { kind: "file", path: resolve(tokenFile) }
          : { kind: "text", token: token ?? "" },
    tokenOnCommandLine: flags["token"] !== undefined && environment["CLODEI_ENROLLMENT_TOKEN"] === undefined,
    logLevel: reader.required("log-level") ?? "info",
  };
  return config;
}

type Environment = Readonly<Record<string, string | undefined>>;
type Flags = Readonly<Record<string, string | boolean | undefined>>;

function isCommand(name: string): name is keyof typeof commands {
  return Object.hasOwn(commands, name);
}

function parseFlags(command: keyof typeof commands, args: readonly string[]): Flags {
  const options: Record<string, { type: "string" | "boolean" }> = { help: { type: "boolean" } };
  for (const name of commands[command].settings) options[name] = { type: "string" };
  if (command === "inventory" || command === "doctor") options["json"] = { type: "boolean" };
  try {
    const { values } = parseArgs({ args: [...args], options, strict: true, allowPositionals: false });
    return values;
  } catch (error) {
    throw new ConfigError(error instanceof Error ? error.message : "the command line is wrong", { cause: error });
  }
}

/** Reads settings by name and collects what is wrong with them. */
class Reader {
  readonly #command: string;
  readonly #flags: Flags;
  readonly #environment: Environment;
  readonly #problems: string[] = [];

  constructor(command: string, flags: Flags, environment: Environment) {
    this.#command = command;
    this.#flags = flags;
    this.#environment = environment;
  }

  optional<N extends SettingName>(name: N): SettingValue<N> | undefined {
    const setting: Setting<unknown> = settings[name];
    const flag = this.#flags[name];
    const variable = setting.variable === undefined ? undefined : this.#environment[setting.variable];
    // An empty variable means "not set": that is how service managers unset one.
    const given = typeof flag === "string" ? flag : variable === "" ? undefined : variable;
    const value = given ?? setting.fallback;
    if (value === undefined) return undefined;
    try {
      return setting.parse(value) as SettingValue<N>;
    } catch (error) {
      // The value is not repeated: one of the settings is a token.
      const where = typeof flag === "string" || setting.variable === undefined ? `--${name}` : setting.variable;
      this.problem(`${where} ${error instanceof Error ? error.message : "is wrong"}`);
      return undefined;
    }
  }

  required<N extends SettingName>(name: N): SettingValue<N> | undefined {
    const before = this.#problems.length;
    const value = this.optional(name);
    if (value === undefined && this.#problems.length === before) {
      const variable = (settings[name] as Setting<unknown>).variable;
      this.problem(`--${name}${variable === undefined ? "" : ` or ${variable}`} must be given`);
    }
    return value;
  }

  problem(text: string): void {
    this.#problems.push(text);
  }

  finish(): void {
    if (this.#problems.length > 0) {
      throw new ConfigError(`clodei-agent ${this.#command}: ${this.#problems.join("; ")}`);
    }
  }
}

/** All settings, for their document. */
export function agentSettings() {
  return Object.entries<Setting<unknown>>(settings).map(([name, { variable, fallback, help }]) => ({
    flag: `--${name}`,
    variable,
    fallback,
    help,
  }));
}

/** The text of `--help`, made from the table of settings. */
export function helpText(): string {
  const lines = ["clodei-agent: runs validated containers on this node for a Clodei control plane.", "", "Usage:"];
  for (const [name, command] of Object.entries(commands))
    lines.push(`  clodei-agent ${name} [options]`.padEnd(36) + command.help);
  lines.push("  clodei-agent --help | --version", "", "Options:");
  for (const [name, setting] of Object.entries(settings) as [SettingName, Setting<unknown>][]) {
    const users = Object.entries(commands)
      .filter(([, command]) => (command.settings as readonly string[]).includes(name))
      .map(([command]) => command);
    lines.push(`  --${name}${setting.value === undefined ? "" : ` ${setting.value}`}  (${users.join(", ")})`);
    lines.push(`      ${setting.help}`);
    if (setting.variable !== undefined) lines.push(`      Variable: ${setting.variable}`);
    if (setting.fallback !== undefined) lines.push(`      Default: ${setting.fallback}`);
  }
  lines.push("  --json  (inventory, doctor)", "      Prints JSON.");
  return `${lines.join("\n")}\n`;
}
