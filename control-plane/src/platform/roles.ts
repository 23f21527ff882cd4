// The database's roles. The owner of the tables cannot log in; the migrator may become it; requests and jobs use
// logins that own nothing. `init-database` and the embedded database make them by the same code.
import { randomBytes } from "node:crypto";
import pg from "pg";

/** Owns every table and function. Cannot log in. */
export const ownerRole = "clodei_owner";
/** Runs migrations: may SET ROLE to the owner, and has no right of its own. */
export const migratorRole = "clodei_migrator";
/** Serves requests, under row-level security. */
export const appRole = "clodei_app";
/** Serves jobs and dispatch. */
export const systemRole = "clodei_system";

/** The passwords of the three logins. */
export type RolePasswords = { readonly app: string; readonly system: string; readonly migrator: string };

/** Makes new passwords, safe in URLs and in SQL. */
export function createRolePasswords(): RolePasswords {
  const create = (): string => randomBytes(24).toString("base64url");
  return { app: create(), system: create(), migrator: create() };
}

/**
 * Makes the roles in the database that an administrator is connected to, and sets the passwords. Idempotent.
 * Works for an administrator who is no superuser, as managed PostgreSQL gives it.
 */
export async function initializeRoles(administrator: pg.ClientConfig, passwords: RolePasswords): Promise<void> {
  const client = new pg.Client({ ...administrator, application_name: "clodei-init-database" });
  client.on("error", () => undefined);
  await client.connect();
  try {
    await client.query("begin");
    // Two starters at once: roles belong to the whole cluster, and "create role" knows no "if not exists".
    await client.query("select pg_advisory_xact_lock(hashtext('clodei-roles'))");
    await ensureRole(client, ownerRole, "nologin noinherit");
    await ensureRole(client, migratorRole, `login noinherit password '${checked(passwords.migrator)}'`);
    await ensureRole(client, appRole, `login noinherit password '${checked(passwords.app)}'`);
    await ensureRole(client, systemRole, `login noinherit password '${checked(passwords.system)}'`);
    await client.query(`grant ${ownerRole} to ${migratorRole}`);
    const names = await client.query<{ database: string }>("select quote_ident(current_database()) as database");
    const database = names.rows[0]?.database ?? "";
    await client.query(`revoke all on database ${database} from public`);
    await client.query(`grant connect on database ${database} to ${migratorRole}, ${appRole}, ${systemRole}`);
    await client.query("revoke create on schema public from public");
    await client.query(`grant usage, create on schema public to ${ownerRole}`);
    await client.query(`grant usage on schema public to ${migratorRole}, ${appRole}, ${systemRole}`);
    await client.query("commit");
  } finally {
    await client.end();
  }
}

async function ensureRole(client: pg.Client, name: string, attributes: string): Promise<void> {
  const found = await client.query("select 1 from pg_roles where rolname = $1", [name]);
  const verb = found.rowCount === 0 ? "create" : "alter";
  await client.query(`${verb} role ${name} ${attributes}`);
}

/** A password stands in the text of a statement, because "create role" takes no parameters. */
function checked(password: string): string {
  if (!/^[A-Za-z0-9_-]{16,128}$/.test(password))
    throw new Error("a role's password has characters that are not allowed");
  return password;
}
