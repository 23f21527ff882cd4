/** `client.nodes`, for platform operators. */
import type { Client } from "@connectrpc/connect";
import { type EnrollmentToken, type Node, type NodeService, NodeState } from "@clodei/proto/gen/clodei/v1/node_service";
import { answered } from "./answers.ts";
import { callOptions, type CallOptions, mutationNames, type MutationOptions } from "./calls.ts";
import { ClodeiError } from "./errors.ts";
import { listNames, type ListOptions, Paginated } from "./pagination.ts";
import { checkOptions, optionNames } from "./request-check.ts";
import type { ResumePolicy } from "./resume.ts";
import { type EnumName, type LocationConstraint, toDuration, valuesOf } from "./spec.ts";
import { watch, type WatchEvent, type WatchOptions } from "./watch.ts";

/** The states of a node: "ENROLLED", "READY", "UNREACHABLE", "QUARANTINED", "REVOKED". */
export type NodeStateName = EnumName<typeof NodeState>;

/** What an enrollment token is for. */
export type EnrollmentTokenSpec = {
  /** Where the nodes stand that it enrolls. Becomes part of their certificates. */
  readonly location: {
    /** ISO 3166-1 alpha-2 in upper case: "ES". Must be inside the allowed jurisdictions. */
    readonly country: string;
    readonly region: string;
    readonly datacenter: string;
    /** 1 to 4, in the Uptime Institute's classification. */
    readonly tier: number;
  };
  /** The name of the node; then it enrolls one. Made from datacenter and id where absent. */
  readonly nodeName?: string | undefined;
  /** How many nodes it may enroll, up to 1000. 1 where absent. */
  readonly maxUses?: number | undefined;
  /** How long it lives, at most 30 days. One hour where absent. */
  readonly lifetimeSeconds?: number | undefined;
};

/** An enrollment token, at the only time that it is shown. */
export type NewEnrollmentToken = {
  /** "CLDT-1-…": give it to `clodei-agent enroll`. */
  readonly token: string;
  /** What the server keeps of it. */
  readonly enrollmentToken: EnrollmentToken;
};

/** Options of a list of nodes. */
export type ListNodesOptions = ListOptions & {
  /** In one of these states. In any but REVOKED where absent. */
  readonly states?: readonly NodeStateName[] | undefined;
  readonly location?: LocationConstraint | undefined;
};

const tokenSpecNames = optionNames<EnrollmentTokenSpec>({
  location: true,
  nodeName: true,
  maxUses: true,
  lifetimeSeconds: true,
});
const listNodesNames = [
  ...listNames,
  ...optionNames<Omit<ListNodesOptions, keyof ListOptions>>({ states: true, location: true }),
];
const revokeNames = [...mutationNames, "comment"];

/** Runs the fleet. */
export class Nodes {
  readonly #client: Client<typeof NodeService>;
  readonly #resume: ResumePolicy;

  constructor(client: Client<typeof NodeService>, resume: ResumePolicy) {
    this.#client = client;
    this.#resume = resume;
  }

  /**
   * Creates a token with which an agent enrolls its node. It is shown once.
   *
   * @throws ClodeiError with LOCATION_NOT_ALLOWED; with SECRET_ALREADY_SHOWN when the first answer was lost on
   *   its way: the token exists and nobody knows it, so revoke it (`metadata.enrollmentTokenId`) and create
   *   another.
   * @example
   * const { token } = await client.nodes.createEnrollmentToken({
   *   location: { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 },
   * });
   */
  async createEnrollmentToken(spec: EnrollmentTokenSpec, options: MutationOptions = {}): Promise<NewEnrollmentToken> {
    checkOptions(spec, tokenSpecNames, "spec");
    const request = {
      location: spec.location,
      nodeName: spec.nodeName ?? "",
      maxUses: spec.maxUses ?? 0,
      idempotencyKey: options.idempotencyKey ?? "",
      lifetime: toDuration(spec.lifetimeSeconds),
    };
    const response = await this.#client.createEnrollmentToken(request, callOptions(options, mutationNames));
    return shownOnce(response.token, answered(response.enrollmentToken, "enrollment token"));
  }

  /**
   * Enrollment tokens, the newest first. The tokens themselves are not kept.
   *
   * @example for await (const token of client.nodes.listEnrollmentTokens()) console.log(token.id, token.uses);
   */
  listEnrollmentTokens(options: ListOptions = {}): Paginated<EnrollmentToken> {
    return new Paginated(async (pageToken) => {
      const request = { pageSize: options.pageSize ?? 0, pageToken };
      const { enrollmentTokens, nextPageToken } = await this.#client.listEnrollmentTokens(
        request,
        callOptions(options, listNames),
      );
      return { items: enrollmentTokens, nextPageToken };
    }, options.pageToken);
  }

  /**
   * Revokes an enrollment token. Nodes that it enrolled stay.
   *
   * @example await client.nodes.revokeEnrollmentToken("ent_01h455vb4pex5vsknk084sn02q");
   */
  async revokeEnrollmentToken(enrollmentTokenId: string, options: MutationOptions = {}): Promise<EnrollmentToken> {
    const request = { enrollmentTokenId, idempotencyKey: options.idempotencyKey ?? "" };
    const response = await this.#client.revokeEnrollmentToken(request, callOptions(options, mutationNames));
    return answered(response.enrollmentToken, "enrollment token");
  }

  /**
   * Nodes, by name.
   *
   * @example for await (const node of client.nodes.list({ states: ["UNREACHABLE"] })) console.log(node.name);
   */
  list(options: ListNodesOptions = {}): Paginated<Node> {
    const filter = { states: valuesOf(NodeState, options.states), location: options.location };
    return new Paginated(async (pageToken) => {
      const request = { pageSize: options.pageSize ?? 0, pageToken, ...filter };
      const { nodes, nextPageToken } = await this.#client.listNodes(request, callOptions(options, listNodesNames));
      return { items: nodes, nextPageToken };
    }, options.pageToken);
  }

  /**
   * One node.
   *
   * @throws ClodeiError with NOT_FOUND.
   * @example console.log((await client.nodes.get("nod_01h455vb4pex5vsknk084sn02q")).inventory?.gpus.length);
   */
  async get(nodeId: string, options: CallOptions = {}): Promise<Node> {
    return answered((await this.#client.getNode({ nodeId }, callOptions(options))).node, "node");
  }

  /**
   * The nodes as they are, and then every change, until the loop is left or the signal is aborted. Goes on after
   * breaks of the connection, as `client.instances.watch` does.
   *
   * @example
   * for await (const event of client.nodes.watch()) {
   *   if (event.type === "change" && !event.value.connected) console.log(`${event.value.name} is away`);
   * }
   */
  watch(options: WatchOptions = {}): AsyncGenerator<WatchEvent<Node>, void, undefined> {
    const open = (cursor: string, signal: AbortSignal) => this.#client.watchNodes({ cursor }, { signal });
    return watch<Node>(open, this.#resume, options);
  }

  /**
   * Keeps new instances off a node. What runs there goes on.
   *
   * @example await client.nodes.cordon(node.id);
   */
  async cordon(nodeId: string, options: MutationOptions = {}): Promise<Node> {
    const request = { nodeId, idempotencyKey: options.idempotencyKey ?? "" };
    return answered((await this.#client.cordonNode(request, callOptions(options, mutationNames))).node, "node");
  }

  /**
   * Lets new instances onto a node again.
   *
   * @example await client.nodes.uncordon(node.id);
   */
  async uncordon(nodeId: string, options: MutationOptions = {}): Promise<Node> {
    const request = { nodeId, idempotencyKey: options.idempotencyKey ?? "" };
    return answered((await this.#client.uncordonNode(request, callOptions(options, mutationNames))).node, "node");
  }

  /**
   * Revokes a node for good: its stream ends within a second, and its instances fail with NODE_LOST. Cannot be
   * undone.
   *
   * @example await client.nodes.revoke(node.id, { comment: "sold" });
   */
  async revoke(nodeId: string, options: MutationOptions & { readonly comment?: string } = {}): Promise<Node> {
    const request = { nodeId, comment: options.comment ?? "", idempotencyKey: options.idempotencyKey ?? "" };
    return answered((await this.#client.revokeNode(request, callOptions(options, revokeNames))).node, "node");
  }

  /**
   * Frees a quarantined node: its certificates end, and the token enrolls it again under the same id.
   *
   * @throws ClodeiError with SECRET_ALREADY_SHOWN as `createEnrollmentToken` does.
   * @example const { token } = await client.nodes.reenroll(node.id);
   */
  async reenroll(nodeId: string, options: MutationOptions = {}): Promise<NewEnrollmentToken & { readonly node: Node }> {
    const request = { nodeId, idempotencyKey: options.idempotencyKey ?? "" };
    const response = await this.#client.reenrollNode(request, callOptions(options, mutationNames));
    const shown = shownOnce(response.token, answered(response.enrollmentToken, "enrollment token"));
    return { ...shown, node: answered(response.node, "node") };
  }
}

/** A replayed answer comes without the token: the server kept no copy. */
function shownOnce(token: string, enrollmentToken: EnrollmentToken): NewEnrollmentToken {
  if (token !== "") return { token, enrollmentToken };
  const message = `the answer with the token was lost; revoke ${enrollmentToken.id} and create another`;
  const metadata = { enrollmentTokenId: enrollmentToken.id };
  throw new ClodeiError("failed_precondition", "SECRET_ALREADY_SHOWN", message, { metadata });
}
