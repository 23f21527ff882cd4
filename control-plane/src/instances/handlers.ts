// InstanceService as the contract has it: messages to values of ours and back, one transaction a call, each mutating
// one behind its idempotency key. StreamLogs is the relay's, in dispatch.
import { create, type DescMessage, type DescMethodUnary, isUnknownEnum, type MessageShape } from "@bufbuild/protobuf";
import type { HandlerContext, ServiceImpl } from "@connectrpc/connect";
import {
  type Instance as InstanceMessage,
  InstanceSpecSchema,
  InstanceState,
  InstanceStateSchema,
} from "@clodei/proto/gen/clodei/v1/instance";
import {
  type CreateInstanceResponseSchema,
  type DeleteInstanceResponseSchema,
  GetInstanceResponseSchema,
  type InstanceFilter as InstanceFilterMessage,
  InstanceService,
  ListInstanceEventsResponseSchema,
  ListInstancesResponseSchema,
  type RestartInstanceResponseSchema,
  type StartInstanceResponseSchema,
  type StopInstanceResponseSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import type { Database, TenantTx } from "../platform/database.ts";
import { runIdempotent, type StoredAnswer } from "../platform/idempotency.ts";
import { decodePageToken, encodePageToken, filterHash, pageOf, pageSizeOf } from "../platform/page-token.ts";
import { customerOf } from "../rpc/context.ts";
import type { Instance, State } from "./model.ts";
import type { InstancesService } from "./service.ts";
import type { InstanceFilter } from "./store.ts";
import type { Watches } from "./watch.ts";
import { toEventMessage, toInstanceMessage } from "./wire.ts";

/** What the handlers need. */
export type InstanceHandlersOptions = {
  readonly database: Database;
  readonly instances: InstancesService;
  readonly watches: Watches;
};

/** InstanceService without StreamLogs, which dispatch serves. */
export type InstanceHandlers = Omit<ServiceImpl<typeof InstanceService>, "streamLogs">;

/** The handlers of InstanceService. */
export function instanceHandlers(options: InstanceHandlersOptions): InstanceHandlers {
  return { ...mutatingHandlers(options), ...readingHandlers(options) };
}

/** What a mutating call answers. */
type InstanceResponse =
  | typeof CreateInstanceResponseSchema
  | typeof StopInstanceResponseSchema
  | typeof StartInstanceResponseSchema
  | typeof RestartInstanceResponseSchema
  | typeof DeleteInstanceResponseSchema;

type MutatingMethods = "createInstance" | "stopInstance" | "startInstance" | "restartInstance" | "deleteInstance";

function mutatingHandlers({ database, instances }: InstanceHandlersOptions): Pick<InstanceHandlers, MutatingMethods> {
  /** Runs a mutating call once for its idempotency key, with the record in the transaction of its effect. */
  const mutate = async <Req extends DescMessage>(
    context: HandlerContext,
    method: DescMethodUnary<Req, InstanceResponse>,
    request: MessageShape<Req> & { readonly idempotencyKey: string },
    effect: (tx: TenantTx, callerId: string) => Promise<Instance>,
  ): Promise<{ instance?: InstanceMessage }> => {
    const { organizationId, callerId } = customerOf(context);
    const { response } = await database.tenant(organizationId, (tx) =>
      runIdempotent(
        tx,
        { callerId, method, request },
        async () => ({ instance: toInstanceMessage(await effect(tx, callerId)) }),
        withoutSpec(tx, instances),
      ),
    );
    return response.instance === undefined ? {} : { instance: response.instance };
  };
  const { method } = InstanceService;
  return {
    createInstance: (request, context) =>
      mutate(context, method.createInstance, request, (tx, callerId) =>
        instances.create(tx, request.spec ?? create(InstanceSpecSchema), callerId),
      ),
    stopInstance: (request, context) =>
      mutate(context, method.stopInstance, request, (tx, callerId) =>
        instances.command(tx, "stop", request.instanceId, callerId),
      ),
    startInstance: (request, context) =>
      mutate(context, method.startInstance, request, (tx, callerId) =>
        instances.command(tx, "start", request.instanceId, callerId),
      ),
    restartInstance: (request, context) =>
      mutate(context, method.restartInstance, request, (tx, callerId) =>
        instances.command(tx, "restart", request.instanceId, callerId),
      ),
    deleteInstance: (request, context) =>
      mutate(context, method.deleteInstance, request, (tx, callerId) =>
        instances.command(tx, "delete", request.instanceId, callerId),
      ),
  };
}

function readingHandlers(options: InstanceHandlersOptions): Omit<InstanceHandlers, MutatingMethods> {
  const { database, instances, watches } = options;
  return {
    async getInstance({ instanceId }, context) {
      const { organizationId } = customerOf(context);
      const instance = await database.tenant(organizationId, (tx) => instances.get(tx, instanceId));
      return create(GetInstanceResponseSchema, { instance: toInstanceMessage(instance) });
    },
    async listInstances(request, context) {
      const { organizationId } = customerOf(context);
      const filter = toFilter(request.filter, request.showDeleted);
      const hash = filterHash(["instances", hashable(filter)]);
      const [before] = decodePageToken(request.pageToken, hash) ?? [];
      const size = pageSizeOf(request.pageSize);
      const page = await database.tenant(organizationId, (tx) => instances.list(tx, filter, before, size));
      const last = page.instances.at(-1);
      return create(ListInstancesResponseSchema, {
        instances: page.instances.map(toInstanceMessage),
        nextPageToken: page.more && last !== undefined ? encodePageToken(hash, [last.id]) : "",
      });
    },
    async listInstanceEvents(request, context) {
      const { organizationId } = customerOf(context);
      const { instanceId } = request;
      const hash = filterHash(["events", instanceId]);
      const after = decodePageToken(request.pageToken, hash) ?? ["0"];
      const size = pageSizeOf(request.pageSize);
      const found = await database.tenant(organizationId, (tx) =>
        instances.events(tx, instanceId, sequenceOf(after), size + 1),
      );
      const { page, nextPageToken } = pageOf(found, size, hash, ({ sequence }) => [String(sequence)]);
      return create(ListInstanceEventsResponseSchema, { events: page.map(toEventMessage), nextPageToken });
    },
    watchInstances({ cursor, filter, instanceId }, context) {
      const { organizationId } = customerOf(context);
      const meant = toFilter(filter, false);
      return watches.watch({ organizationId, cursor, filter: meant, instanceId }, context.signal);
    },
  };
}

/** A position that we wrote. Whoever makes up a token gets an empty page, not an error of ours. */
function sequenceOf([text = ""]: readonly string[]): bigint {
  return /^\d{1,18}$/.test(text) ? BigInt(text) : BigInt(Number.MAX_SAFE_INTEGER);
}

/** An answer is stored without its specification, which can have 1 MiB and stands in the instance's row as it was. */
function withoutSpec(tx: TenantTx, instances: InstancesService): StoredAnswer<InstanceResponse> {
  return {
    strip({ instance }) {
      if (instance !== undefined) instance.spec = undefined;
    },
    async restore({ instance }) {
      if (instance !== undefined) instance.spec = (await instances.get(tx, instance.id)).spec;
    },
  };
}

function toFilter(message: InstanceFilterMessage | undefined, showDeleted: boolean): InstanceFilter {
  const { country, region, datacenter } = message?.location ?? {};
  return {
    states: (message?.states ?? []).flatMap((state) => toState(state) ?? []),
    labels: message?.labels ?? {},
    gpuModel: message?.gpuModel ?? "",
    location: { country, region, datacenter },
    showDeleted,
  };
}

/** A filter in one spelling: neither the order of labels nor that of states changes what is listed. */
function hashable(filter: InstanceFilter): unknown {
  return {
    ...filter,
    states: filter.states.toSorted(),
    labels: Object.entries(filter.labels).toSorted(([a], [b]) => (a < b ? -1 : 1)),
  };
}

function toState(state: InstanceState): State | undefined {
  if (isUnknownEnum(InstanceStateSchema, state)) return undefined;
  switch (state) {
    case InstanceState.UNSPECIFIED:
      return undefined;
    case InstanceState.PENDING:
      return "PENDING";
    case InstanceState.SCHEDULED:
      return "SCHEDULED";
    case InstanceState.PULLING:
      return "PULLING";
    case InstanceState.CREATING:
      return "CREATING";
    case InstanceState.RUNNING:
      return "RUNNING";
    case InstanceState.STOPPING:
      return "STOPPING";
    case InstanceState.STOPPED:
      return "STOPPED";
    case InstanceState.FAILED:
      return "FAILED";
    case InstanceState.DELETED:
      return "DELETED";
  }
}
