// The database of an installation, wherever it is: its own embedded one, or the one that URLs name. What comes out
// is how each login connects, with the schema at this program's version and the logins checked.
import type pg from "pg";
import { attachEmbeddedPostgres, startEmbeddedPostgres } from "./embedded-postgres.ts";
import type { Log } from "./log.ts";
import { checkLogin } from "./logins.ts";
import { checkSchema, migrate, readMigrations } from "./migrations.ts";
import { appRole, systemRole } from "./roles.ts";

/** Where a database is. */
export type DatabaseSource =
  | { readonly kind: "embedded"; readonly dataFolder: string }
  | {
      readonly kind: "urls";
      readonly appUrl: string;
      readonly systemUrl: string;
      /** Undefined: the schema must be up to date already. */
      readonly migrationUrl: string | undefined;
      /** PEM of the CA that the server's certificate is verified by. Undefined only for a database on this machine. */
      readonly caPem: string | undefined;
    };

/** A database that is ready to be used. */
export type OpenedDatabase = AsyncDisposable & {
  readonly app: pg.ClientConfig;
  readonly system: pg.ClientConfig;
  /** Aborts when an embedded server ends by itself. */
  readonly ended: AbortSignal | undefined;
};

/**
 * Opens a database, and brings its schema up to date.
 * @param options.share use the embedded server of a running process, for commands beside it.
 */
export async function openDatabase(
  source: DatabaseSource,
  options: { readonly log: Log; readonly share?: boolean },
): Promise<OpenedDatabase> {
  const opened = source.kind === "embedded" ? await openEmbedded(source.dataFolder, options) : openUrls(source);
  try {
    const migrations = await readMigrations();
    if (opened.migrator === undefined) await checkSchema(opened.app, migrations);
    else {
      const applied = await migrate(opened.migrator, migrations);
      if (applied.length > 0) options.log.info({ applied }, "the database's schema was brought up to date");
    }
    await checkLogin(opened.app, appRole);
    await checkLogin(opened.system, systemRole);
    return opened;
  } catch (error) {
    await opened[Symbol.asyncDispose]();
    throw error;
  }
}

type Opened = OpenedDatabase & { readonly migrator: pg.ClientConfig | undefined };

async function openEmbedded(
  dataFolder: string,
  options: { readonly log: Log; readonly share?: boolean },
): Promise<Opened> {
  const running = options.share === true ? await attachEmbeddedPostgres(dataFolder) : undefined;
  if (running !== undefined) return { ...running, ended: undefined, [Symbol.asyncDispose]: () => Promise.resolve() };
  return startEmbeddedPostgres({ dataFolder, log: options.log });
}

function openUrls(source: Extract<DatabaseSource, { kind: "urls" }>): Opened {
  const { appUrl, systemUrl, migrationUrl, caPem } = source;
  return {
    app: connectionOf(appUrl, caPem),
    system: connectionOf(systemUrl, caPem),
    migrator: migrationUrl === undefined ? undefined : connectionOf(migrationUrl, caPem),
    ended: undefined,
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
}

/** A URL as the driver takes it. Its TLS parameters go: the driver would let them loosen what is verified. */
export function connectionOf(url: string, caPem: string | undefined): pg.ClientConfig {
  const [base = "", query = ""] = url.split("?", 2);
  const parameters = new URLSearchParams(query);
  for (const name of [...parameters.keys()])
    if (name.startsWith("ssl") || name === "uselibpqcompat") parameters.delete(name);
  const rest = parameters.toString();
  return {
    connectionString: rest === "" ? base : `${base}?${rest}`,
    ...(caPem === undefined ? {} : { ssl: { ca: caPem, rejectUnauthorized: true } }),
  };
}
