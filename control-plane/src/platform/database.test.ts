import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { newId, type OrganizationId } from "@clodei/proto/ids";
import pg from "pg";
import { eventually } from "../../../test/harness/eventually.ts";
import { Database, DatabaseAwayError, idArray } from "./database.ts";
import { DomainError } from "./errors.ts";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { checkLogin, LoginError } from "./logins.ts";
import { startTestDatabase, type TestDatabase } from "./test-database.ts";

describe("the database", () => {
  let db: TestDatabase;
  before(async () => {
    db = await startTestDatabase();
  });
  after(async () => {
    await db[Symbol.asyncDispose]();
  });

  const whoAmI = "select current_user::text as who, session_user::text as login";

  test("requests and jobs are logins of their own, and neither can become another role", async () => {
    const organizationId = newId("org");
    const [app] = await db.database.tenant(organizationId, (tx) => tx.query(whoAmI));
    assert.deepEqual(app, { who: "clodei_app", login: "clodei_app" });
    const [anonymous] = await db.database.anonymous((tx) => tx.query(whoAmI));
    assert.deepEqual(anonymous, { who: "clodei_app", login: "clodei_app" });
    const [system] = await db.database.system((tx) => tx.query(whoAmI));
    assert.deepEqual(system, { who: "clodei_system", login: "clodei_system" });
    for (const role of ["clodei_owner", "clodei_migrator", "clodei_system", "postgres"]) {
      await assert.rejects(
        db.database.anonymous((tx) => tx.execute(`set role ${role}`)),
        /permission denied to set role/,
      );
    }
    for (const role of ["clodei_owner", "clodei_migrator", "clodei_app", "postgres"]) {
      await assert.rejects(
        db.database.system((tx) => tx.execute(`set role ${role}`)),
        /permission denied to set role/,
      );
    }
  });

  test("each table that requests can touch forces row-level security, and each belongs to an owner that cannot log in", async () => {
    const client = new pg.Client(db.administrator);
    await client.connect();
    try {
      const { rows } = await client.query<{ name: string; owner: string; forced: boolean; hidden: boolean }>(
        `select relname as name, pg_get_userbyid(relowner) as owner, relrowsecurity and relforcerowsecurity as forced,
          not has_any_column_privilege('clodei_app', oid, 'select, insert, update, references')
          and not has_table_privilege('clodei_app', oid, 'delete, truncate, trigger') and not exists (
            select 1 from pg_attribute where attrelid = oid and attname = 'organization_id'
          ) as hidden
        from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')`,
      );
      assert.ok(rows.length >= 5, "the migrations made tables");
      // No organization's data: which migrations ran, and which database this is.
      const open = new Set(["schema_migrations", "database_identity"]);
      for (const { name, owner, forced, hidden } of rows) {
        assert.equal(owner, "clodei_owner", name);
        // Only what holds no organization's rows, and what requests cannot touch, does without.
        if (!open.has(name)) assert.ok(forced || hidden, `${name} must force row-level security`);
      }
      const views = await client.query(
        `select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'v'
        and not coalesce(reloptions @> array['security_invoker=true'], false)`,
      );
      assert.deepEqual(views.rows, []);
      const login = await client.query("select rolcanlogin from pg_roles where rolname = 'clodei_owner'");
      assert.deepEqual(login.rows, [{ rolcanlogin: false }]);
    } finally {
      await client.end();
    }
  });

  test("functions that run as the owner pin their search path and answer only whom they were granted to", async () => {
    const client = new pg.Client(db.administrator);
    await client.connect();
    try {
      const { rows } = await client.query<{ name: string; pinned: boolean; open: boolean }>(
        `select p.oid::regprocedure::text as name,
          exists (select 1 from unnest(proconfig) as c where c like 'search_path=%') as pinned,
          has_function_privilege('public', p.oid, 'execute') as open
        from pg_proc p where pronamespace = 'public'::regnamespace and prosecdef`,
      );
      for (const { name, pinned, open } of rows) {
        assert.ok(pinned, `${name} must pin its search path`);
        assert.ok(!open, `${name} must not be callable by everybody`);
      }
    } finally {
      await client.end();
    }
  });

  test("an organization sees its own rows, and without the setting there are none", async () => {
    const [mine, other] = [newId("org"), newId("org")];
    const insert = (organizationId: OrganizationId): Promise<number> =>
      db.database.tenant(organizationId, (tx) =>
        tx.execute(
          `insert into changes (organization_id, kind, subject_id, payload) values ($1, 'instance', 'ins_x', '\\x00')`,
          [organizationId],
        ),
      );
    await insert(mine);
    await insert(other);
    const count = "select organization_id from changes order by organization_id";
    assert.deepEqual(await db.database.tenant(mine, (tx) => tx.query(count)), [{ organization_id: mine }]);
    assert.deepEqual(await db.database.anonymous((tx) => tx.query(count)), []);
    // A pooled connection that served a tenant has the setting '' afterwards, not null.
    for (let round = 0; round < 20; round += 1) {
      assert.deepEqual(await db.database.anonymous((tx) => tx.query(count)), []);
    }
    assert.equal((await db.database.system((tx) => tx.query(count))).length, 2);
    await assert.rejects(
      db.database.tenant(mine, (tx) =>
        tx.execute(
          `insert into changes (organization_id, kind, subject_id, payload) values ($1, 'instance', 'ins_x', '\\x00')`,
          [other],
        ),
      ),
      /row-level security/,
    );
  });

  test("an organization id that is none never reaches SQL", async () => {
    const evil = "org_'; select 1; --" as OrganizationId;
    await assert.rejects(
      db.database.tenant(evil, () => Promise.resolve()),
      TypeError,
    );
  });

  test("effects follow the commit, and never a rollback", async () => {
    const effects: string[] = [];
    await db.database.system(async (tx) => {
      tx.afterCommit(() => effects.push("committed"));
      await tx.query("select 1");
      assert.deepEqual(effects, []);
    });
    await assert.rejects(
      db.database.system(async (tx) => {
        tx.afterCommit(() => effects.push("rolled back"));
        throw new DomainError(ErrorReason.CONFLICT, "no");
      }),
      DomainError,
    );
    assert.deepEqual(effects, ["committed"]);
  });

  test("an error that the work swallows does not commit half of it", async () => {
    await assert.rejects(
      db.database.system(async (tx) => {
        await tx.query("select 1 / 0").catch(() => undefined);
      }),
      /swallowed/,
    );
  });

  test("a deadlock costs a retry, not the request", async () => {
    await db.database.system((tx) =>
      tx.execute(
        `insert into idempotency_records (organization_id, caller_id, method, key, request_sha256)
        select '', 'deadlock', 'm', k, sha256('x') from unnest(array['a', 'b']) as k`,
      ),
    );
    const lock = `update idempotency_records set redacted = true where caller_id = 'deadlock' and key = $1`;
    const arrived = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
    const attempts = [0, 0];
    const run = (side: 0 | 1, first: string, second: string): Promise<number> =>
      db.database.system(async (tx) => {
        attempts[side] = (attempts[side] ?? 0) + 1;
        await tx.execute(lock, [first]);
        arrived[side]?.resolve();
        await arrived[1 - side]?.promise;
        return tx.execute(lock, [second]);
      });
    assert.deepEqual(await Promise.all([run(0, "a", "b"), run(1, "b", "a")]), [1, 1]);
    // Three, or more where the two meet again.
    assert.ok((attempts[0] ?? 0) + (attempts[1] ?? 0) >= 3);
  });

  test("ids go in as an array, and nothing but ids", async () => {
    const [row] = await db.database.look((tx) =>
      tx.query("select $1::text[] as texts, $2::int8[] as numbers, $3::text[] as none", [
        idArray(["ins_01h", "f81d4fae-7dec"]),
        idArray([-1n, 2n]),
        idArray([]),
      ]),
    );
    assert.deepEqual(row, { texts: ["ins_01h", "f81d4fae-7dec"], numbers: [-1n, 2n], none: [] });
    for (const text of ['a"b', "a b", "a,b", "", "null", "a{", "a\\b", "a'b", "é", "a\n"]) {
      assert.throws(() => idArray([text]), TypeError, text);
      assert.throws(() => idArray(["a", text, "b"]), TypeError, text);
    }
  });

  test("int8 comes as bigint and timestamps as dates", async () => {
    const [row] = await db.database.system((tx) =>
      tx.query("select 9007199254740993::int8 as n, array[1, 2]::int8[] as many, 'epoch'::timestamptz as t"),
    );
    assert.deepEqual(row, { n: 9007199254740993n, many: [1n, 2n], t: new Date(0) });
  });

  test("a login with rights that it must not have is refused", async () => {
    await checkLogin(db.server.app, "clodei_app");
    await checkLogin(db.server.system, "clodei_system");
    await assert.rejects(checkLogin(db.server.system, "clodei_app"), LoginError);
    await assert.rejects(checkLogin(db.administrator, "postgres"), /superuser/);
    await assert.rejects(checkLogin(db.server.migrator, "clodei_migrator"), /become clodei_owner/);
  });

  test("a database whose connections are all busy is healthy", async () => {
    const release = Promise.withResolvers<void>();
    const busy = Array.from({ length: 12 }, () => db.database.system(() => release.promise));
    try {
      assert.equal(await db.database.isHealthy(), true);
    } finally {
      release.resolve();
      await Promise.all(busy);
    }
  });

  test("a connection that went dead without a word is given up, and health comes back with the next one", async () => {
    await using proxy = await startSocketProxy(db.server.app, (near, far) => near.pipe(far).pipe(near));
    const database = new Database({
      app: proxy.login(db.server.app),
      system: proxy.login(db.server.system),
      log: db.log,
    });
    assert.equal(await database.isHealthy(), true);
    // As a network that drops packets: nothing arrives, and nobody is told.
    for (const socket of proxy.sockets) socket.unpipe().pause();
    assert.equal(await database.isHealthy(500), false);
    await eventually(30_000, async () => assert.ok(await database.isHealthy()));
    for (const socket of proxy.sockets) socket.destroy();
    await database.close();
  });

  test("a connection that ends in the moment in which it is made is an absence, and no more", async () => {
    // The end comes in one piece with the server's first "ready": nobody had the time to listen for it.
    const field = (name: string, value: string): Buffer => Buffer.from(`${name}${value}\0`);
    const fields = Buffer.concat([
      field("S", "FATAL"),
      field("C", "57P01"),
      field("M", "terminating connection"),
      Buffer.of(0),
    ]);
    const head = Buffer.alloc(5, "E");
    head.writeUInt32BE(fields.length + 4, 1);
    const end = Buffer.concat([head, fields]);
    const ready = Buffer.from("Z\0\0\0\x05I", "latin1");
    let ended = 0;
    await using proxy = await startSocketProxy(db.server.app, (near, far) => {
      near.pipe(far);
      far.on("data", (data: Buffer) => {
        if (!data.subarray(-ready.length).equals(ready)) return near.write(data);
        ended += 1;
        return near.end(Buffer.concat([data, end]));
      });
    });
    const database = new Database({
      app: proxy.login(db.server.app),
      system: proxy.login(db.server.system),
      log: db.log,
    });
    await assert.rejects(
      database.system((tx) => tx.query("select 1")),
      DatabaseAwayError,
    );
    await assert.rejects(
      database.anonymous((tx) => tx.query("select 1")),
      DatabaseAwayError,
    );
    assert.ok(ended >= 2);
    await database.close();
  });

  test("a connection that the server ended is its absence, whether the end is read or written into", async () => {
    const administrator = new pg.Client(db.server.administrator);
    await administrator.connect();
    const end = (pid: number): Promise<unknown> => administrator.query("select pg_terminate_backend($1, 5000)", [pid]);
    const self = "select pg_backend_pid() as pid";
    try {
      // In the middle of a statement, and between two: there the next write finds a socket that is closed (EPIPE).
      const during = db.database.system(async (tx) => {
        const [row] = await tx.query<{ pid: number }>(self);
        await Promise.all([tx.query("select pg_sleep(10)"), end(row?.pid ?? 0)]);
      });
      const between = db.database.system(async (tx) => {
        const [row] = await tx.query<{ pid: number }>(self);
        await end(row?.pid ?? 0);
        await tx.query("select 1");
      });
      await Promise.all([assert.rejects(during, DatabaseAwayError), assert.rejects(between, DatabaseAwayError)]);
      const gone = new Database({
        app: { ...db.server.app, host: "/nonexistent" },
        system: { ...db.server.system, host: "/nonexistent" },
        log: db.log,
      });
      await assert.rejects(
        gone.anonymous((tx) => tx.query("select 1")),
        DatabaseAwayError,
      );
      await gone.close();
    } finally {
      await administrator.end();
    }
    // What the work itself cannot reach is not the database, and neither is a statement that is wrong.
    const other = Object.assign(new Error("connect"), { code: "ECONNREFUSED" });
    await assert.rejects(
      db.database.system(() => Promise.reject(other)),
      other,
    );
    await assert.rejects(
      db.database.system((tx) => tx.query("select nonsense")),
      pg.DatabaseError,
    );
  });

  test("a database that does not answer is not healthy", async () => {
    assert.equal(await db.database.isHealthy(), true);
    process.kill(db.server.processId, "SIGSTOP");
    try {
      // The postmaster alone sleeps: sessions that stand would still answer, a new one does not.
      await assert.rejects(
        (async () => {
          const client = new pg.Client({ ...db.server.app, connectionTimeoutMillis: 200 });
          await client.connect();
        })(),
      );
    } finally {
      process.kill(db.server.processId, "SIGCONT");
    }
    assert.equal(await db.database.isHealthy(), true);
  });
});

/** A network between us and the server's unix socket. */
async function startSocketProxy(to: pg.ClientConfig, link: (near: Socket, far: Socket) => void) {
  const { host = "", port = 5432 } = to;
  const folder = await mkdtemp(join(tmpdir(), "clodei-proxy-"));
  const sockets = new Set<Socket>();
  const server = createServer((near) => {
    const far = connect(join(host, `.s.PGSQL.${port}`));
    for (const socket of [near, far]) {
      sockets.add(socket);
      socket.on("error", () => undefined);
    }
    link(near, far);
  });
  await once(server.listen(join(folder, `.s.PGSQL.${port}`)), "listening");
  return {
    sockets,
    login: (connection: pg.ClientConfig): pg.ClientConfig => ({ ...connection, host: folder }),
    async [Symbol.asyncDispose](): Promise<void> {
      for (const socket of sockets) socket.destroy();
      server.close();
      await rm(folder, { recursive: true });
    },
  };
}
