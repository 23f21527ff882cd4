// Hints between the parts of one process and between replicas: "look again at this". They are sent after commit,
// coalesced, on a connection of their own, because NOTIFY inside a transaction takes one lock for the whole
// cluster at commit. They carry names only. Every receiver polls as well, so that a lost hint costs time alone. Behind a
// pooler there are none between replicas: one in transaction mode would give the connection that listens to others.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import pg from "pg";
import type { Log } from "./log.ts";

/** What a hint can be about. */
export type Topic = "placement" | "nodes" | "instances" | `node:${string}` | `organization:${string}`;

const channel = "clodei_wakeups";
/** PostgreSQL refuses a payload of 8000 bytes; a topic takes about 40. */
const maxTopicsPerMessage = 100;
/** Hints of one moment travel together. */
const coalesceMs = 2;
const firstReconnectMs = 100;
const lastReconnectMs = 5_000;
/** A hint that takes longer is of no use, and must not hold up the next ones or the end of the process. */
const timeoutMs = 5_000;

/** Sends and receives hints. */
export class Wakeups implements AsyncDisposable {
  readonly #instance = randomUUID();
  readonly #listeners = new Map<Topic, Set<() => void>>();
  readonly #pending = new Set<Topic>();
  readonly #connection: pg.ClientConfig | undefined;
  readonly #log: Log;
  readonly #stop = new AbortController();
  #client: pg.Client | undefined;
  #flushTimer: NodeJS.Timeout | undefined;
  #flushing: Promise<void> = Promise.resolve();
  #running: Promise<void> = Promise.resolve();

  /** Without a connection the hints stay inside the process. */
  constructor(options: { readonly connection?: pg.ClientConfig | undefined; readonly log: Log }) {
    this.#connection = options.connection;
    this.#log = options.log;
  }

  /** Connects, and keeps the connection up until disposed of. Resolves after the first attempt, come what may. */
  async start(): Promise<void> {
    if (this.#connection === undefined) return;
    const first = Promise.withResolvers<void>();
    this.#running = this.#keepConnected(this.#connection, first.resolve);
    await first.promise;
  }

  /** Hints at a topic: in this process at once, in the others soon. Call it after the commit. */
  notify(topic: Topic): void {
    this.#deliver(topic);
    if (this.#connection === undefined || this.#stop.signal.aborted) return;
    this.#pending.add(topic);
    this.#flushTimer ??= setTimeout(() => {
      this.#flushTimer = undefined;
      this.#flushing = this.#flushing.then(() => this.#flush());
    }, coalesceMs);
  }

  /** Calls the listener at every hint about one of the topics, and after a reconnect, when hints may be lost. */
  subscribe(topics: readonly Topic[], listener: () => void): Disposable {
    for (const topic of topics) {
      const listeners = this.#listeners.get(topic);
      if (listeners === undefined) this.#listeners.set(topic, new Set([listener]));
      else listeners.add(listener);
    }
    return {
      [Symbol.dispose]: (): void => {
        for (const topic of topics) {
          const listeners = this.#listeners.get(topic);
          listeners?.delete(listener);
          if (listeners?.size === 0) this.#listeners.delete(topic);
        }
      },
    };
  }

  /** Resolves at the next hint about one of the topics, after the time, or when the signal aborts. Never rejects. */
  wait(topics: readonly Topic[], timeoutMs: number, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted === true) return Promise.resolve();
    return new Promise((resolve) => {
      const done = (): void => {
        subscription[Symbol.dispose]();
        clearTimeout(timer);
        signal?.removeEventListener("abort", done);
        resolve();
      };
      const subscription = this.subscribe(topics, done);
      const timer = setTimeout(done, timeoutMs);
      signal?.addEventListener("abort", done, { once: true });
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#flushTimer !== undefined) {
      clearTimeout(this.#flushTimer);
      this.#flushing = this.#flushing.then(() => this.#flush());
    }
    await this.#flushing;
    this.#stop.abort();
    await this.#client?.end().catch(() => undefined);
    await this.#running;
  }

  #deliver(topic: Topic): void {
    for (const listener of this.#listeners.get(topic) ?? []) listener();
  }

  async #flush(): Promise<void> {
    const topics = [...this.#pending];
    this.#pending.clear();
    const client = this.#client;
    // No connection now: the pollers behind the hints find what is new.
    if (client === undefined) return;
    for (let start = 0; start < topics.length; start += maxTopicsPerMessage) {
      const payload = JSON.stringify([this.#instance, ...topics.slice(start, start + maxTopicsPerMessage)]);
      try {
        await client.query("select pg_notify($1, $2)", [channel, payload]);
      } catch (error) {
        this.#log.debug({ err: error }, "a hint was lost");
        // A connection that does not answer hears nothing either: the next one does.
        await client.end().catch(() => undefined);
        return;
      }
    }
  }

  #receive(payload: string | undefined): void {
    const [sender, ...topics] = parsePayload(payload);
    if (sender === this.#instance) return;
    for (const topic of topics) if (isTopic(topic)) this.#deliver(topic);
  }

  async #keepConnected(connection: pg.ClientConfig, attempted: () => void): Promise<void> {
    const { signal } = this.#stop;
    let delayMs = firstReconnectMs;
    let connectedBefore = false;
    while (!signal.aborted) {
      const client = new pg.Client({
        ...connection,
        application_name: "clodei-wakeups",
        keepAlive: true,
        connectionTimeoutMillis: timeoutMs,
        query_timeout: timeoutMs,
      });
      const ended = new Promise<void>((resolve) => client.once("end", () => resolve()));
      client.on("error", (error) => this.#log.debug({ err: error }, "the connection for hints failed"));
      client.on("notification", (message) => this.#receive(message.payload));
      try {
        await client.connect();
        if (await isPooled(client)) {
          this.#log.warn(pooledMessage);
          await client.end();
          attempted();
          return;
        }
        await client.query(`listen ${channel}`);
        this.#client = client;
        delayMs = firstReconnectMs;
        if (connectedBefore) for (const topic of [...this.#listeners.keys()]) this.#deliver(topic);
        connectedBefore = true;
        attempted();
        if (signal.aborted) await client.end();
        await ended;
      } catch (error) {
        if (!signal.aborted) this.#log.warn({ err: error }, "no connection for hints: polling alone");
        await client.end().catch(() => undefined);
      }
      this.#client = undefined;
      attempted();
      await sleep(delayMs * (0.5 + Math.random()), undefined, { signal }).catch(() => undefined);
      delayMs = Math.min(delayMs * 2, lastReconnectMs);
    }
  }
}

const pooledMessage =
  "a pooler stands between this process and the database: replicas send each other no hints, and find each other's " +
  "changes by polling; for hints, let DATABASE_SYSTEM_URL lead past it";

/** Whether the session that answers is another than the one that was opened: a pooler has sessions of its own. */
async function isPooled(client: pg.Client): Promise<boolean> {
  const result = await client.query<{ pid: number }>("select pg_backend_pid() as pid");
  return result.rows[0]?.pid !== Reflect.get(client, "processID");
}

function parsePayload(payload: string | undefined): string[] {
  try {
    const parsed: unknown = JSON.parse(payload ?? "[]");
    return Array.isArray(parsed) ? parsed.filter((item) => typeof item === "string") : [];
  } catch {
    return [];
  }
}

function isTopic(text: string): text is Topic {
  return (
    text === "placement" ||
    text === "nodes" ||
    text === "instances" ||
    text.startsWith("node:") ||
    text.startsWith("organization:")
  );
}
