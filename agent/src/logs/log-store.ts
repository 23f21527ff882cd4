// The output of the node's containers, kept until their instance is deleted.
import { type FSWatcher, watch } from "node:fs";
import { access, mkdir, readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { type InstanceId, parseId } from "@clodei/proto/ids";
import { maxLogBytesPerAttempt } from "@clodei/proto/node-link";
import type { AttemptKey } from "../containers/container-body.ts";
import type { ContainerEngine } from "../containers/engine.ts";
import { EngineError } from "../containers/engine-error.ts";
import { EngineOutput } from "./engine-output.ts";
import { Spool } from "./spool.ts";
import { type LogEvent, type LogRequest, readSpool } from "./spool-reader.ts";

/** So many attempts of an instance are kept, the newest: an instance that restarts for ever must not fill the disk. */
export const maxAttemptsPerInstance = 8;
/** What comes within this time is written as one block: blocks have a header each. Readers see output so much later. */
const gatherMs = 20;
/** Files are looked at so often where the kernel tells nothing about them: before the container's start. */
const unwatchedPollMs = 50;
/** The same where it does, against a message that was lost. */
const watchedPollMs = 1000;
/** The engine is asked again so long after it was away. */
const engineRetryMs = 500;

export interface LogStoreOptions {
  /** Holds a folder for each instance, and in it one for each attempt. */
  readonly folder: string;
  readonly engine: Pick<ContainerEngine, "logSource" | "waitEnd">;
  /** What is kept of an attempt; the oldest is dropped first. */
  readonly maxBytesPerAttempt?: number;
}

/** The node keeps no logs of that attempt. */
export class LogsNotFoundError extends Error {
  override readonly name = "LogsNotFoundError";
}

/** The logs of a node. One for each folder. */
export class LogStore {
  readonly #folder: string;
  readonly #engine: Pick<ContainerEngine, "logSource" | "waitEnd">;
  readonly #maxBytes: number;
  /** The spools in use, each with the number of its users. */
  readonly #open = new Map<string, { readonly spool: Promise<Spool>; users: number }>();

  constructor(options: LogStoreOptions) {
    this.#folder = options.folder;
    this.#engine = options.engine;
    this.#maxBytes = options.maxBytesPerAttempt ?? maxLogBytesPerAttempt;
  }

  /** Says that an attempt will have output, so that readers wait for it rather than being told that there is none. */
  async expect(key: AttemptKey): Promise<void> {
    await this.#use(key, async () => {});
  }

  /** Says that an attempt has ended whose container never came to be. Readers are told the end. */
  async finish(key: AttemptKey): Promise<void> {
    await this.#use(key, (spool) => spool.end());
  }

  /**
   * Copies a container's output until it ends, from where the last copy stopped, be that in another process. Returns
   * when everything is copied or the signal is aborted. One at a time for each attempt.
   */
  async collect(key: AttemptKey, signal: AbortSignal): Promise<void> {
    await this.#use(key, async (spool) => {
      if (spool.ended || signal.aborted) return;
      const source = await this.#engine.logSource(key, signal);
      if (source === undefined) return spool.end();
      const stop = new AbortController();
      const either = AbortSignal.any([signal, stop.signal]);
      const wake = new Wake();
      const ended = this.#ended(key, wake, either);
      try {
        await using output = new EngineOutput(source.folder, spool.position);
        await copyOutput(output, spool, source.folder, { wake, hasEnded: () => ended.value, signal: either });
      } finally {
        stop.abort();
        await ended.done;
      }
    });
  }

  /**
   * Gives an attempt's output, also after its container is gone. Throws LogsNotFoundError where there is none.
   * Backpressure is the caller's pace: nothing is read ahead.
   */
  async *read(key: AttemptKey, request: LogRequest, signal: AbortSignal): AsyncGenerator<LogEvent> {
    const path = this.#path(key);
    const known = this.#open.has(path) || (await exists(path));
    if (!known) throw new LogsNotFoundError(`the node keeps no logs of attempt ${key.attempt}`);
    const spool = await this.#acquire(key);
    try {
      yield* readSpool(spool, key.attempt, request, signal);
    } finally {
      await this.#release(key);
    }
  }

  /** Removes an instance's logs. Its collectors must have ended; its readers are let go. */
  async remove(instanceId: InstanceId): Promise<void> {
    const folder = join(this.#folder, instanceId);
    for (const [path, { spool }] of this.#open) {
      if (path.startsWith(`${folder}/`)) await (await spool).remove();
    }
    await rm(folder, { recursive: true, force: true, maxRetries: 3 });
  }

  /** Instances of which logs are kept. */
  async instances(): Promise<InstanceId[]> {
    const names = await readdir(this.#folder).catch((): string[] => []);
    return names.map((name) => parseId("ins", name)).filter((id) => id !== undefined);
  }

  /** Notes the container's end, and goes on asking while the engine is away. */
  #ended(key: AttemptKey, wake: Wake, signal: AbortSignal): { readonly value: boolean; readonly done: Promise<void> } {
    const state = { value: false, done: Promise.resolve() };
    const wait = async (): Promise<void> => {
      while (!signal.aborted) {
        try {
          await this.#engine.waitEnd(key, signal);
          state.value = true;
          wake.now();
          return;
        } catch (error) {
          if (signal.aborted) return;
          if (!(error instanceof EngineError)) throw error;
          await new Wake().wait(engineRetryMs, signal);
        }
      }
    };
    state.done = wait();
    return state;
  }

  #path(key: AttemptKey): string {
    return join(this.#folder, key.instanceId, String(key.attempt));
  }

  async #use(key: AttemptKey, work: (spool: Spool) => Promise<void>): Promise<void> {
    const spool = await this.#acquire(key);
    try {
      await work(spool);
    } finally {
      await this.#release(key);
    }
  }

  async #acquire(key: AttemptKey): Promise<Spool> {
    const path = this.#path(key);
    let entry = this.#open.get(path);
    if (entry === undefined) {
      entry = { spool: this.#openSpool(key), users: 0 };
      this.#open.set(path, entry);
    }
    entry.users += 1;
    try {
      return await entry.spool;
    } catch (error) {
      this.#open.delete(path);
      throw error;
    }
  }

  async #openSpool(key: AttemptKey): Promise<Spool> {
    await mkdir(this.#folder, { recursive: true, mode: 0o700 });
    const spool = await Spool.open(this.#path(key), this.#maxBytes);
    await this.#dropOldAttempts(key);
    return spool;
  }

  /** Removes the instance's oldest attempts, but not the one that is being opened. Their readers are let go. */
  async #dropOldAttempts({ instanceId, attempt }: AttemptKey): Promise<void> {
    const names = await readdir(join(this.#folder, instanceId));
    const attempts = names.map(Number).filter((name) => Number.isSafeInteger(name));
    const old = attempts.toSorted((left, right) => right - left).slice(maxAttemptsPerInstance);
    for (const other of old) {
      if (other === attempt) continue;
      const path = this.#path({ instanceId, attempt: other });
      const spool = await this.#open.get(path)?.spool;
      if (spool === undefined) await rm(path, { recursive: true, force: true, maxRetries: 3 });
      else await spool.remove();
    }
  }

  async #release(key: AttemptKey): Promise<void> {
    const path = this.#path(key);
    const entry = this.#open.get(path);
    if (entry === undefined) return;
    entry.users -= 1;
    if (entry.users > 0) return;
    this.#open.delete(path);
    await (await entry.spool).close();
  }
}

async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

/** A wait that others can end. */
class Wake {
  #waiting = Promise.withResolvers<void>();

  now(): void {
    this.#waiting.resolve();
  }

  /** Waits for `now`, which may have come before, for the time, or for the signal. */
  async wait(ms: number, signal: AbortSignal): Promise<void> {
    const onAbort = (): void => this.now();
    const timer = setTimeout(onAbort, ms);
    signal.addEventListener("abort", onAbort, { once: true });
    if (signal.aborted) onAbort();
    await this.#waiting.promise;
    this.#waiting = Promise.withResolvers<void>();
    clearTimeout(timer);
    signal.removeEventListener("abort", onAbort);
  }
}

interface Copying {
  readonly wake: Wake;
  readonly hasEnded: () => boolean;
  readonly signal: AbortSignal;
}

async function copyOutput(output: EngineOutput, spool: Spool, folder: string, copying: Copying): Promise<void> {
  let watcher: FSWatcher | undefined;
  try {
    while (!copying.signal.aborted) {
      watcher ??= watchFolder(folder, copying.wake);
      // Asked before the read: what the container wrote before its end is read after it.
      const final = copying.hasEnded();
      const batch = await output.read(final);
      if (batch !== undefined) {
        await spool.append(batch.entries, batch.position, batch.lostBefore);
        if (!final && !batch.full) await new Wake().wait(gatherMs, copying.signal);
      } else if (final) {
        await spool.end();
        return;
      } else {
        await copying.wake.wait(watcher === undefined ? unwatchedPollMs : watchedPollMs, copying.signal);
      }
    }
  } finally {
    watcher?.close();
  }
}

/** Undefined as long as the folder is not there. */
function watchFolder(folder: string, wake: Wake): FSWatcher | undefined {
  try {
    const watcher = watch(folder, { persistent: false }, () => wake.now());
    // The folder goes with its container.
    watcher.on("error", () => watcher.close());
    return watcher;
  } catch {
    return undefined;
  }
}
