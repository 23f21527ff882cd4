// The only reader of the environment. Every setting is in one table, from which values, checks and --help come.
// What would carry secrets or customers' data over an unverified connection is refused here, by name.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { defaultImageAllowlist } from "@clodei/proto/image-reference";
import { euAndEeaCountries } from "@clodei/proto/locations";
import {
  isLoopback,
  isWildcard,
  parseCountries,
  parseEndpoint,
  parseInteger,
  parseList,
  parseLogLevel,
  parsePort,
  parseProxyRanges,
  parseSwitch,
  parseText,
} from "./config-values.ts";
import { databaseProblems } from "./config-database.ts";
import { parseJwtIssuers } from "./identity/issuers.ts";
import { logLevels } from "./platform/log.ts";
import type { DatabaseSource } from "./platform/open-database.ts";

/** A configuration that cannot be started with. Each problem names its setting. */
export class ConfigError extends Error {
  readonly problems: readonly string[];
  constructor(problems: readonly string[]) {
    super(problems.join("\n"));
    this.name = "ConfigError";
    this.problems = problems;
  }
}

type Setting<T> = {
  readonly variable: string;
  /** Settings with secrets have none: everybody on the machine sees command lines. */
  readonly flag: string | undefined;
  readonly fallback: string | undefined;
  readonly help: string;
  readonly parse: (text: string) => T;
};

function setting<T>(
  variable: string,
  flag: string | undefined,
  fallback: string | undefined,
  help: string,
  parse: (text: string) => T,
): Setting<T> {
  return { variable, flag, fallback, help, parse };
}

const maxDelayMs = 24 * 60 * 60 * 1_000;

const settings = {
  dataFolder: setting("CLODEI_DATA", "--data", ".data", "folder of the embedded database, the CA and keys", (text) =>
    resolve(text),
  ),
  publicHost: setting("CLODEI_PUBLIC_HOST", "--public-host", "127.0.0.1", "address of the public listener", parseText),
  publicPort: setting("CLODEI_PUBLIC_PORT", "--public-port", "8443", "its port; 0: any free one", parsePort),
  trustedProxies: setting(
    "TRUSTED_PROXIES",
    "--trusted-proxies",
    "",
    "addresses and ranges of the proxies in front, whose X-Forwarded-For and PROXY headers are believed",
    parseProxyRanges,
  ),
  publicTls: setting(
    "CLODEI_PUBLIC_TLS",
    "--public-tls",
    "on",
    "off: the public listener speaks plain HTTP/1.1 and HTTP/2, to trusted proxies alone",
    parseSwitch,
  ),
  nodeHost: setting("CLODEI_NODE_HOST", "--node-host", "127.0.0.1", "address of the node listener", parseText),
  nodePort: setting("CLODEI_NODE_PORT", "--node-port", "8444", "its port; 0: any free one", parsePort),
  nodeProxyProtocol: setting(
    "CLODEI_NODE_PROXY_PROTOCOL",
    "--node-proxy-protocol",
    "off",
    "on: connections to the node listener come from trusted proxies alone, and begin with a PROXY header (v1 or v2)",
    parseSwitch,
  ),
  nodeEndpoint: setting(
    "CLODEI_NODE_ENDPOINT",
    "--node-endpoint",
    "",
    "host:port by which nodes reach the node listener; empty: the first public name and the node port",
    parseEndpoint,
  ),
  replicaHost: setting(
    "CLODEI_REPLICA_HOST",
    "--replica-host",
    "",
    "address of the replica listener, where other control planes on the same database ask for output of nodes that are connected here; empty: none, which is right for a single control plane",
    parseText,
  ),
  replicaPort: setting(
    "CLODEI_REPLICA_PORT",
    "--replica-port",
    "8445",
    "its port; 0: any free one; without effect where there is no replica listener",
    parsePort,
  ),
  replicaEndpoint: setting(
    "CLODEI_REPLICA_ENDPOINT",
    "--replica-endpoint",
    "",
    "host:port by which the other control planes on the same database reach this one, and no other; empty: the replica host and port",
    parseEndpoint,
  ),
  operationsPort: setting(
    "CLODEI_OPERATIONS_PORT",
    "--operations-port",
    "9464",
    "port of /healthz, /readyz and /metrics, on loopback; 0: any free one",
    parsePort,
  ),
  publicNames: setting(
    "CLODEI_PUBLIC_NAMES",
    "--public-names",
    "localhost,127.0.0.1,::1",
    "names and addresses in the listeners' certificates",
    parseList,
  ),
  publicCertificateFile: setting(
    "CLODEI_PUBLIC_CERTIFICATE_FILE",
    "--public-certificate-file",
    "",
    "PEM chain for the public listener; empty: one of the embedded CA",
    parseText,
  ),
  publicKeyFile: setting("CLODEI_PUBLIC_KEY_FILE", "--public-key-file", "", "its PEM key", parseText),
  caCertificateFile: setting(
    "CLODEI_CA_CERTIFICATE_FILE",
    "--ca-certificate-file",
    "",
    "PEM of the node CA, from a mounted secret; empty: one in the data folder",
    parseText,
  ),
  caKeyFile: setting("CLODEI_CA_KEY_FILE", "--ca-key-file", "", "its PEM key", parseText),
  databaseUrl: setting(
    "DATABASE_URL",
    undefined,
    "",
    "PostgreSQL as clodei_app; empty: an embedded PostgreSQL in the data folder",
    parseText,
  ),
  databaseSystemUrl: setting("DATABASE_SYSTEM_URL", undefined, "", "the same database as clodei_system", parseText),
  databaseMigrationUrl: setting(
    "DATABASE_MIGRATION_URL",
    undefined,
    "",
    "the same database as a login that may SET ROLE clodei_owner; empty: the schema must be up to date",
    parseText,
  ),
  databaseAdminUrl: setting(
    "CLODEI_DATABASE_ADMIN_URL",
    undefined,
    "",
    "an administrator's URL, for init-database alone",
    parseText,
  ),
  databaseCaFile: setting(
    "CLODEI_DATABASE_CA_FILE",
    "--database-ca-file",
    "",
    "PEM of the CA that the database's certificate is verified by",
    parseText,
  ),
  databaseConnections: setting(
    "CLODEI_DATABASE_CONNECTIONS",
    "--database-connections",
    "10",
    "most connections of each of the two logins",
    parseInteger(2, 500),
  ),
  trustDomain: setting(
    "CLODEI_TRUST_DOMAIN",
    "--trust-domain",
    "clodei.com",
    "trust domain of nodes' SPIFFE ids",
    parseText,
  ),
  allowedCountries: setting(
    "CLODEI_ALLOWED_COUNTRIES",
    "--allowed-countries",
    euAndEeaCountries.join(","),
    "ISO 3166-1 codes of countries where nodes may stand",
    parseCountries,
  ),
  imageAllowlist: setting(
    "CLODEI_IMAGE_ALLOWLIST",
    "--image-allowlist",
    defaultImageAllowlist.join(","),
    "prefixes of images that may run",
    parseList,
  ),
  corsOrigins: setting(
    "CLODEI_CORS_ORIGINS",
    "--cors-origins",
    "",
    "origins of browsers that may read answers",
    parseList,
  ),
  jwtIssuers: setting(
    "CLODEI_JWT_ISSUERS",
    undefined,
    "[]",
    'token issuers as JSON: [{"issuer", "audience", "jwksUrl"?, "emailVerifiedClaim"?, "userEndpoint"?, "userEndpointHeaders"?}]',
    parseJwtIssuers,
  ),
  heartbeatIntervalMs: setting(
    "CLODEI_HEARTBEAT_INTERVAL_MS",
    "--heartbeat-interval-ms",
    "10000",
    "time between heartbeats of a node",
    parseInteger(50, maxDelayMs),
  ),
  leaseMs: setting(
    "CLODEI_LEASE_MS",
    "--lease-ms",
    "30000",
    "time without a heartbeat until a node is unreachable",
    parseInteger(100, maxDelayMs),
  ),
  pollIntervalMs: setting(
    "CLODEI_POLL_INTERVAL_MS",
    "--poll-interval-ms",
    "1000",
    "time between looks at the database, behind hints; at sessions of nodes 800 ms at most",
    parseInteger(20, maxDelayMs),
  ),
  hints: setting(
    "CLODEI_HINTS",
    "--hints",
    "on",
    "on, or off: whether replicas tell each other of changes at once, or find them at their next look",
    parseSwitch,
  ),
  drainMs: setting(
    "CLODEI_DRAIN_MS",
    "--drain-ms",
    "25000",
    "time for open requests after SIGTERM",
    parseInteger(0, maxDelayMs),
  ),
  nodeCertificateLifetimeMs: setting(
    "CLODEI_NODE_CERTIFICATE_LIFETIME_MS",
    "--node-certificate-lifetime-ms",
    String(24 * 60 * 60 * 1_000),
    "lifetime of nodes' certificates",
    parseInteger(1_000, 90 * maxDelayMs),
  ),
  publicConnectionsPerAddress: setting(
    "CLODEI_PUBLIC_CONNECTIONS_PER_ADDRESS",
    "--public-connections-per-address",
    "256",
    "most open connections, or requests through proxies, of one address (an IPv6 /64) to the public listener, of 10000 in all",
    parseInteger(1, 10_000),
  ),
  nodeConnectionsPerAddress: setting(
    "CLODEI_NODE_CONNECTIONS_PER_ADDRESS",
    "--node-connections-per-address",
    "1024",
    "the same of the node listener, of 18000 in all; more than the nodes that share an address behind NAT or a proxy",
    parseInteger(1, 18_000),
  ),
  addressRate: setting(
    "CLODEI_ADDRESS_RATE",
    "--address-rate",
    "200",
    "requests a second of one address, in the long run",
    parseInteger(1, 1_000_000),
  ),
  callerRate: setting(
    "CLODEI_CALLER_RATE",
    "--caller-rate",
    "100",
    "requests a second of one caller, in the long run",
    parseInteger(1, 1_000_000),
  ),
  logLevel: setting("CLODEI_LOG_LEVEL", "--log-level", "info", `one of ${logLevels.join(", ")}`, parseLogLevel),
} as const;

type SettingName = keyof typeof settings;

/** What the control plane is configured to do. */
export type Config = { readonly [K in SettingName]: ReturnType<(typeof settings)[K]["parse"]> };

/** Where values come from. */
export type ConfigSource = {
  readonly flags?: Readonly<Record<string, string | undefined>>;
  /** Default: the process's. */
  readonly environment?: Readonly<Record<string, string | undefined>>;
};

/** The flags that take a value, for the command line's parser. */
export const configFlags: readonly string[] = Object.values(settings).flatMap(({ flag }) =>
  flag === undefined ? [] : [flag],
);

/**
 * Reads and checks the configuration: a flag wins over its variable.
 * @throws ConfigError with every problem found.
 */
export function loadConfig(source: ConfigSource = {}): Config {
  const environment = source.environment ?? process.env;
  const problems: string[] = [];
  const entries = Object.entries(settings).map(([name, { variable, flag, fallback, parse }]) => {
    const given = (flag === undefined ? undefined : source.flags?.[flag]) ?? environment[variable];
    try {
      return [name, parse(given ?? fallback ?? "")];
    } catch (error) {
      problems.push(`${flag === undefined ? variable : `${flag} (${variable})`}: ${messageOf(error)}`);
      return [name, undefined];
    }
  });
  problems.push(...runtimeProblems(environment));
  if (problems.length > 0) throw new ConfigError(problems);
  // The table gave each value its type; Object.entries forgot which.
  const config = Object.fromEntries(entries) as Config;
  problems.push(...crossCheck(config));
  if (problems.length > 0) throw new ConfigError(problems);
  return config;
}

/** The settings' part of --help. */
export function configHelp(): string {
  const lines = Object.values(settings).map(({ variable, flag, fallback, help }) => {
    const name = flag === undefined ? variable : `${flag} (${variable})`;
    return `  ${name}\n      ${help}${fallback === undefined || fallback === "" ? "" : ` [${fallback}]`}`;
  });
  return lines.join("\n");
}

/** All settings, for their document. */
export function controlPlaneSettings() {
  return Object.values(settings).map(({ variable, flag, fallback, help }) => ({ variable, flag, fallback, help }));
}

/** What the runtime itself would read, and what would switch off a promise of ours in silence. */
function runtimeProblems(environment: Readonly<Record<string, string | undefined>>): string[] {
  // Node knows the one value. Issuers are verified by its default, which this changes.
  if (environment["NODE_TLS_REJECT_UNAUTHORIZED"] !== "0") return [];
  return [
    "NODE_TLS_REJECT_UNAUTHORIZED: 0 switches the verification of TLS off: leave it out, and name a private CA in NODE_EXTRA_CA_CERTS",
  ];
}

// --- what must hold between settings

function crossCheck(config: Config): string[] {
  return [
    ...pairProblems(
      "CLODEI_PUBLIC_CERTIFICATE_FILE",
      config.publicCertificateFile,
      "CLODEI_PUBLIC_KEY_FILE",
      config.publicKeyFile,
    ),
    ...pairProblems("CLODEI_CA_CERTIFICATE_FILE", config.caCertificateFile, "CLODEI_CA_KEY_FILE", config.caKeyFile),
    ...pairProblems("DATABASE_URL", config.databaseUrl, "DATABASE_SYSTEM_URL", config.databaseSystemUrl),
    ...proxyProblems(config),
    ...replicaProblems(config),
    ...databaseProblems(config),
    ...config.corsOrigins.flatMap(originProblems),
    ...(config.leaseMs < 2 * config.heartbeatIntervalMs
      ? ["CLODEI_LEASE_MS: must be at least twice CLODEI_HEARTBEAT_INTERVAL_MS, or one lost heartbeat loses the node"]
      : []),
    ...(config.publicNames.length === 0 ? ["CLODEI_PUBLIC_NAMES: names at least one name"] : []),
  ];
}

/** What lets a proxy speak for others, or in plain text, says which proxies those are. */
function proxyProblems(config: Config): string[] {
  const problems: string[] = [];
  if (!config.publicTls && config.trustedProxies.length === 0) {
    problems.push("CLODEI_PUBLIC_TLS: off needs TRUSTED_PROXIES, the proxies that end TLS: nobody else is served then");
  }
  if (!config.publicTls && config.publicCertificateFile !== "") {
    problems.push("CLODEI_PUBLIC_CERTIFICATE_FILE: has no use while CLODEI_PUBLIC_TLS is off");
  }
  if (config.nodeProxyProtocol && config.trustedProxies.length === 0) {
    problems.push("CLODEI_NODE_PROXY_PROTOCOL: on needs TRUSTED_PROXIES, the proxies that send the header");
  }
  return problems;
}

/** What others are told of this control plane must lead to it. */
function replicaProblems({ replicaHost, replicaEndpoint }: Config): string[] {
  if (replicaHost === "" && replicaEndpoint !== "") {
    return ["CLODEI_REPLICA_ENDPOINT: has no use without CLODEI_REPLICA_HOST, the address to listen on"];
  }
  if (isWildcard(replicaHost) && replicaEndpoint === "") {
    return [
      `CLODEI_REPLICA_ENDPOINT: give host:port by which the other control planes reach this one: CLODEI_REPLICA_HOST is ${replicaHost}, every address of this machine`,
    ];
  }
  return [];
}

function pairProblems(first: string, firstValue: string, second: string, secondValue: string): string[] {
  if ((firstValue === "") === (secondValue === "")) return [];
  return [`${first} and ${second}: give both or none`];
}

function originProblems(text: string): string[] {
  const url = URL.parse(text);
  if (url === null || url.origin !== text || text.includes("*"))
    return [`CLODEI_CORS_ORIGINS: ${JSON.stringify(text)} is not an origin, like https://console.example`];
  if (url.protocol === "https:" || isLoopback(url.hostname)) return [];
  return [`CLODEI_CORS_ORIGINS: ${JSON.stringify(text)} is not https`];
}

/** Where the configuration says that the database is. */
export function databaseSourceOf(config: Config): DatabaseSource {
  if (config.databaseUrl === "") return { kind: "embedded", dataFolder: config.dataFolder };
  return {
    kind: "urls",
    appUrl: config.databaseUrl,
    systemUrl: config.databaseSystemUrl,
    migrationUrl: config.databaseMigrationUrl === "" ? undefined : config.databaseMigrationUrl,
    caPem: config.databaseCaFile === "" ? undefined : readPem("CLODEI_DATABASE_CA_FILE", config.databaseCaFile),
  };
}

/** Reads a PEM file that a setting names. @throws ConfigError that names the setting. */
export function readPem(variable: string, path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new ConfigError([`${variable}: ${messageOf(error)}`]);
  }
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
