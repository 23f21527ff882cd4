#!/usr/bin/env node
// The command clodei-control-plane.
import { statSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { parseId } from "@clodei/proto/ids";
import packageJson from "../package.json" with { type: "json" };
import { type Config, ConfigError, configFlags, configHelp, databaseSourceOf, loadConfig, readPem } from "./config.ts";
import { IdentityService } from "./identity/service.ts";
import { AuthorityClaimError, forgetAuthority } from "./nodes/authority-claim.ts";
import { OrganizationsService } from "./organizations/service.ts";
import { systemClock } from "./platform/clock.ts";
import { Database } from "./platform/database.ts";
import { FolderInUseError } from "./platform/embedded-postgres.ts";
import { ListenError } from "./platform/listen-error.ts";
import { createLog, logConsole } from "./platform/log.ts";
import { LoginError } from "./platform/logins.ts";
import { SchemaError } from "./platform/migrations.ts";
import { connectionOf, openDatabase } from "./platform/open-database.ts";
import { appRole, createRolePasswords, initializeRoles, migratorRole, systemRole } from "./platform/roles.ts";

const help = `clodei-control-plane [command] [settings]

Commands:
  serve                              serves the public API and the node link (the default)
  create-operator [--name NAME]      makes a platform operator and prints its API key, once
  create-organization --name NAME [--member-issuer ISSUER --member-subject SUBJECT]
                                     makes an organization and prints an API key of its admin, once; the user whom
                                     ISSUER's tokens call SUBJECT becomes its admin, too
  revoke-api-key --key-id KEY_ID     revokes an API key, at once and for good, and prints whose it was
  forget-ca                          lets the next start use another CA; nodes must be enrolled again under it
  init-database                      makes the roles in CLODEI_DATABASE_ADMIN_URL and prints three URLs
  --help, --version

Settings, each a flag or a variable; a flag wins:
${configHelp()}
`;

/** What the commands take beside the settings. */
const commandFlags: Readonly<Record<string, readonly CommandFlag[]>> = {
  serve: [],
  "create-operator": ["--name"],
  "create-organization": ["--name", "--member-issuer", "--member-subject"],
  "revoke-api-key": ["--key-id"],
  "forget-ca": [],
  "init-database": [],
};
type CommandFlag = "--name" | "--member-issuer" | "--member-subject" | "--key-id";

type Arguments = {
  readonly command: string;
  readonly flags: Readonly<Partial<Record<CommandFlag, string>>>;
  readonly config: Config;
};

async function main(): Promise<number> {
  const parsed = parse(process.argv.slice(2));
  if (typeof parsed === "string") {
    process.stdout.write(parsed);
    return 0;
  }
  switch (parsed.command) {
    case "serve":
      return serve(parsed.config);
    case "create-operator":
      return createOperator(parsed);
    case "create-organization":
      return createOrganization(parsed);
    case "revoke-api-key":
      return revokeApiKey(parsed);
    case "forget-ca":
      return forgetCa(parsed);
    case "init-database":
      return initDatabase(parsed.config);
    default:
      throw new ConfigError([`there is no command ${JSON.stringify(parsed.command)}: see --help`]);
  }
}

function parse(args: readonly string[]): Arguments | string {
  const texts: Record<string, { type: "string" }> = {};
  for (const flag of [...configFlags, ...Object.values(commandFlags).flat()]) texts[flag.slice(2)] = { type: "string" };
  const { values, positionals } = parseArgs({
    args: [...args],
    options: { ...texts, help: { type: "boolean", short: "h" }, version: { type: "boolean" } },
    allowPositionals: true,
    strict: true,
  });
  if (values.help === true) return help;
  if (values.version === true) return `${packageJson.version}\n`;
  if (positionals.length > 1) throw new ConfigError([`unexpected: ${positionals.slice(1).join(" ")}`]);
  const flags: Record<string, string> = {};
  for (const [name, value] of Object.entries<unknown>(values))
    if (typeof value === "string") flags[`--${name}`] = value;
  const command = positionals[0] ?? "serve";
  const own = new Set<string>(commandFlags[command] ?? []);
  const foreign = Object.keys(flags).find((flag) => !own.has(flag) && !configFlags.includes(flag));
  if (foreign !== undefined) throw new ConfigError([`${command} does not take ${foreign}: see --help`]);
  return { command, flags, config: loadConfig({ flags }) };
}

/**
 * Node cuts small buffers from slabs of 64 KiB, and each TLS connection keeps one of 3 bytes (its protocols for ALPN), and
 * with it a whole slab. From smaller ones thousands of agents take 20 KiB less each.
 */
const bufferPoolBytes = 2048;

/** Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once. */
async function serve(config: Config): Promise<number> {
  Buffer.poolSize = bufferPoolBytes;
  const log = createLog(config.logLevel);
  logConsole(log);
  const stop = Promise.withResolvers<number>();
  let asked = false;
  const onSignal = (): void => {
    if (asked) process.exit(1);
    asked = true;
    stop.resolve(0);
  };
  process.on("SIGTERM", onSignal);
  process.on("SIGINT", onSignal);
  // Loaded late: the other commands need a fraction of it, and are used by scripts that wait for them.
  const { listeningOf, startControlPlane } = await import("./start.ts");
  const running = await startControlPlane(config, { log });
  running.failed.addEventListener("abort", () => stop.resolve(1));
  process.stdout.write(`${JSON.stringify({ listening: listeningOf(running) })}\n`);
  const code = await stop.promise;
  await running.close();
  return code;
}

async function createOperator({ config, flags }: Arguments): Promise<number> {
  const name = checkName("create-operator", flags["--name"] ?? "operator");
  await withServices(config, async ({ database, identity }) => {
    const operator = await database.system((tx) => identity.createOperator(tx, { name }));
    print({ operatorId: operator.operatorId, apiKey: operator.apiKey });
  });
  return 0;
}

async function createOrganization({ config, flags }: Arguments): Promise<number> {
  const name = checkName("create-organization", flags["--name"]);
  const member = memberOf(flags);
  await withServices(config, async ({ database, organizations }) => {
    const created = await database.system((tx) => organizations.create(tx, { name, ...member }));
    print({ organizationId: created.organizationId, apiKey: created.adminApiKey });
  });
  return 0;
}

async function revokeApiKey({ config, flags }: Arguments): Promise<number> {
  const given = flags["--key-id"];
  if (given === undefined) throw new ConfigError(["revoke-api-key: --key-id is missing"]);
  const keyId = parseId("key", given);
  // Not repeated: it may be the whole key.
  if (keyId === undefined) {
    throw new ConfigError(["revoke-api-key: --key-id must be key_ and 26 characters, as they stand in the key itself"]);
  }
  await withServices(config, async ({ database, identity }) => {
    const revoked = await database.system((tx) => identity.revokeApiKey(tx, keyId));
    if (revoked === undefined) throw new ConfigError([`revoke-api-key: there is no key ${keyId}`]);
    const { organizationId, operatorId, name, revokeTime } = revoked;
    print({
      keyId,
      name,
      ...(organizationId === undefined ? {} : { organizationId }),
      ...(operatorId === undefined ? {} : { operatorId }),
      revokeTime: revokeTime.toISOString(),
    });
  });
  return 0;
}

async function forgetCa({ config }: Arguments): Promise<number> {
  await withServices(config, async ({ database }) => {
    const forgotten = await database.system(forgetAuthority);
    if (!forgotten) throw new ConfigError(["forget-ca: no control plane has served this database yet"]);
  });
  return 0;
}

/** The user that the flags name. As long as the columns that hold it, and like the claims byte by byte. */
function memberOf(flags: Arguments["flags"]): { member?: { issuer: string; subject: string } } {
  const [issuer, subject] = [flags["--member-issuer"], flags["--member-subject"]];
  if (issuer === undefined && subject === undefined) return {};
  if (!isClaim(issuer, 512) || !isClaim(subject, 255)) {
    throw new ConfigError([
      "create-organization: --member-issuer and --member-subject belong together: the claims iss and sub of the user's tokens",
    ]);
  }
  return { member: { issuer, subject } };
}

function isClaim(text: string | undefined, maxBytes: number): text is string {
  return text !== undefined && text !== "" && Buffer.byteLength(text) <= maxBytes;
}

/** As long as the columns that hold it. */
const maxNameCharacters = 128;

function checkName(command: string, name: string | undefined): string {
  if (name === undefined) throw new ConfigError([`${command}: --name is missing`]);
  if (!new RegExp(`^.{1,${maxNameCharacters}}$`, "u").test(name)) {
    throw new ConfigError([`${command}: --name must have 1 to ${maxNameCharacters} characters, in one line`]);
  }
  return name;
}

async function initDatabase(config: Config): Promise<number> {
  const { databaseAdminUrl: url } = config;
  if (url === "") throw new ConfigError(["CLODEI_DATABASE_ADMIN_URL: is missing"]);
  const caPem = config.databaseCaFile === "" ? undefined : readPem("CLODEI_DATABASE_CA_FILE", config.databaseCaFile);
  const passwords = createRolePasswords();
  await initializeRoles(connectionOf(url, caPem), passwords);
  process.stdout.write(
    `DATABASE_URL=${withLogin(url, appRole, passwords.app)}\n` +
      `DATABASE_SYSTEM_URL=${withLogin(url, systemRole, passwords.system)}\n` +
      `DATABASE_MIGRATION_URL=${withLogin(url, migratorRole, passwords.migrator)}\n`,
  );
  return 0;
}

/** The same database by another login. */
function withLogin(url: string, user: string, password: string): string {
  return url.replace(/^(postgres(?:ql)?:\/\/)(?:[^@/]*@)?/, `$1${user}:${password}@`);
}

type Services = {
  readonly database: Database;
  readonly identity: IdentityService;
  readonly organizations: OrganizationsService;
};

/** Opens the database for one command, also beside a server that runs on the same data folder. */
async function withServices(config: Config, work: (services: Services) => Promise<void>): Promise<void> {
  const log = createLog("warn");
  const clock = systemClock;
  const source = databaseSourceOf(config);
  // Opening would make one, and in it a key that no server knows.
  if (source.kind === "embedded" && !hasDatabase(source.dataFolder)) {
    throw new ConfigError([`${source.dataFolder} has no database: is --data right? \`serve\` makes one`]);
  }
  await using opened = await openDatabase(source, { log, share: true });
  await using database = new Database({ app: opened.app, system: opened.system, maxConnectionsPerPool: 2, log });
  const identity = new IdentityService({ issuers: config.jwtIssuers, clock, log });
  await work({ database, identity, organizations: new OrganizationsService({ database, identity, clock }) });
}

function hasDatabase(dataFolder: string): boolean {
  // Throws where this user may not look.
  return statSync(join(dataFolder, "postgres", "PG_VERSION"), { throwIfNoEntry: false }) !== undefined;
}

function print(value: Readonly<Record<string, string>>): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

const knownErrors = [AuthorityClaimError, ConfigError, ListenError, FolderInUseError, SchemaError, LoginError];

/** What parseArgs throws. */
function isArgumentError(error: unknown): boolean {
  return error instanceof TypeError && "code" in error && String(error.code).startsWith("ERR_PARSE_ARGS");
}

try {
  process.exitCode = await main();
} catch (error) {
  // A person reads this: what to change, without a stack. Everything else is a fault of ours and keeps it.
  const known = knownErrors.some((kind) => error instanceof kind) || isArgumentError(error);
  const text = error instanceof Error ? (known ? error.message : (error.stack ?? error.message)) : String(error);
  process.stderr.write(`clodei-control-plane: ${text}\n`);
  // 2: called wrongly, and nothing but another call helps. A port can be free the next time.
  process.exitCode = known && !(error instanceof ListenError) ? 2 : 1;
}
