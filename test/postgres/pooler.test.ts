// A pooler in transaction mode gives each transaction whichever connection is free: what a session would keep is lost,
// or becomes another's. Nothing of ours stands on that but hints, and those are off then.
import assert from "node:assert/strict";
import { chown, mkdtemp, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { startTestDatabase } from "../../control-plane/src/platform/test-database.ts";
import { DebianServer, serverUnavailable } from "../harness/debian-server.ts";
import { engineUnavailable } from "../harness/engine.ts";
import { checkOwnDatabase, type DatabaseUrls } from "./own-database.ts";

const unavailable = engineUnavailable ?? serverUnavailable("pgbouncer");

/** PgBouncer before the database of the URLs, with few connections, so that transactions really share them. */
async function startPooler(folder: string, urls: DatabaseUrls): Promise<DebianServer> {
  const server = new URL(urls.DATABASE_URL.replace("@/", "@localhost/"));
  const host = server.searchParams.get("host") ?? "";
  const logins = Object.values(urls).map((url) => {
    const { username, password } = new URL(url.replace("@/", "@localhost/"));
    return `"${username}" "${password}"\n`;
  });
  await writeFile(join(folder, "users.txt"), logins.join(""));
  await writeFile(
    join(folder, "pgbouncer.ini"),
    `[databases]
${server.pathname.slice(1)} = host=${host} port=5432
[pgbouncer]
pool_mode = transaction
default_pool_size = 3
listen_addr =
listen_port = 5432
unix_socket_dir = ${folder}
auth_type = scram-sha-256
auth_file = ${join(folder, "users.txt")}
`,
  );
  // It uses the database's socket, which is open to one user alone.
  const { uid } = await stat(join(host, ".s.PGSQL.5432"));
  for (const path of [folder, join(folder, "users.txt"), join(folder, "pgbouncer.ini")]) await chown(path, uid, uid);
  return DebianServer.start({
    package: "pgbouncer",
    args: [join(folder, "pgbouncer.ini")],
    listens: [join(folder, ".s.PGSQL.5432")],
    ownerId: uid,
  });
}

describe("a pooler in transaction mode", { skip: unavailable, timeout: 900_000 }, () => {
  test("serves a whole system, which says that replicas send each other no hints", async () => {
    await using stack = new AsyncDisposableStack();
    const db = stack.use(await startTestDatabase({ migrated: false }));
    const folder = await mkdtemp(join(tmpdir(), "clodei-pooler-"));
    stack.defer(() => rm(folder, { recursive: true, force: true }));
    const output = await checkOwnDatabase(db.adminUrl, async (urls) => {
      stack.use(await startPooler(folder, urls));
      const through = (url: string): string => url.replace(/host=[^&]*/, `host=${encodeURIComponent(folder)}`);
      return {
        DATABASE_URL: through(urls.DATABASE_URL),
        DATABASE_SYSTEM_URL: through(urls.DATABASE_SYSTEM_URL),
        DATABASE_MIGRATION_URL: through(urls.DATABASE_MIGRATION_URL),
      };
    });
    assert.match(output, /a pooler stands between this process and the database/);
  });
});
