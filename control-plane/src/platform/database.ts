// The two ways into PostgreSQL, each a login and a pool of its own, because injected SQL could undo a SET ROLE:
// clodei_app works for one organization under row-level security, clodei_system for jobs and dispatch. Every
// statement stands in a transaction of this helper, which sets the tenant first: no setting means no rows.
import type { OrganizationId } from "@clodei/proto/ids";
import pg from "pg";
import type { Log } from "./log.ts";

/** A transaction. */
export type Tx = {
  /** Runs one statement and returns its rows. `int8` comes as bigint, `timestamptz` as Date, `bytea` as Buffer. */
  query<Row extends object>(text: string, values?: readonly unknown[]): Promise<Row[]>;
  /** Runs one statement and returns how many rows it touched. */
  execute(text: string, values?: readonly unknown[]): Promise<number>;
  /** Runs an effect once the transaction has committed, and never if it has not. For hints: it must not fail. */
  afterCommit(effect: () => void): void;
};

/** A transaction of clodei_app that sees one organization's rows. */
export type TenantTx = Tx & { readonly organizationId: OrganizationId };

/** A transaction of clodei_system, which sees every organization. For the listed stores of jobs and dispatch. */
export type SystemTx = Tx & { readonly system: true };

/** How a transaction runs. */
export type TransactionOptions = {
  /** "repeatable read" gives all statements one snapshot. Default: "read committed". */
  readonly isolation?: "read committed" | "repeatable read";
};

/** Where the database is, and how much of it to use. */
export type DatabaseOptions = {
  readonly app: pg.ClientConfig;
  readonly system: pg.ClientConfig;
  readonly maxConnectionsPerPool?: number;
  readonly log: Log;
};

/** A statement that takes longer has lost its caller: the longest deadline of a unary call is near. */
const statementTimeoutMs = 15_000;
/** A transaction that idles this long has lost its process's attention; it holds locks that others wait for. */
const idleInTransactionTimeoutMs = 15_000;
const connectTimeoutMs = 5_000;
/**
 * Longer than the server lets a statement run: only a connection that went dead without a word takes it. Without it
 * a failover would hold requests, and their connections, until TCP gives up after a quarter of an hour.
 */
const queryTimeoutMs = statementTimeoutMs + 5_000;
/** A question of health that takes longer is answered by no. */
const healthTimeoutMs = 2_000;
const idleConnectionMs = 60_000;
const maxAttempts = 4;
const retryDelayMs = 10;
/** Serialization failure and deadlock: PostgreSQL asks for the whole transaction again. */
const retryableCodes: ReadonlySet<string> = new Set(["40001", "40P01"]);
const organizationIdShape = /^org_[0-9a-hjkmnp-tv-z]{26}$/;

const int8Oid = 20;
const int8ArrayOid = 1016;

/** The driver types its parsers as `any`. */
const defaultParser = pg.types.getTypeParser as (oid: number, format: "text" | "binary") => (value: string) => unknown;

/** Parses int8 as bigint in our connections alone, without touching the driver's global parsers. */
const typeParsers: pg.CustomTypesConfig = {
  getTypeParser(oid: number, format?: string) {
    const base = defaultParser(oid, format === "binary" ? "binary" : "text");
    if (oid === int8Oid) return (text: string) => BigInt(text);
    if (oid === int8ArrayOid) {
      return (text: string) => {
        const parts = base(text);
        return Array.isArray(parts) ? parts.map((part) => BigInt(String(part))) : parts;
      };
    }
    return base;
  },
};

/**
 * The database cannot be reached now: the connection failed, or its server ends it. Made here alone, where it is known
 * that an ECONNRESET is the database's and not that of something else which a request needed.
 */
export class DatabaseAwayError extends Error {
  constructor(cause: unknown) {
    super("the database cannot be reached", { cause });
    this.name = "DatabaseAwayError";
  }
}

/** The database as the program uses it. */
export class Database implements AsyncDisposable {
  readonly #app: pg.Pool;
  readonly #system: pg.Pool;
  /** One connection of each login for the question of health: that all others are busy is no illness. */
  readonly #probes: readonly pg.Pool[];
  readonly #log: Log;
  #closing: Promise<void> | undefined;

  constructor(options: DatabaseOptions) {
    this.#log = options.log;
    const max = options.maxConnectionsPerPool ?? 10;
    this.#app = this.#createPool({ ...options.app, application_name: "clodei-app" }, max, queryTimeoutMs);
    this.#system = this.#createPool({ ...options.system, application_name: "clodei-system" }, max, queryTimeoutMs);
    this.#probes = [options.app, options.system].map((login) =>
      this.#createPool({ ...login, application_name: "clodei-health" }, 1, healthTimeoutMs),
    );
  }

  /** Runs work as clodei_app for one organization, in one transaction. It may run again after a conflict. */
  async tenant<T>(
    organizationId: OrganizationId,
    work: (tx: TenantTx) => Promise<T>,
    options?: TransactionOptions,
  ): Promise<T> {
    // The id stands in the text of the first statement, so that it costs no round trip of its own.
    if (!organizationIdShape.test(organizationId)) throw new TypeError("not an organization id");
    const setting = `select set_config('clodei.organization_id', '${organizationId}', true);`;
    return this.#transact(this.#app, setting, options, (tx) => work({ ...tx, organizationId }));
  }

  /** Runs work as clodei_system, in one transaction. It may run again after a conflict. */
  system<T>(work: (tx: SystemTx) => Promise<T>, options?: TransactionOptions): Promise<T> {
    return this.#transact(this.#system, "", options, (tx) => work({ ...tx, system: true }));
  }

  /**
   * Asks as clodei_system, each statement a transaction of its own, which takes one round trip instead of three: for what
   * every second is asked and mostly answered by nothing. Statements may go out together, on as many connections. What
   * must be true while something is done about an answer is asked again in the transaction that does it.
   */
  look<T>(work: (tx: SystemTx) => Promise<T>): Promise<T> {
    return work({ ...createTx(this.#system, "at once"), system: true });
  }

  /**
   * Runs work as clodei_app without an organization: tables show no rows, and only definer functions answer. Each
   * statement is a transaction of its own, because every call that anyone makes begins with one: who is it?
   */
  anonymous<T>(work: (tx: Tx) => Promise<T>): Promise<T> {
    return work(createTx(this.#app, "at once"));
  }

  /** Whether both logins get an answer within the time given. */
  async isHealthy(timeoutMs = healthTimeoutMs): Promise<boolean> {
    const ask = async (pool: pg.Pool): Promise<boolean> => {
      const result = await pool.query("select 1");
      return result.rowCount === 1;
    };
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), timeoutMs);
    });
    try {
      const answers = Promise.all(this.#probes.map(ask)).then(
        () => true,
        () => false,
      );
      return await Promise.race([answers, late]);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Waits for running transactions and closes all connections. */
  close(): Promise<void> {
    this.#closing ??= Promise.all([this.#app, this.#system, ...this.#probes].map((pool) => pool.end())).then(
      () => undefined,
    );
    return this.#closing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #createPool(connection: pg.ClientConfig, max: number, answerTimeoutMs: number): pg.Pool {
    const pool = new pg.Pool({
      ...connection,
      max,
      types: typeParsers,
      connectionTimeoutMillis: connectTimeoutMs,
      query_timeout: answerTimeoutMs,
      idleTimeoutMillis: idleConnectionMs,
      keepAlive: true,
    });
    // Without a listener, a connection that the server ends would end the process: an idle one has the pool's, one in use
    // has ours, and between the two, where the end comes together with the answer to the login, there would be none.
    pool.on("connect", (client) => client.on("error", () => undefined));
    pool.on("error", (error) => {
      if (this.#closing === undefined) this.#log.warn({ err: error }, "an idle database connection ended");
    });
    return pool;
  }

  async #transact<T>(
    pool: pg.Pool,
    setting: string,
    options: TransactionOptions | undefined,
    work: (tx: Tx) => Promise<T>,
  ): Promise<T> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await this.#transactOnce(pool, setting, options, work);
      } catch (error) {
        if (attempt >= maxAttempts || !isRetryable(error)) throw error;
        // Two transactions that met once meet again unless they part: wait a random while.
        await new Promise((resolve) => setTimeout(resolve, Math.random() * retryDelayMs * 2 ** attempt));
      }
    }
  }

  async #transactOnce<T>(
    pool: pg.Pool,
    setting: string,
    options: TransactionOptions | undefined,
    work: (tx: Tx) => Promise<T>,
  ): Promise<T> {
    const effects: (() => void)[] = [];
    const client = await pool.connect().catch(rethrow);
    let broken: Error | undefined;
    const onError = (error: Error): void => {
      broken = error;
    };
    client.on("error", onError);
    let result: T;
    try {
      await client
        .query(
          `begin isolation level ${options?.isolation ?? "read committed"};
          set local statement_timeout = ${statementTimeoutMs};
          set local idle_in_transaction_session_timeout = ${idleInTransactionTimeoutMs};
          ${setting}`,
        )
        .catch(rethrow);
      result = await work(createTx(client, effects));
      const committed = await client.query("commit").catch(rethrow);
      // A transaction that failed within answers "commit" with ROLLBACK; its error must have been swallowed.
      if (committed.command !== "COMMIT") throw new Error("the transaction was rolled back by a swallowed error");
    } catch (error) {
      if (isReadTimeout(error)) broken = error;
      if (broken === undefined) {
        await client.query("rollback").catch((reason: unknown) => {
          broken = reason instanceof Error ? reason : new Error(String(reason));
        });
      }
      throw error;
    } finally {
      client.off("error", onError);
      client.release(broken);
    }
    for (const effect of effects) effect();
    return result;
  }
}

/**
 * Ids as a parameter of the type text[] or int8[], of which the caller says in the statement which. The driver quotes and
 * escapes each element, which costs a microsecond; ids need none of that. They are looked at all at once: one by one,
 * thousands each second would cost nearly as much again.
 *
 * @throws TypeError where something is no id: nothing but letters, digits, "_" and "-".
 */
export function idArray(ids: readonly (string | bigint)[]): string {
  const list = ids.join(",");
  // Without the commas between them, so that none of an id's own passes. What reads "null" is null without quotes.
  const areIds = /^[\w-]*$/.test(ids.join("")) && !ids.includes("") && !/(?:^|,)null(?:,|$)/i.test(list);
  if (!areIds) throw new TypeError("not ids");
  return `{${list}}`;
}

/** @param effects Where effects wait for the commit; "at once" where each statement commits by itself. */
function createTx(client: pg.PoolClient | pg.Pool, effects: (() => void)[] | "at once"): Tx {
  return {
    async query<Row extends object>(text: string, values: readonly unknown[] = []): Promise<Row[]> {
      const result = await client.query<Row & pg.QueryResultRow>(text, [...values]).catch(rethrow);
      return result.rows;
    },
    async execute(text: string, values: readonly unknown[] = []): Promise<number> {
      const result = await client.query(text, [...values]).catch(rethrow);
      return result.rowCount ?? 0;
    },
    afterCommit(effect: () => void): void {
      if (effects === "at once") effect();
      else effects.push(effect);
    },
  };
}

/** PostgreSQL's code of an error ("23505"), or undefined. Not by its looks: EPIPE has the shape of one. */
export function sqlStateOf(error: unknown): string | undefined {
  return error instanceof pg.DatabaseError ? error.code : undefined;
}

/** The name of the constraint that an error says was violated, or undefined. */
export function constraintOf(error: unknown): string | undefined {
  if (!(error instanceof Error) || !("constraint" in error)) return undefined;
  return typeof error.constraint === "string" ? error.constraint : undefined;
}

/** The driver gave up on an answer. What is asked next on the connection would wait behind it. */
function isReadTimeout(error: unknown): error is DatabaseAwayError {
  return error instanceof DatabaseAwayError && error.cause instanceof Error && error.cause.message === readTimeout;
}

/** Of the driver. */
const readTimeout = "Query read timeout";

function rethrow(error: unknown): never {
  throw isLoss(error) ? new DatabaseAwayError(error) : error;
}

/** Of the socket, and of the name's resolution: a database that fails over is away in each of these ways. */
const lostConnectionCodes: ReadonlySet<unknown> = new Set([
  "EAI_AGAIN",
  "ECONNREFUSED",
  "ECONNRESET",
  "EHOSTUNREACH",
  "ENETUNREACH",
  "ENOENT",
  "ENOTFOUND",
  "EPIPE",
  "ERR_STREAM_DESTROYED",
  "ERR_STREAM_WRITE_AFTER_END",
  "ETIMEDOUT",
]);

const lostConnectionMessages: RegExp = new RegExp(
  `^(Connection terminated|timeout exceeded when trying to connect|${readTimeout}|Client has encountered a connection error)`,
);

/** The connection failed, or the server ends it: SQLSTATE classes 08 and 57P, and errors of the socket and pool. */
function isLoss(error: unknown): boolean {
  if (!(error instanceof Error)) return false;
  const state = sqlStateOf(error);
  if (state !== undefined) return state.startsWith("08") || state.startsWith("57P") || state === "53300";
  return lostConnectionCodes.has(Reflect.get(error, "code")) || lostConnectionMessages.test(error.message);
}

function isRetryable(error: unknown): boolean {
  const code = sqlStateOf(error);
  return code !== undefined && retryableCodes.has(code);
}
