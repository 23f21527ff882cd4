// The logins that we were given are checked before they are used: row-level security protects nothing from a
// superuser, and a login that may become the owner could switch it off.
import pg from "pg";
import { ownerRole } from "./roles.ts";

/** A database login that must not be used. */
export class LoginError extends Error {
  constructor(message: string) {
    super(message);
    this.name = "LoginError";
  }
}

const insufficientPrivilege = "42501";

/** @throws LoginError when the connection is not the role's, or has rights that it must not have. */
export async function checkLogin(connection: pg.ClientConfig, role: string): Promise<void> {
  const client = new pg.Client({ ...connection, application_name: "clodei-login-check" });
  client.on("error", () => undefined);
  await client.connect();
  try {
    const result = await client.query<{ name: string; powerful: boolean }>(
      `select current_user::text as name, rolsuper or rolbypassrls or rolcreaterole as powerful
      from pg_roles where rolname = current_user`,
    );
    const [login] = result.rows;
    if (login?.name !== role) throw new LoginError(`the login is ${login?.name ?? "unknown"} and must be ${role}`);
    if (login.powerful)
      throw new LoginError(`${role} must not be a superuser, bypass row-level security, or make roles`);
    // For a transaction only: a pooler would give the connection, and the role with it, to the next one who asks.
    await client.query("begin");
    const became = await client.query(`set local role ${ownerRole}`).then(
      () => true,
      (error: unknown) => {
        if (error instanceof pg.DatabaseError && error.code === insufficientPrivilege) return false;
        throw error;
      },
    );
    await client.query("rollback");
    if (became) throw new LoginError(`${role} must not be able to become ${ownerRole}`);
  } finally {
    await client.end();
  }
}
