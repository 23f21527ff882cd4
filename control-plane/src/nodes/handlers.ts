// NodeService on the wire: translates, opens the transaction of a use case, and nothing else. Operators are no
// tenant, so all of it works as clodei_system.
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import type { HandlerContext, ServiceImpl } from "@connectrpc/connect";
import { ErrorReason, ErrorReasonSchema } from "@clodei/proto/gen/clodei/v1/error";
import {
  type CreateEnrollmentTokenRequest,
  type CreateEnrollmentTokenResponseSchema,
  type ListNodesRequest,
  type NodeSchema,
  NodeService,
  type ReenrollNodeResponseSchema,
} from "@clodei/proto/gen/clodei/v1/node_service";
import type { NodeId } from "@clodei/proto/ids";
import type { Clock } from "../platform/clock.ts";
import type { SystemTx } from "../platform/database.ts";
import { runIdempotent, type StoredAnswer } from "../platform/idempotency.ts";
import { decodePageToken, filterHash, pageOf, pageSizeOf } from "../platform/page-token.ts";
import { platformOf } from "../rpc/context.ts";
import type { Enrollment } from "./enrollment.ts";
import type { FleetNode } from "./model.ts";
import { endIdentity, revokeNode, setCordoned } from "./operations.ts";
import { type Hints, requireEnrollmentTokenId, requireLocation, requireNode, requireNodeId } from "./standing.ts";
import { listNodes, type NodeFilter } from "./store.ts";
import { watchNodes, type WatchOptions } from "./watch.ts";
import { enrollmentTokenToWire, nodeStateOf, nodeStates, nodeToWire } from "./wire.ts";

/** What the handlers work with. */
export type NodeHandlersOptions = Omit<WatchOptions, "wakeups"> & {
  readonly wakeups: WatchOptions["wakeups"] & Hints;
  readonly enrollment: Enrollment;
  readonly clock: Clock;
};

const defaultTokenLifetimeMs = 60 * 60 * 1000;

/** The handlers of clodei.v1.NodeService. */
export function nodeHandlers(options: NodeHandlersOptions): ServiceImpl<typeof NodeService> {
  return { ...tokenHandlers(options), ...readHandlers(options), ...decisionHandlers(options) };
}

function tokenHandlers(options: NodeHandlersOptions) {
  const { database, enrollment } = options;
  return {
    createEnrollmentToken: (request, context) =>
      mutate(
        options,
        NodeService.method.createEnrollmentToken,
        request,
        context,
        withoutToken,
        async (tx, callerId) => {
          const { record, token } = await enrollment.createToken(tx, {
            ...tokenRequestOf(request),
            creatorId: callerId,
          });
          return { enrollmentToken: enrollmentTokenToWire(record), token };
        },
      ),
    async listEnrollmentTokens(request) {
      const hash = filterHash("enrollment tokens");
      const [afterId] = decodePageToken(request.pageToken, hash) ?? [];
      const size = pageSizeOf(request.pageSize);
      const found = await database.system((tx) => enrollment.listTokens(tx, afterId, size + 1));
      const { page, nextPageToken } = pageOf(found, size, hash, ({ id }) => [id]);
      return { enrollmentTokens: page.map(enrollmentTokenToWire), nextPageToken };
    },
    revokeEnrollmentToken: (request, context) =>
      mutate(options, NodeService.method.revokeEnrollmentToken, request, context, undefined, async (tx) => {
        const record = await enrollment.revokeToken(tx, requireEnrollmentTokenId(request.enrollmentTokenId));
        return { enrollmentToken: enrollmentTokenToWire(record) };
      }),
  } satisfies Partial<ServiceImpl<typeof NodeService>>;
}

function readHandlers(options: NodeHandlersOptions) {
  const { database } = options;
  return {
    async listNodes(request) {
      const filter = filterOf(request);
      const hash = filterHash(filter);
      const [name, id] = decodePageToken(request.pageToken, hash) ?? [];
      const size = pageSizeOf(request.pageSize);
      return database.system(async (tx) => {
        const after = name === undefined || id === undefined ? undefined : { name, id };
        const found = await listNodes(tx, filter, after, size + 1);
        const { page, nextPageToken } = pageOf(found, size, hash, (last) => [last.name, last.nodeId]);
        return { nodes: await toWire(options, tx, page), nextPageToken };
      });
    },
    async getNode(request) {
      const nodeId = requireNodeId(request.nodeId);
      return database.system(async (tx) => ({ node: await oneToWire(options, tx, await requireNode(tx, nodeId)) }));
    },
    watchNodes: (request, context) => watchNodes(options, request.cursor, context.signal),
  } satisfies Partial<ServiceImpl<typeof NodeService>>;
}

function decisionHandlers(options: NodeHandlersOptions) {
  const { enrollment, wakeups, clock } = options;
  const cordon = async (tx: SystemTx, nodeId: string, cordoned: boolean) => ({
    node: await oneToWire(options, tx, await setCordoned(tx, requireNodeId(nodeId), cordoned, wakeups)),
  });
  return {
    cordonNode: (request, context) =>
      mutate(options, NodeService.method.cordonNode, request, context, undefined, (tx) =>
        cordon(tx, request.nodeId, true),
      ),
    uncordonNode: (request, context) =>
      mutate(options, NodeService.method.uncordonNode, request, context, undefined, (tx) =>
        cordon(tx, request.nodeId, false),
      ),
    revokeNode: (request, context) =>
      mutate(options, NodeService.method.revokeNode, request, context, undefined, async (tx) => {
        const node = await revokeNode(tx, requireNodeId(request.nodeId), request.comment, clock(), wakeups);
        return { node: await oneToWire(options, tx, node) };
      }),
    reenrollNode: (request, context) =>
      mutate(options, NodeService.method.reenrollNode, request, context, withoutToken, async (tx, callerId) => {
        const node = await endIdentity(tx, requireNodeId(request.nodeId), clock(), wakeups);
        const { record, token } = await enrollment.createReenrollmentToken(tx, node, callerId);
        return { node: await oneToWire(options, tx, node), enrollmentToken: enrollmentTokenToWire(record), token };
      }),
  } satisfies Partial<ServiceImpl<typeof NodeService>>;
}

/** Runs a change of an operator's once for its idempotency key. A secret is in the first answer alone. */
async function mutate<Req extends DescMessage, Res extends DescMessage>(
  options: NodeHandlersOptions,
  method: DescMethodUnary<Req, Res>,
  request: MessageShape<Req> & { readonly idempotencyKey: string },
  context: HandlerContext,
  storedAnswer: StoredAnswer<Res> | undefined,
  effect: (tx: SystemTx, callerId: string) => Promise<MessageInitShape<Res>>,
): Promise<MessageShape<Res>> {
  const { callerId } = platformOf(context);
  const result = await options.database.system((tx) =>
    runIdempotent(tx, { callerId, method, request }, () => effect(tx, callerId), storedAnswer),
  );
  if (result.redacted) {
    context.responseHeader.set("clodei-reason", ErrorReasonSchema.value[ErrorReason.SECRET_ALREADY_SHOWN].localName);
  }
  return result.response;
}

const withoutToken = {
  strip(response: MessageShape<typeof CreateEnrollmentTokenResponseSchema | typeof ReenrollNodeResponseSchema>): void {
    response.token = "";
  },
};

function tokenRequestOf(request: CreateEnrollmentTokenRequest) {
  return {
    location: requireLocation(request.location),
    nodeName: request.nodeName,
    maxUses: request.maxUses === 0 ? 1 : request.maxUses,
    lifetimeMs: request.lifetime === undefined ? defaultTokenLifetimeMs : durationMs(request.lifetime),
  };
}

function filterOf(request: ListNodesRequest): NodeFilter {
  const states = request.states.flatMap((state) => nodeStateOf(state) ?? []);
  return {
    states: states.length === 0 ? nodeStates.filter((state) => state !== "revoked") : states.toSorted(),
    country: request.location?.country,
    region: request.location?.region,
    datacenter: request.location?.datacenter,
  };
}

async function toWire(
  options: NodeHandlersOptions,
  tx: SystemTx,
  nodes: readonly FleetNode[],
): Promise<MessageInitShape<typeof NodeSchema>[]> {
  const nodeIds: NodeId[] = nodes.map(({ nodeId }) => nodeId);
  const allocations = await options.allocations(tx, nodeIds);
  return nodes.map((node) => nodeToWire(node, allocations.get(node.nodeId)));
}

async function oneToWire(
  options: NodeHandlersOptions,
  tx: SystemTx,
  node: FleetNode,
): Promise<MessageInitShape<typeof NodeSchema>> {
  const [message] = await toWire(options, tx, [node]);
  return message ?? {};
}
