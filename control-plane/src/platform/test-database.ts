// A real PostgreSQL for a test: in a folder of its own, migrated, gone afterwards. The embedded one, or the one that the
// environment names, by which the same tests run on another version.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type pg from "pg";
import { Database } from "./database.ts";
import { type EmbeddedPostgres, type PostgresPrograms, startEmbeddedPostgres } from "./embedded-postgres.ts";
import { createLog, type Log } from "./log.ts";
import { migrate, readMigrations } from "./migrations.ts";
import { Wakeups } from "./wakeups.ts";

/** A migrated database of a test. Hold it by `await using`. */
export type TestDatabase = AsyncDisposable & {
  readonly database: Database;
  /** Connected hints of this database. */
  readonly wakeups: Wakeups;
  readonly log: Log;
  readonly server: EmbeddedPostgres;
  /** The superuser's connection, to look at what no login of ours may see. */
  readonly administrator: pg.ClientConfig;
  /** The same as a URL. */
  readonly adminUrl: string;
};

/** Starts a PostgreSQL with every migration applied. Takes about a second. */
export async function startTestDatabase(options: { readonly migrated?: boolean } = {}): Promise<TestDatabase> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-test-"));
  const stack = new AsyncDisposableStack();
  try {
    stack.defer(() => rm(folder, { recursive: true, force: true }));
    const log = createLog("silent");
    const server = stack.use(
      await startEmbeddedPostgres({ dataFolder: folder, durable: false, programs: testPrograms(), log }),
    );
    if (options.migrated ?? true) await migrate(server.migrator, await readMigrations());
    const database = stack.use(
      new Database({ app: server.app, system: server.system, maxConnectionsPerPool: 10, log }),
    );
    const wakeups = stack.use(new Wakeups({ connection: server.system, log }));
    await wakeups.start();
    const resources = stack.move();
    return {
      database,
      wakeups,
      log,
      server,
      administrator: server.administrator,
      adminUrl: urlOf(server.administrator),
      [Symbol.asyncDispose]: () => resources.disposeAsync(),
    };
  } catch (error) {
    await stack.disposeAsync();
    throw error;
  }
}

/** Where `bin/postgres` is, if the tests shall not use the embedded PostgreSQL. */
export const testPostgresVariable = "CLODEI_TEST_POSTGRES";
/** Folders of libraries that it needs beside the system's. */
export const testPostgresLibrariesVariable = "CLODEI_TEST_POSTGRES_LIBRARIES";

function testPrograms(): PostgresPrograms | undefined {
  const folder = process.env[testPostgresVariable];
  if (folder === undefined || folder === "") return undefined;
  return { folder, libraries: process.env[testPostgresLibrariesVariable] ?? "" };
}

/** A login as a URL. */
export function urlOf(connection: pg.ClientConfig): string {
  const { user = "", password, host = "", database = "" } = connection;
  const secret = typeof password === "string" ? password : "";
  return `postgres://${user}:${secret}@/${database}?host=${encodeURIComponent(host)}`;
}
