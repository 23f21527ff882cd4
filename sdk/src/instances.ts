/** `client.instances`. */
import type { Client } from "@connectrpc/connect";
import { type Instance, InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import { type InstanceFilterSchema, type InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { answered } from "./answers.ts";
import { callOptions, type CallOptions, mutationNames, type MutationOptions } from "./calls.ts";
import { type InstanceCalls, InstanceHandle } from "./instance-handle.ts";
import { listNames, type ListOptions, Paginated } from "./pagination.ts";
import { optionNames } from "./request-check.ts";
import { type InstanceStateName, type LocationConstraint, type RunSpec, toInstanceSpec, valuesOf } from "./spec.ts";
import { watch, type WatchEvent, watchNames, type WatchOptions } from "./watch.ts";

/** Which instances are meant. Every field given must hold. */
export type InstanceFilter = {
  /** In one of these states. In a watch, the snapshot alone obeys it. */
  readonly states?: readonly InstanceStateName[] | undefined;
  /** With each of these labels. */
  readonly labels?: Readonly<Record<string, string>> | undefined;
  /** With GPUs requested of this model. */
  readonly gpuModel?: string | undefined;
  /** Placed in this location. */
  readonly location?: LocationConstraint | undefined;
};

/** Options of a list of instances. */
export type ListInstancesOptions = ListOptions &
  InstanceFilter & {
    /** Deleted ones too. */
    readonly showDeleted?: boolean | undefined;
  };

/** Options of a watch of instances. */
export type WatchInstancesOptions = WatchOptions & InstanceFilter;

const filterNames = optionNames<InstanceFilter>({ states: true, labels: true, gpuModel: true, location: true });
const listInstancesNames = [...listNames, ...filterNames, "showDeleted"];
const watchInstancesNames = [...watchNames, ...filterNames];

/** Runs containers of the caller's organization. */
export class Instances {
  readonly #calls: InstanceCalls;

  constructor(calls: InstanceCalls) {
    this.#calls = calls;
  }

  /**
   * Runs a container. Returns as soon as the instance exists, in PENDING; `waitUntilRunning` waits for it. Sent
   * again after a lost answer, it does not create a second instance.
   *
   * @throws ClodeiError with INVALID_ARGUMENT and the fields, IMAGE_NOT_ALLOWED, NOT_SUPPORTED_YET, …
   * @example
   * const instance = await client.instances.run({
   *   image: "pytorch/pytorch",
   *   args: ["nvidia-smi"],
   *   gpu: { model: "H100-SXM", count: 8 },
   *   memoryMib: 65_536,
   *   location: { country: "ES" },
   * });
   */
  async run(spec: RunSpec, options: MutationOptions = {}): Promise<InstanceHandle> {
    const request = { spec: toInstanceSpec(spec), idempotencyKey: options.idempotencyKey ?? "" };
    const response = await this.#client.createInstance(request, callOptions(options, mutationNames));
    return new InstanceHandle(this.#calls, answered(response.instance, "instance"));
  }

  /**
   * One instance. A deleted one is found for 30 days.
   *
   * @throws ClodeiError with NOT_FOUND.
   * @example const instance = await client.instances.get("ins_01h455vb4pex5vsknk084sn02q");
   */
  async get(instanceId: string, options: CallOptions = {}): Promise<InstanceHandle> {
    const response = await this.#client.getInstance({ instanceId }, callOptions(options));
    return new InstanceHandle(this.#calls, answered(response.instance, "instance"));
  }

  /**
   * All instances, the newest first, page by page as the loop goes on.
   *
   * @example
   * for await (const instance of client.instances.list({ states: ["RUNNING"], labels: { team: "vision" } })) {
   *   await instance.stop();
   * }
   */
  list(options: ListInstancesOptions = {}): Paginated<InstanceHandle> {
    return new Paginated(async (pageToken) => {
      const { pageSize = 0, showDeleted = false } = options;
      const request = { pageSize, pageToken, showDeleted, filter: toFilter(options) };
      const { instances, nextPageToken } = await this.#client.listInstances(
        request,
        callOptions(options, listInstancesNames),
      );
      return { items: instances.map((instance) => new InstanceHandle(this.#calls, instance)), nextPageToken };
    }, options.pageToken);
  }

  /**
   * The instances as they are, and then every change, in order for each instance, until the loop is left or the
   * signal is aborted. Goes on after breaks of the connection; when it was away for too long it says "reset"
   * and begins with a new snapshot.
   *
   * @example
   * for await (const event of client.instances.watch()) {
   *   if (event.type === "change") console.log(event.value.id, event.value.message);
   * }
   */
  watch(options: WatchInstancesOptions = {}): AsyncGenerator<WatchEvent<Instance>, void, undefined> {
    const filter = toFilter(options);
    const open = (cursor: string, signal: AbortSignal) => this.#client.watchInstances({ cursor, filter }, { signal });
    return watch<Instance>(open, this.#calls.resume, options, watchInstancesNames);
  }

  get #client(): Client<typeof InstanceService> {
    return this.#calls.client;
  }
}

function toFilter(filter: InstanceFilter): MessageInitShape<typeof InstanceFilterSchema> {
  return {
    states: valuesOf(InstanceState, filter.states),
    labels: filter.labels ?? {},
    gpuModel: filter.gpuModel ?? "",
    location: filter.location,
  };
}
