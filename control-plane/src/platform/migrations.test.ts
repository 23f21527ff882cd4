import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, beforeEach, describe, test } from "node:test";
import pg from "pg";
import { checkSchema, type Migration, migrate, readMigrations, SchemaError } from "./migrations.ts";
import { createRolePasswords, initializeRoles } from "./roles.ts";
import { startTestDatabase, type TestDatabase } from "./test-database.ts";

describe("migrations", () => {
  let db: TestDatabase;
  before(async () => {
    db = await startTestDatabase({ migrated: false });
  });
  after(async () => {
    await db[Symbol.asyncDispose]();
  });
  beforeEach(async () => {
    await asAdministrator(`drop schema public cascade; create schema public;
      grant usage, create on schema public to clodei_owner; grant usage on schema public to public`);
  });

  async function asAdministrator(text: string, connection = db.administrator): Promise<Record<string, unknown>[]> {
    const client = new pg.Client(connection);
    await client.connect();
    try {
      const { rows } = await client.query<Record<string, unknown>>(text);
      return rows;
    } finally {
      await client.end();
    }
  }

  const migration = (version: number, sql: string): Migration => ({
    version,
    name: `${String(version).padStart(4, "0")}_test.sql`,
    sha256: createHash("sha256").update(sql).digest("hex"),
    sql,
  });

  test("the program's own migrations apply to an empty database, and a second run does nothing", async () => {
    const all = await readMigrations();
    await assert.rejects(checkSchema(db.server.app, all), /the database lacks 0001_platform\.sql/);
    assert.deepEqual(
      await migrate(db.server.migrator, all),
      all.map(({ name }) => name),
    );
    assert.deepEqual(await migrate(db.server.migrator, all), []);
    await checkSchema(db.server.app, all);
  });

  test("two runners at once are one migration", async () => {
    // Slow, so that both are certainly there: what would fail twice is "create table".
    const slow = [migration(1, "create table a (n int); select pg_sleep(0.3)"), migration(2, "create table b (n int)")];
    const applied = await Promise.all([migrate(db.server.migrator, slow), migrate(db.server.migrator, slow)]);
    assert.deepEqual(
      applied.map(({ length }) => length).toSorted((a, b) => a - b),
      [0, 2],
    );
  });

  test("a migration that fails leaves the schema as it was, and says which one it is", async () => {
    await migrate(db.server.migrator, [migration(1, "create table a (n int)")]);
    const broken = [
      migration(1, "create table a (n int)"),
      migration(2, "create table b (n int)"),
      migration(3, "selec 1"),
    ];
    await assert.rejects(migrate(db.server.migrator, broken), /0003_test\.sql: syntax error/);
    assert.deepEqual(await asAdministrator("select version from schema_migrations"), [{ version: 1 }]);
    assert.deepEqual(await asAdministrator("select to_regclass('b') as b"), [{ b: null }]);
  });

  test("an older database is brought up to date", async () => {
    const [first, second] = [migration(1, "create table a (n int)"), migration(2, "alter table a add m int")];
    await migrate(db.server.migrator, [first]);
    await assert.rejects(checkSchema(db.server.app, [first, second]), /lacks 0002_test\.sql/);
    assert.deepEqual(await migrate(db.server.migrator, [first, second]), ["0002_test.sql"]);
  });

  test("a newer database is refused, by a migrator and by a replica that only looks", async () => {
    const [first, second] = [migration(1, "create table a (n int)"), migration(2, "alter table a add m int")];
    await migrate(db.server.migrator, [first, second]);
    const isNewer = (error: unknown): boolean =>
      error instanceof SchemaError && /newer than this program/.test(error.message);
    await assert.rejects(migrate(db.server.migrator, [first]), isNewer);
    await assert.rejects(checkSchema(db.server.app, [first]), isNewer);
  });

  test("a migration that was changed after it was applied is refused", async () => {
    await migrate(db.server.migrator, [migration(1, "create table a (n int)")]);
    await assert.rejects(migrate(db.server.migrator, [migration(1, "create table a (m int)")]), /other content/);
  });

  test("what migrations make belongs to the owner, and the migrator itself may do nothing", async () => {
    await migrate(db.server.migrator, [migration(1, "create table a (n int)")]);
    assert.deepEqual(await asAdministrator("select tableowner from pg_tables where tablename = 'a'"), [
      { tableowner: "clodei_owner" },
    ]);
    await assert.rejects(asAdministrator("select * from a", db.server.migrator), /permission denied/);
  });

  test("files that are not numbered, or share a number, are refused", async () => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-migrations-"));
    try {
      await writeFile(join(folder, "0001_a.sql"), "select 1");
      assert.deepEqual(
        (await readMigrations(folder)).map(({ version }) => version),
        [1],
      );
      await writeFile(join(folder, "0001_b.sql"), "select 1");
      await assert.rejects(readMigrations(folder), /two migrations/);
      await rm(join(folder, "0001_b.sql"));
      await writeFile(join(folder, "first.sql"), "select 1");
      await assert.rejects(readMigrations(folder), /not named/);
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  test("an administrator who is no superuser can make the roles, in a database of its own", async () => {
    // Roles belong to the cluster: those of the embedded database go first, as on a fresh managed one.
    await using fresh = await startTestDatabase({ migrated: false });
    const run = (text: string, connection = fresh.administrator): Promise<unknown> => asAdministrator(text, connection);
    await run("drop owned by clodei_owner cascade; drop owned by clodei_app, clodei_system, clodei_migrator cascade");
    await run("drop role clodei_app, clodei_system, clodei_migrator, clodei_owner");
    await run("create role manager login createrole createdb password 'manager-password'");
    await run("create database managed owner manager");
    const manager = { ...fresh.administrator, user: "manager", password: "manager-password", database: "managed" };
    const passwords = createRolePasswords();
    await initializeRoles(manager, passwords);
    const again = createRolePasswords();
    await initializeRoles(manager, again);
    const migrator = { ...manager, user: "clodei_migrator", password: again.migrator };
    const all = await readMigrations();
    assert.equal((await migrate(migrator, all)).length, all.length);
    await checkSchema({ ...manager, user: "clodei_app", password: again.app }, all);
    await assert.rejects(checkSchema({ ...manager, user: "clodei_app", password: passwords.app }, all), /password/);
  });
});
