/** An instance, and what can be done with it. */
import type { Client } from "@connectrpc/connect";
import { type Instance, type InstanceEvent, InstanceReason, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import type { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { answered } from "./answers.ts";
import { callNames, callOptions, type CallOptions, mutationNames, type MutationOptions } from "./calls.ts";
import { nameOf } from "./enum-names.ts";
import { canceledError, ClodeiError, InstanceEndedError } from "./errors.ts";
import { InstanceLogs, type LogOptions } from "./logs.ts";
import { listNames, type ListOptions, Paginated } from "./pagination.ts";
import { checkOptions } from "./request-check.ts";
import type { ResumePolicy } from "./resume.ts";
import { watch } from "./watch.ts";

/** Options of a wait. */
export type WaitOptions = CallOptions;

/** What the calls of a handle need. */
export type InstanceCalls = {
  readonly client: Client<typeof InstanceService>;
  readonly resume: ResumePolicy;
};

/** Waiting for a container may include a wait for capacity and a pull of tens of gigabytes. */
const waitUntilRunningMs = 30 * 60 * 1000;
/** A stop takes its grace (at most 2 minutes), longer only while the node is away. */
const waitUntilDeletedMs = 30 * 60 * 1000;

/**
 * An instance. Holds what is known of it (`instance`), which every method brings up to date.
 *
 * @example
 * const instance = await client.instances.run({ image: "busybox", args: ["echo", "hello"] });
 * await instance.waitUntilRunning();
 * console.log(await instance.logs().text());
 * await instance.delete();
 */
export class InstanceHandle {
  readonly #calls: InstanceCalls;
  #instance: Instance;

  constructor(calls: InstanceCalls, instance: Instance) {
    this.#calls = calls;
    this.#instance = instance;
  }

  /** Its id, "ins_…". */
  get id(): string {
    return this.#instance.id;
  }

  /** All that was last known of it: location, GPUs, times, the specification with its defaults. */
  get instance(): Instance {
    return this.#instance;
  }

  /** The last known state: "PENDING", "RUNNING", … */
  get state(): keyof typeof InstanceState {
    return nameOf(InstanceState, this.#instance.state);
  }

  /** Why it is in this state: "WAITING_FOR_CAPACITY", "EXITED_NONZERO", …; "UNSPECIFIED" where the state says it all. */
  get reason(): keyof typeof InstanceReason {
    return nameOf(InstanceReason, this.#instance.reason);
  }

  /**
   * Waits until the container runs, which means: it started, and its isolation was read back. Returns at once
   * when it runs already. A job that was so short that it has completed counts as having run.
   *
   * @param options timeoutMs is 30 minutes where absent, 0 for none.
   * @throws InstanceEndedError when the instance failed, was stopped or was deleted before it ran.
   * @example await instance.waitUntilRunning({ timeoutMs: 60_000 });
   */
  async waitUntilRunning(options: WaitOptions = {}): Promise<Instance> {
    return await this.#waitUntil("RUNNING", hasRun, { ...options, timeoutMs: options.timeoutMs ?? waitUntilRunningMs });
  }

  /**
   * Waits until the instance no longer runs: STOPPED, FAILED or DELETED. Does not throw for a failure: look at
   * the state, the reason and the exit code of the result. An instance that a restart policy starts again goes
   * on.
   *
   * @param options There is no deadline where timeoutMs is absent: jobs may run for days.
   * @example
   * const ended = await instance.waitUntilStopped();
   * if (ended.exitCode !== 0) console.error(ended.message);
   */
  async waitUntilStopped(options: WaitOptions = {}): Promise<Instance> {
    return await this.#waitUntil("STOPPED", hasEnded, options);
  }

  /**
   * Waits until the instance is deleted: no container, no workspace, no logs. Call `delete()` before.
   *
   * @param options timeoutMs is 30 minutes where absent, 0 for none.
   * @example
   * await instance.delete();
   * await instance.waitUntilDeleted();
   */
  async waitUntilDeleted(options: WaitOptions = {}): Promise<Instance> {
    const isDeleted = (instance: Instance) => instance.state === InstanceState.DELETED;
    return await this.#waitUntil("DELETED", isDeleted, {
      ...options,
      timeoutMs: options.timeoutMs ?? waitUntilDeletedMs,
    });
  }

  /**
   * The output of an attempt, live until it ends, and also after its container is gone. Each byte comes once,
   * also when the connection was cut meanwhile.
   *
   * @example
   * for await (const chunk of instance.logs({ tailLines: 10 })) process.stdout.write(chunk.data);
   */
  logs(options: LogOptions = {}): InstanceLogs {
    const { client, resume } = this.#calls;
    return new InstanceLogs((request, signal) => client.streamLogs(request, { signal }), resume, this.id, options);
  }

  /**
   * What happened to the instance, the oldest first.
   *
   * @example for await (const event of instance.events()) console.log(event.sequence, event.message);
   */
  events(options: ListOptions = {}): Paginated<InstanceEvent> {
    const { client } = this.#calls;
    return new Paginated(async (pageToken) => {
      const request = { instanceId: this.id, pageSize: options.pageSize ?? 0, pageToken };
      const { events, nextPageToken } = await client.listInstanceEvents(request, callOptions(options, listNames));
      return { items: events, nextPageToken };
    }, options.pageToken);
  }

  /**
   * Asks for what is known now.
   *
   * @example if ((await instance.refresh()).state === InstanceState.RUNNING) console.log("runs");
   */
  async refresh(options: CallOptions = {}): Promise<Instance> {
    const response = await this.#calls.client.getInstance({ instanceId: this.id }, callOptions(options));
    return this.#learn(answered(response.instance, "instance"));
  }

  /**
   * Stops it: SIGTERM, and SIGKILL after its grace. Releases the GPUs and keeps the workspace. Returns when the
   * stop is decided; `waitUntilStopped` waits for it. Does nothing to one that is stopped.
   *
   * @example
   * await instance.stop();
   * await instance.waitUntilStopped();
   */
  async stop(options: MutationOptions = {}): Promise<Instance> {
    const response = await this.#calls.client.stopInstance(
      this.#mutation(options),
      callOptions(options, mutationNames),
    );
    return this.#learn(answered(response.instance, "instance"));
  }

  /**
   * Starts it again after it was stopped or failed: a new attempt with the same workspace, through PENDING.
   *
   * @example
   * await instance.start();
   * await instance.waitUntilRunning();
   */
  async start(options: MutationOptions = {}): Promise<Instance> {
    const response = await this.#calls.client.startInstance(
      this.#mutation(options),
      callOptions(options, mutationNames),
    );
    return this.#learn(answered(response.instance, "instance"));
  }

  /**
   * Stops it and starts it again, on the same node where it can be.
   *
   * @example
   * await instance.restart();
   * await instance.waitUntilRunning();
   */
  async restart(options: MutationOptions = {}): Promise<Instance> {
    const response = await this.#calls.client.restartInstance(
      this.#mutation(options),
      callOptions(options, mutationNames),
    );
    return this.#learn(answered(response.instance, "instance"));
  }

  /**
   * Stops it and removes its container, workspace and logs. Returns when that is decided; `waitUntilDeleted`
   * waits for it. Does nothing to one that is deleted.
   *
   * @example await instance.delete();
   */
  async delete(options: MutationOptions = {}): Promise<Instance> {
    const response = await this.#calls.client.deleteInstance(
      this.#mutation(options),
      callOptions(options, mutationNames),
    );
    return this.#learn(answered(response.instance, "instance"));
  }

  #mutation(options: MutationOptions): { instanceId: string; idempotencyKey: string } {
    return { instanceId: this.id, idempotencyKey: options.idempotencyKey ?? "" };
  }

  /** Keeps the newer of what is known and what was told. */
  #learn(instance: Instance): Instance {
    if (instance.version >= this.#instance.version) this.#instance = instance;
    return this.#instance;
  }

  /**
   * Watches until `isMet`. A watch sees every state in order, and sooner than any poll; its snapshot is younger
   * than every answer that this handle got, so that what was asked for before (a restart) is in it.
   */
  async #waitUntil(awaited: string, isMet: (instance: Instance) => boolean, options: WaitOptions): Promise<Instance> {
    checkOptions(options, callNames);
    const { timeoutMs = 0, signal } = options;
    const deadline = timeoutMs > 0 ? AbortSignal.timeout(timeoutMs) : undefined;
    const signals = [signal, deadline].filter((candidate) => candidate !== undefined);
    try {
      for await (const instance of this.#states(AbortSignal.any(signals))) {
        if (isMet(instance)) return instance;
        if (hasEnded(instance) && awaited === "RUNNING") throw new InstanceEndedError(instance, awaited);
        if (instance.state === InstanceState.DELETED) throw new InstanceEndedError(instance, awaited);
      }
    } catch (error) {
      if (signal?.aborted === true) throw canceledError(signal);
      if (deadline?.aborted !== true) throw error;
      const message = `${this.id} is ${this.state} (${this.reason}) and not ${awaited} after ${timeoutMs} ms`;
      throw new ClodeiError("deadline_exceeded", "DEADLINE_EXCEEDED", message, { cause: error });
    }
    throw new ClodeiError("internal", "INTERNAL", `the watch of ${this.id} ended`);
  }

  async *#states(signal: AbortSignal): AsyncGenerator<Instance, void, undefined> {
    const { client, resume } = this.#calls;
    const open = (cursor: string, stop: AbortSignal) =>
      client.watchInstances({ instanceId: this.id, cursor }, { signal: stop });
    let seen = false;
    for await (const event of watch<Instance>(open, resume, { signal })) {
      if (event.type === "snapshot" || event.type === "change") {
        seen = true;
        yield this.#learn(event.value);
      } else if (event.type === "bookmark" && !seen) {
        // A snapshot does not hold what is deleted, and Get does.
        seen = true;
        yield await this.refresh({ signal });
      }
    }
  }
}

function hasRun(instance: Instance): boolean {
  if (instance.state === InstanceState.RUNNING) return true;
  const ran: InstanceReason[] = [InstanceReason.COMPLETED, InstanceReason.MAX_RUN_TIME_REACHED];
  return instance.state === InstanceState.STOPPED && ran.includes(instance.reason);
}

function hasEnded(instance: Instance): boolean {
  const ended: InstanceState[] = [InstanceState.STOPPED, InstanceState.FAILED, InstanceState.DELETED];
  return ended.includes(instance.state);
}
