// InstanceService as the contract has it: messages to values of ours and back, one transaction a call, each mutating
// one behind its idempotency key. StreamLogs is the relay's, in dispatch.
import { create, type DescMessage, type DescMethodUnary, isUnknownEnum, type MessageShape } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import { InstanceSpecSchema, InstanceState, InstanceStateSchema } from "@clodei/proto/gen/clodei/v1/instance";
import {
  CreateInstanceResponseSchema,
  DeleteInstanceResponseSchema,
  GetInstanceResponseSchema,
  type InstanceFilter as InstanceFilterMessage,
  InstanceService,
  ListInstanceEventsResponseSchema,
  ListInstancesResponseSchema,
  RestartInstanceResponseSchema,
  StartInstanceResponseSchema,
  StopInstanceResponseSchema,
} from "@clodei/proto/gen/clodei/v1/instance_service";
import type { Database, TenantTx } from "../platform/database.ts";
import { runIdempotent } from "../platform/idempotency.ts";
import { decodePageToken, encodePageToken, filterHash, pageSizeOf } from "../platform/page-token.ts";
import type { CustomerCaller } from "../rpc/caller.ts";
import { customerOf } from "../rpc/context.ts";
import type { State } from "./model.ts";
import type { Command, InstancesService } from "./service.ts";
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

type MutatingMethods = "createInstance" | "stopInstance" | "startInstance" | "restartInstance" | "deleteInstance";

function mutatingHandlers({ database, instances }: InstanceHandlersOptions): Pick<InstanceHandlers, MutatingMethods> {
  const { method } = InstanceService;
  const command = async (tx: TenantTx, caller: CustomerCaller, name: Command, instanceId: string) => ({
    instance: toInstanceMessage(await instances.command(tx, name, instanceId, caller.callerId)),
  });
  return {
    createInstance(request, context) {
      const caller = customerOf(context);
      return mutate(database, caller, method.createInstance, request, async (tx) => {
        const spec = request.spec ?? create(InstanceSpecSchema);
        const instance = await instances.create(tx, spec, caller.callerId);
        return create(CreateInstanceResponseSchema, { instance: toInstanceMessage(instance) });
      });
    },
    stopInstance(request, context) {
      const caller = customerOf(context);
      return mutate(database, caller, method.stopInstance, request, async (tx) =>
        create(StopInstanceResponseSchema, await command(tx, caller, "stop", request.instanceId)),
      );
    },
    startInstance(request, context) {
      const caller = customerOf(context);
      return mutate(database, caller, method.startInstance, request, async (tx) =>
        create(StartInstanceResponseSchema, await command(tx, caller, "start", request.instanceId)),
      );
    },
    restartInstance(request, context) {
      const caller = customerOf(context);
      return mutate(database, caller, method.restartInstance, request, async (tx) =>
        create(RestartInstanceResponseSchema, await command(tx, caller, "restart", request.instanceId)),
      );
    },
    deleteInstance(request, context) {
      const caller = customerOf(context);
      return mutate(database, caller, method.deleteInstance, request, async (tx) =>
        create(DeleteInstanceResponseSchema, await command(tx, caller, "delete", request.instanceId)),
      );
    },
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
      const page = found.slice(0, size);
      const last = page.at(-1);
      return create(ListInstanceEventsResponseSchema, {
        events: page.map(toEventMessage),
        nextPageToken: found.length > size && last !== undefined ? encodePageToken(hash, [String(last.sequence)]) : "",
      });
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

/** Runs a mutating call once for its idempotency key, with the record in the transaction of its effect. */
async function mutate<Req extends DescMessage, Res extends DescMessage>(
  database: Database,
  caller: CustomerCaller,
  method: DescMethodUnary<Req, Res>,
  request: MessageShape<Req> & { readonly idempotencyKey: string },
  effect: (tx: TenantTx) => Promise<MessageShape<Res>>,
): Promise<MessageShape<Res>> {
  const scope = {
    callerId: caller.callerId,
    method: `${method.parent.typeName}.${method.name}`,
    key: request.idempotencyKey,
  };
  const { response } = await database.tenant(caller.organizationId, (tx) =>
    runIdempotent(tx, scope, method.input, request, method.output, () => effect(tx)),
  );
  return response;
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
