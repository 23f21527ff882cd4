/**
 * What a node is, and what may become of it. Pure: times are arguments.
 */
import { type Gpu, GpuHealth, type NodeInventory } from "@clodei/proto/gen/clodei/v1/inventory";
import type { EnrollmentTokenId, NodeId } from "@clodei/proto/ids";

/** Where a node stands. */
export type NodeLocation = {
  /** ISO 3166-1 alpha-2, upper case. */
  readonly country: string;
  readonly region: string;
  readonly datacenter: string;
  /** 1 to 4. */
  readonly tier: number;
};

/**
 * - enrolled: has a certificate; its agent has not connected since.
 * - ready: its agent is heard.
 * - unreachable: its agent was not heard for the lease. Its instances go on.
 * - quarantined: two processes used its identity. No new work until an operator enrolls it again.
 * - revoked: for good.
 */
export type NodeState = "enrolled" | "ready" | "unreachable" | "quarantined" | "revoked";

/** A machine of the fleet, as the database knows it. */
export type FleetNode = {
  readonly nodeId: NodeId;
  readonly name: string;
  readonly location: NodeLocation;
  readonly state: NodeState;
  readonly message: string;
  /** Which of its GPUs other nodes report as well; empty where none. */
  readonly sharedGpusMessage: string;
  readonly cordoned: boolean;
  readonly connected: boolean;
  readonly agentVersion: string;
  readonly inventory: NodeInventory | undefined;
  readonly acceptingWork: boolean;
  readonly acceptingWorkMessage: string;
  readonly createTime: Date;
  readonly updateTime: Date;
  readonly heartbeatTime: Date | undefined;
  readonly certificateExpireTime: Date | undefined;
  readonly desiredGeneration: bigint;
  readonly observedGeneration: bigint;
  readonly version: bigint;
};

/**
 * Whether new instances may be placed on a node now. Not where its agent left, though its lease goes on: what is placed
 * there waits for it to come back, while another node could begin it at once.
 */
export function takesNewWork(node: Pick<FleetNode, "state" | "connected" | "cordoned" | "acceptingWork">): boolean {
  return node.state === "ready" && node.connected && !node.cordoned && node.acceptingWork;
}

/** Why a GPU is not healthy; empty where it is. */
export function troubleOf(gpu: Pick<Gpu, "health" | "healthMessage">): string {
  if (gpu.health === GpuHealth.HEALTHY) return "";
  return gpu.healthMessage === "" ? "its health is not known" : gpu.healthMessage;
}

/** So many GPUs are named in one message. */
const maxNamedGpus = 8;

/** What an operator is told of a node's GPUs that other nodes report as well. */
export function describeSharedGpus(
  nodeId: NodeId,
  gpus: readonly {
    readonly uuid: string;
    readonly reporters: readonly { readonly nodeId: NodeId; readonly name: string }[];
  }[],
): string {
  const others = gpus.map(({ uuid, reporters }) => {
    const names = reporters.filter((reporter) => reporter.nodeId !== nodeId).map(({ name }) => name);
    return `${uuid} (by ${names.slice(0, maxNamedGpus).join(", ")})`;
  });
  const more = others.length > maxNamedGpus ? ` and ${others.length - maxNamedGpus} more` : "";
  const named = others.slice(0, maxNamedGpus).join(", ");
  return `reported by other nodes as well: ${named}${more}; a GPU is offered at one node only, so revoke a node that no longer has it`;
}

/** What is known of an enrollment token. */
export type EnrollmentTokenRecord = {
  readonly id: EnrollmentTokenId;
  readonly location: NodeLocation;
  readonly nodeName: string;
  readonly maxUses: number;
  readonly uses: number;
  readonly reenrollsNodeId: NodeId | undefined;
  readonly createTime: Date;
  readonly expireTime: Date;
  readonly revokeTime: Date | undefined;
};

/** Whether a token still enrolls anybody, new keys or known ones. */
export function isTokenAlive(token: Pick<EnrollmentTokenRecord, "expireTime" | "revokeTime">, now: Date): boolean {
  return token.revokeTime === undefined && token.expireTime > now;
}

/** What is wrong with how a certificate is being used; undefined where nothing is. */
export type CertificateFault = "unknown" | "expired" | "superseded" | "ended";

/** What the database knows of a certificate, and of the node that it names. */
export type CertificateCheck = {
  readonly nodeId: NodeId;
  /** The node's state. */
  readonly state: NodeState;
  readonly expireTime: Date;
  /** Undefined: the certificate is good (what the node may do, its state says). */
  readonly fault: Exclude<CertificateFault, "unknown"> | undefined;
};

/** Judges a stored certificate at a time. */
export function certificateFault(
  certificate: { readonly state: "active" | "superseded" | "ended"; readonly expireTime: Date },
  now: Date,
): Exclude<CertificateFault, "unknown"> | undefined {
  if (certificate.state !== "active") return certificate.state;
  return certificate.expireTime <= now ? "expired" : undefined;
}

/** The longest that a datacenter's name may be inside a node's, so that name, hyphen and suffix are 63 characters. */
const maxDatacenterCharacters = 52;
const nameSuffixCharacters = 10;

/** A name for a node that was given none: the datacenter and the random end of the node's id. */
export function defaultNodeName(location: NodeLocation, nodeId: NodeId): string {
  return `${location.datacenter.slice(0, maxDatacenterCharacters)}-${nodeId.slice(-nameSuffixCharacters)}`;
}
