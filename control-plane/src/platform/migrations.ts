// Numbered SQL files, applied in order by the owner's role, all in one transaction under a lock: two starters at
// once are one migration, and a failure leaves the schema as it was. Migrations only append: a file that was
// applied and has changed since, or a database that knows a newer file, is refused.
import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import pg from "pg";
import { ownerRole } from "./roles.ts";

/** A migration file. */
export type Migration = {
  readonly version: number;
  readonly name: string;
  readonly sha256: string;
  readonly sql: string;
};

/** The database's schema and this program do not fit each other. */
export class SchemaError extends Error {
  constructor(message: string) {
    super(message);
    this.name = "SchemaError";
  }
}

/** The folder of this program's migrations. */
export const migrationsFolder = join(import.meta.dirname, "..", "..", "migrations");

const fileName = /^(\d{4})_[a-z0-9_]+\.sql$/;
/** How long a starter waits for another one that migrates. */
const lockTimeoutMs = 60_000;

/** Reads a folder's migrations, in order. */
export async function readMigrations(folder: string = migrationsFolder): Promise<Migration[]> {
  const migrations: Migration[] = [];
  for (const name of (await readdir(folder)).toSorted()) {
    if (!name.endsWith(".sql")) continue;
    const version = Number(fileName.exec(name)?.[1]);
    if (!Number.isInteger(version)) throw new SchemaError(`migration ${name} is not named NNNN_name.sql`);
    if (migrations.at(-1)?.version === version) throw new SchemaError(`two migrations have the number of ${name}`);
    const sql = await readFile(join(folder, name), "utf8");
    migrations.push({ version, name, sha256: createHash("sha256").update(sql).digest("hex"), sql });
  }
  return migrations;
}

/**
 * Brings the schema up to the migrations given, as a login that may SET ROLE to the owner.
 * @returns the names of the migrations that this call applied.
 * @throws SchemaError when the database is newer than the migrations, or was migrated by other files.
 */
export async function migrate(migrator: pg.ClientConfig, migrations: readonly Migration[]): Promise<string[]> {
  const client = new pg.Client({ ...migrator, application_name: "clodei-migrations" });
  client.on("error", () => undefined);
  await client.connect();
  try {
    await client.query("begin");
    await client.query(`set local lock_timeout = ${lockTimeoutMs}`);
    await client.query("select pg_advisory_xact_lock(hashtext('clodei-migrations'))");
    await client.query(`set local role ${ownerRole}`);
    await client.query(
      `create table if not exists schema_migrations (
        version integer primary key,
        name text not null,
        sha256 text not null,
        apply_time timestamptz not null default now()
      )`,
    );
    await client.query("grant select on schema_migrations to public");
    const pending = pendingMigrations(await appliedMigrations(client), migrations);
    for (const migration of pending) {
      try {
        await client.query(migration.sql);
      } catch (error) {
        throw new SchemaError(`migration ${migration.name}: ${error instanceof Error ? error.message : String(error)}`);
      }
      await client.query("insert into schema_migrations (version, name, sha256) values ($1, $2, $3)", [
        migration.version,
        migration.name,
        migration.sha256,
      ]);
    }
    await client.query("commit");
    return pending.map(({ name }) => name);
  } finally {
    await client.end();
  }
}

/** Checks, by any login, that the schema is the one of the migrations given. @throws SchemaError when it is not. */
export async function checkSchema(login: pg.ClientConfig, migrations: readonly Migration[]): Promise<void> {
  const client = new pg.Client({ ...login, application_name: "clodei-migrations" });
  client.on("error", () => undefined);
  await client.connect();
  try {
    const exists = await client.query("select to_regclass('public.schema_migrations') is not null as found");
    const applied = (exists.rows[0] as { found: boolean }).found ? await appliedMigrations(client) : [];
    const [first] = pendingMigrations(applied, migrations);
    if (first !== undefined) {
      throw new SchemaError(`the database lacks ${first.name}: give DATABASE_MIGRATION_URL, or migrate it first`);
    }
  } finally {
    await client.end();
  }
}

type Applied = { readonly version: number; readonly name: string; readonly sha256: string };

async function appliedMigrations(client: pg.Client): Promise<Applied[]> {
  const result = await client.query<Applied>("select version, name, sha256 from schema_migrations order by version");
  return result.rows;
}

function pendingMigrations(applied: readonly Applied[], known: readonly Migration[]): Migration[] {
  const byVersion = new Map(known.map((migration) => [migration.version, migration]));
  const newest = known.at(-1)?.version ?? 0;
  for (const { version, name, sha256 } of applied) {
    const migration = byVersion.get(version);
    if (migration === undefined) {
      const relation = version > newest ? "newer than this program" : "of another program";
      throw new SchemaError(`the database's schema is ${relation}: it has ${name}, the newest known here is ${newest}`);
    }
    if (migration.sha256 !== sha256) throw new SchemaError(`migration ${name} was applied with other content`);
  }
  const done = new Set(applied.map(({ version }) => version));
  return known.filter(({ version }) => !done.has(version));
}
