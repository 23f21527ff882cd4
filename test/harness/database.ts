// A PostgreSQL for a test whose control planes share it, or whose connections the test itself cuts.
import { join } from "node:path";
import pg from "pg";
import { type EmbeddedPostgres, startEmbeddedPostgres } from "../../control-plane/src/platform/embedded-postgres.ts";
import { createLog } from "../../control-plane/src/platform/log.ts";
import { urlOf } from "../../control-plane/src/platform/test-database.ts";

/** A database server of the test's own. */
export class TestDatabaseServer implements AsyncDisposable {
  readonly #server: EmbeddedPostgres;

  private constructor(server: EmbeddedPostgres) {
    this.#server = server;
  }

  static async start(folder: string): Promise<TestDatabaseServer> {
    const dataFolder = join(folder, "database");
    return new TestDatabaseServer(
      await startEmbeddedPostgres({ dataFolder, durable: false, log: createLog("silent") }),
    );
  }

  /** The settings by which a control plane finds it. */
  get env(): Readonly<Record<string, string>> {
    const { app, system, migrator } = this.#server;
    return {
      DATABASE_URL: urlOf(app),
      DATABASE_SYSTEM_URL: urlOf(system),
      DATABASE_MIGRATION_URL: urlOf(migrator),
    };
  }

  /** Asks as the superuser, past every rule. */
  async query<Row extends pg.QueryResultRow>(text: string, values: readonly unknown[] = []): Promise<Row[]> {
    const client = new pg.Client(this.#server.administrator);
    await client.connect();
    try {
      return (await client.query<Row>(text, [...values])).rows;
    } finally {
      await client.end();
    }
  }

  /** Ends every connection that a control plane has, as a failover does. */
  async cutConnections(): Promise<void> {
    await this.query("select pg_terminate_backend(pid) from pg_stat_activity where usename like 'clodei%'");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server[Symbol.asyncDispose]();
  }
}
