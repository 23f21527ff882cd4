// Nodes and enrollment tokens as the schema shows them.
import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  type EnrollmentTokenSchema,
  type NodeAllocationSchema,
  type NodeSchema,
  NodeState as WireNodeState,
} from "@clodei/proto/gen/clodei/v1/node_service";
import type { EnrollmentTokenRecord, FleetNode, NodeState } from "./model.ts";

/** What is allocated on a node, as placement knows it. */
export type Allocation = Pick<
  MessageInitShape<typeof NodeAllocationSchema>,
  "gpuUuids" | "cpuMillis" | "memoryMib" | "instances"
>;

const stateOnWire: Readonly<Record<NodeState, WireNodeState>> = {
  enrolled: WireNodeState.ENROLLED,
  ready: WireNodeState.READY,
  unreachable: WireNodeState.UNREACHABLE,
  quarantined: WireNodeState.QUARANTINED,
  revoked: WireNodeState.REVOKED,
};

/** Every state of a node. */
export const nodeStates = ["enrolled", "ready", "unreachable", "quarantined", "revoked"] as const satisfies NodeState[];

/** The state that a filter names; undefined for one that we do not know. */
export function nodeStateOf(state: WireNodeState): NodeState | undefined {
  return nodeStates.find((name) => stateOnWire[name] === state);
}

/** A node on the wire. */
export function nodeToWire(node: FleetNode, allocation: Allocation | undefined): MessageInitShape<typeof NodeSchema> {
  return {
    id: node.nodeId,
    name: node.name,
    location: node.location,
    state: stateOnWire[node.state],
    message: [node.message, node.sharedGpusMessage].filter((part) => part !== "").join("; "),
    cordoned: node.cordoned,
    connected: node.connected,
    agentVersion: node.agentVersion,
    ...(node.inventory === undefined ? {} : { inventory: node.inventory }),
    allocation: allocation ?? {},
    createTime: timestampFromDate(node.createTime),
    updateTime: timestampFromDate(node.updateTime),
    ...(node.heartbeatTime === undefined ? {} : { heartbeatTime: timestampFromDate(node.heartbeatTime) }),
    ...(node.certificateExpireTime === undefined
      ? {}
      : { certificateExpireTime: timestampFromDate(node.certificateExpireTime) }),
    desiredGeneration: node.desiredGeneration,
    observedGeneration: node.observedGeneration,
    acceptingWork: node.acceptingWork,
    acceptingWorkMessage: node.acceptingWorkMessage,
    version: node.version,
  };
}

/** What is known of an enrollment token, on the wire. */
export function enrollmentTokenToWire(token: EnrollmentTokenRecord): MessageInitShape<typeof EnrollmentTokenSchema> {
  return {
    id: token.id,
    location: token.location,
    nodeName: token.nodeName,
    maxUses: token.maxUses,
    uses: token.uses,
    createTime: timestampFromDate(token.createTime),
    expireTime: timestampFromDate(token.expireTime),
    ...(token.revokeTime === undefined ? {} : { revokeTime: timestampFromDate(token.revokeTime) }),
    reenrollsNodeId: token.reenrollsNodeId ?? "",
  };
}
