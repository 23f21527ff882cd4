// grpc.health.v1: whether each service serves. All of them flip together, because they share what can fail:
// the database, and the process that drains.
import type { DescService, MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError, type HandlerContext, type ServiceImpl } from "@connectrpc/connect";
import {
  HealthCheckResponse_ServingStatus as ServingStatus,
  type Health,
  type HealthCheckRequest,
  type HealthCheckResponseSchema,
} from "@clodei/proto/gen/grpc/health/v1/health";

/** Why the process does not serve. It serves when there is no reason. */
export type UnhealthyReason = "starting" | "database" | "draining";

/** Whether this process serves, and who wants to know. */
export class HealthState {
  readonly #reasons = new Set<UnhealthyReason>(["starting"]);
  readonly #listeners = new Set<() => void>();

  get isServing(): boolean {
    return this.#reasons.size === 0;
  }

  /** What keeps the process from serving. */
  get reasons(): readonly UnhealthyReason[] {
    return [...this.#reasons];
  }

  /** Notes that a reason holds, or no longer does. */
  set(reason: UnhealthyReason, holds: boolean): void {
    const before = this.isServing;
    if (holds) this.#reasons.add(reason);
    else this.#reasons.delete(reason);
    if (before !== this.isServing) for (const listener of [...this.#listeners]) listener();
  }

  /** Resolves when serving starts or ends, or when the signal aborts. */
  changed(signal: AbortSignal): Promise<void> {
    if (signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const done = (): void => {
        this.#listeners.delete(done);
        signal.removeEventListener("abort", done);
        resolve();
      };
      this.#listeners.add(done);
      signal.addEventListener("abort", done, { once: true });
    });
  }
}

/** The handlers of grpc.health.v1 for the services named, and for "", the server as a whole. */
export function healthHandlers(state: HealthState, services: readonly DescService[]): ServiceImpl<typeof Health> {
  const names = new Set(["", ...services.map(({ typeName }) => typeName)]);
  const statusOf = (service: string): ServingStatus => {
    if (!names.has(service)) return ServingStatus.SERVICE_UNKNOWN;
    return state.isServing ? ServingStatus.SERVING : ServingStatus.NOT_SERVING;
  };
  return {
    check(request) {
      if (!names.has(request.service)) throw new ConnectError("unknown service", Code.NotFound);
      return { status: statusOf(request.service) };
    },
    list() {
      return { statuses: Object.fromEntries([...names].map((name) => [name, { status: statusOf(name) }])) };
    },
    async *watch(request: HealthCheckRequest, context: HandlerContext) {
      let last: ServingStatus | undefined;
      while (true) {
        const changed = state.changed(context.signal);
        const status = statusOf(request.service);
        if (status !== last) yield { status } satisfies MessageInitShape<typeof HealthCheckResponseSchema>;
        last = status;
        // The last word of a drain is sent before the stream ends.
        if (context.signal.aborted) return;
        await changed;
      }
    },
  };
}
