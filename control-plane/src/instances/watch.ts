// A watch: the instances as they are, a bookmark, and every change after it. Its position is the feed's cursor, so a
// break loses nothing. Hints wake it within milliseconds of a commit, and a poll stands behind them.
import { create, fromBinary } from "@bufbuild/protobuf";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { type Instance as InstanceMessage, InstanceSchema } from "@clodei/proto/gen/clodei/v1/instance";
import {
  type WatchInstancesResponse,
  WatchInstancesResponseSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import type { OrganizationId } from "@clodei/proto/ids";
import { isInLocation } from "../placement/service.ts";
import { currentCursor, readChanges } from "../platform/changes.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database, TenantTx } from "../platform/database.ts";
import { DomainError, quotaExceeded } from "../platform/errors.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import { instanceIdOf } from "./rows.ts";
import type { InstancesService } from "./service.ts";
import type { InstanceFilter } from "./store.ts";
import { toInstanceMessage } from "./wire.ts";

/** What watches need. */
export type WatchOptions = {
  readonly database: Database;
  readonly instances: Pick<InstancesService, "get" | "list" | "specs">;
  readonly wakeups: Pick<Wakeups, "subscribe">;
  readonly clock: Clock;
  /** Aborts when the server drains. */
  readonly drain: AbortSignal;
  /** How often to look without a hint. */
  readonly pollIntervalMs: number;
};

/** What a watch is about. */
export type WatchRequest = {
  readonly organizationId: OrganizationId;
  /** Empty: from a snapshot. */
  readonly cursor: string;
  readonly filter: InstanceFilter;
  /** Empty: all. */
  readonly instanceId: string;
};

/** Instances in one message of the database, and changes in one read. */
const batchSize = 500;
/** A cursor that is not moved would be too old one day; an idle client keeps one that is this fresh. */
const bookmarkIntervalMs = 15_000;
/** Each watch holds a stream and asks the database once a second. */
const maxWatchesPerOrganization = 256;
const drainRetryMs = 1_000;

/** The watches of this process. */
export class Watches {
  readonly #options: WatchOptions;
  readonly #open = new Map<OrganizationId, number>();

  constructor(options: WatchOptions) {
    this.#options = options;
  }

  /**
   * Runs one watch until the client leaves.
   *
   * @throws DomainError NOT_FOUND for an instance that the caller has not; CURSOR_INVALID, CURSOR_EXPIRED;
   *   QUOTA_EXCEEDED; UNAVAILABLE when the server drains: resume with the last cursor.
   */
  async *watch(request: WatchRequest, signal: AbortSignal): AsyncGenerator<WatchInstancesResponse, void, undefined> {
    const { organizationId } = request;
    const open = this.#open.get(organizationId) ?? 0;
    if (open >= maxWatchesPerOrganization) {
      const what = "watches of an organization are open at a time";
      throw quotaExceeded(organizationId, "watches", maxWatchesPerOrganization, what);
    }
    this.#open.set(organizationId, open + 1);
    try {
      yield* new Watch(this.#options, request).run(AbortSignal.any([signal, this.#options.drain]));
    } finally {
      const left = (this.#open.get(organizationId) ?? 1) - 1;
      if (left === 0) this.#open.delete(organizationId);
      else this.#open.set(organizationId, left);
    }
    if (this.#options.drain.aborted && !signal.aborted) {
      const message = "the server is restarting: resume with the last cursor";
      throw new DomainError(ErrorReason.UNAVAILABLE, message, { retryAfterMs: drainRetryMs });
    }
  }
}

/** Changes of instances, whole again. */
type InstanceBatch = {
  readonly changes: readonly { readonly instance: InstanceMessage; readonly cursor: string }[];
  readonly cursor: string;
  readonly more: boolean;
};

class Watch {
  readonly #options: WatchOptions;
  readonly #request: WatchRequest;
  #hinted = false;
  #wake: (() => void) | undefined;

  constructor(options: WatchOptions, request: WatchRequest) {
    this.#options = options;
    this.#request = request;
  }

  async *run(signal: AbortSignal): AsyncGenerator<WatchInstancesResponse, void, undefined> {
    const { wakeups, clock } = this.#options;
    const { organizationId } = this.#request;
    // Before the first read, so that no commit falls between a read and the waiting for its hint.
    using _subscription = wakeups.subscribe([`organization:${organizationId}`], () => {
      this.#hinted = true;
      this.#wake?.();
    });
    let cursor = this.#request.cursor;
    let bookmarkTime = 0;
    if (cursor === "") {
      cursor = yield* this.#snapshot();
      yield bookmark(cursor);
      bookmarkTime = clock().getTime();
    } else if (this.#request.instanceId !== "") {
      await this.#tenant((tx) => this.#options.instances.get(tx, this.#request.instanceId));
    }
    while (!signal.aborted) {
      this.#hinted = false;
      const from = cursor;
      const batch = await this.#tenant((tx) => this.#readBatch(tx, from));
      for (const { instance, cursor: after } of batch.changes) {
        if (this.#isMeant(instance)) yield response({ case: "change", value: instance }, after);
        if (signal.aborted) return;
      }
      cursor = batch.cursor;
      if (batch.more) continue;
      if (clock().getTime() - bookmarkTime >= bookmarkIntervalMs) {
        yield bookmark(cursor);
        bookmarkTime = clock().getTime();
      }
      await this.#wait(signal);
    }
  }

  /** Yields the instances as they are; returns the cursor behind them. */
  async *#snapshot(): AsyncGenerator<WatchInstancesResponse, string, undefined> {
    const { instances } = this.#options;
    const { instanceId, filter } = this.#request;
    // One snapshot of the database for the rows and the position.
    const first = await this.#options.database.tenant(
      this.#request.organizationId,
      async (tx) => ({
        cursor: await currentCursor(tx),
        page:
          instanceId === ""
            ? await instances.list(tx, filter, undefined, batchSize)
            : { instances: [await instances.get(tx, instanceId)], more: false },
      }),
      { isolation: "repeatable read" },
    );
    if (!first.page.more) {
      for (const instance of first.page.instances) {
        yield response({ case: "snapshot", value: toInstanceMessage(instance) }, "");
      }
      return first.cursor;
    }
    // Later pages are newer than the position: what happened meanwhile is sent before the bookmark, once.
    const versions = new Map<string, bigint>();
    for (let { page } = first; ;) {
      for (const instance of page.instances) {
        versions.set(instance.id, instance.version);
        yield response({ case: "snapshot", value: toInstanceMessage(instance) }, "");
      }
      if (!page.more) break;
      const last = page.instances.at(-1)?.id;
      page = await this.#tenant((tx) => instances.list(tx, filter, last, batchSize));
    }
    return yield* this.#catchUp(first.cursor, versions);
  }

  async *#catchUp(
    start: string,
    versions: ReadonlyMap<string, bigint>,
  ): AsyncGenerator<WatchInstancesResponse, string, undefined> {
    let cursor = start;
    for (;;) {
      const from = cursor;
      const batch = await this.#tenant((tx) => this.#readBatch(tx, from));
      for (const { instance } of batch.changes) {
        if (!this.#isMeant(instance) || instance.version <= (versions.get(instance.id) ?? 0n)) continue;
        yield response({ case: "change", value: instance }, "");
      }
      cursor = batch.cursor;
      if (!batch.more) return cursor;
    }
  }

  /** Reads changes, and adds the specifications. The batch ends before the first one that is too much for it. */
  async #readBatch(tx: TenantTx, from: string): Promise<InstanceBatch> {
    const { instances } = this.#options;
    const { instanceId } = this.#request;
    const { changes, cursor, more } = await readChanges(tx, "instance", from, batchSize);
    const meant = changes
      .map((change) => ({ instance: fromBinary(InstanceSchema, change.payload), cursor: change.cursor }))
      .filter(({ instance }) => instanceId === "" || instance.id === instanceId);
    if (meant.length === 0) return { changes: [], cursor, more };
    const specs = await instances.specs(tx, [...new Set(meant.map(({ instance }) => instanceIdOf(instance.id)))]);
    const end = meant.findIndex(({ instance }) => !specs.has(instanceIdOf(instance.id)));
    const complete = meant.slice(0, end === -1 ? undefined : end);
    for (const { instance } of complete) instance.spec = specs.get(instanceIdOf(instance.id));
    if (end === -1) return { changes: complete, cursor, more };
    const last = complete.at(-1);
    if (last === undefined) throw new Error("a change of an instance that has no row");
    return { changes: complete, cursor: last.cursor, more: true };
  }

  /** Whether a change is of interest. `states` is not asked: a change out of a state would never be told. */
  #isMeant(instance: InstanceMessage): boolean {
    const { filter } = this.#request;
    const { country, region, datacenter } = filter.location;
    const isAnywhere = country === undefined && region === undefined && datacenter === undefined;
    return (
      (filter.gpuModel === "" || instance.spec?.gpu?.model === filter.gpuModel) &&
      Object.entries(filter.labels).every(([name, value]) => instance.spec?.labels[name] === value) &&
      (isAnywhere || (instance.location !== undefined && isInLocation(filter.location, instance.location)))
    );
  }

  #tenant<T>(work: (tx: TenantTx) => Promise<T>): Promise<T> {
    return this.#options.database.tenant(this.#request.organizationId, work);
  }

  #wait(signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      if (this.#hinted || signal.aborted) {
        resolve();
        return;
      }
      const done = (): void => {
        clearTimeout(timer);
        signal.removeEventListener("abort", done);
        this.#wake = undefined;
        resolve();
      };
      const timer = setTimeout(done, this.#options.pollIntervalMs);
      signal.addEventListener("abort", done, { once: true });
      this.#wake = done;
    });
  }
}

function bookmark(cursor: string): WatchInstancesResponse {
  return create(WatchInstancesResponseSchema, { event: { case: "bookmark", value: {} }, cursor });
}

function response(
  event: { readonly case: "snapshot" | "change"; readonly value: InstanceMessage },
  cursor: string,
): WatchInstancesResponse {
  return create(WatchInstancesResponseSchema, { event, cursor });
}
