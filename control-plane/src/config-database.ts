// Where the database may be: what would carry customers' data over an unverified connection is refused by name.
import { isLoopback } from "./config-values.ts";

/** The settings that say where the database is. */
type DatabaseSettings = {
  readonly databaseUrl: string;
  readonly databaseSystemUrl: string;
  readonly databaseMigrationUrl: string;
  readonly databaseAdminUrl: string;
  readonly databaseCaFile: string;
};

/** What is wrong with them, each with its variable. */
export function databaseProblems(config: DatabaseSettings): string[] {
  const urls = {
    DATABASE_URL: config.databaseUrl,
    DATABASE_SYSTEM_URL: config.databaseSystemUrl,
    DATABASE_MIGRATION_URL: config.databaseMigrationUrl,
    CLODEI_DATABASE_ADMIN_URL: config.databaseAdminUrl,
  };
  const problems: string[] = [];
  for (const [name, text] of Object.entries(urls)) {
    if (text === "") continue;
    const url = databaseUrlOf(text);
    if (url === undefined) {
      problems.push(`${name}: is not a postgres:// URL`);
      continue;
    }
    const mode = url.searchParams.get("sslmode");
    if (mode !== null && mode !== "verify-full" && !isLocalDatabase(url)) {
      problems.push(
        `${name}: sslmode=${mode} does not verify the database: the connection is always verified, leave it out`,
      );
    }
    if (config.databaseCaFile === "" && !isLocalDatabase(url)) {
      problems.push(`${name}: the database is not on this machine: give its CA as PEM in CLODEI_DATABASE_CA_FILE`);
    }
  }
  if (config.databaseMigrationUrl !== "" && config.databaseUrl === "") {
    problems.push("DATABASE_MIGRATION_URL: has no use without DATABASE_URL");
  }
  return problems;
}

/** The parts of a database URL, or undefined where it is none. `host` as a parameter names a socket's folder. */
export function databaseUrlOf(text: string): URL | undefined {
  if (!/^postgres(ql)?:\/\//.test(text)) return undefined;
  // URL knows no empty host with a user, which is how a unix socket is written.
  const url = URL.parse(text.replace(/^postgres(ql)?:\/\//, "http://").replace(/@\//, "@socket.invalid/"));
  return url ?? undefined;
}

/** Whether a database is reached without leaving the machine. */
export function isLocalDatabase(url: URL): boolean {
  // The driver takes the last of several; none may lead away.
  const hosts = url.searchParams.getAll("host");
  return hosts.length === 0 ? isLoopback(url.hostname) : hosts.every((host) => host.startsWith("/"));
}
