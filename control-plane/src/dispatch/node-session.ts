// A session that was welcomed: its link, and what both sides have said on it.
import { create } from "@bufbuild/protobuf";
import {
  AckSchema,
  ProbeSchema,
  type DesiredSet,
  type Hello,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { NodeId } from "@clodei/proto/ids";
import type { SessionLink } from "./session.ts";
import type { PendingReconcile } from "./session-claims.ts";

/** What of a Hello is asked for as long as the session stands. The rest, its inventory above all, goes. */
export type KeptHello = Pick<Hello, "journalId" | "bootId" | "containers">;

/** A session that is the node's, as far as this process knows. */
export class NodeSession {
  readonly id: string;
  readonly link: SessionLink;
  readonly hello: KeptHello;
  /** What Hello said of the containers, while the journal is not committed up to there. */
  reconcileAfter: PendingReconcile | undefined;
  readonly beganAtMs = performance.now();
  /** When the agent last said anything. */
  heardAtMs = performance.now();
  #acknowledged: bigint;
  #sentGeneration: bigint | undefined;
  #sendingDesired = false;
  #overtaken = false;
  #probedNonce: Buffer | undefined;

  constructor(options: {
    id: string;
    link: SessionLink;
    hello: Hello;
    acknowledgedSequence: bigint;
    reconcileAfter: PendingReconcile | undefined;
  }) {
    this.id = options.id;
    this.link = options.link;
    const { journalId, bootId, containers } = options.hello;
    this.hello = { journalId, bootId, containers };
    this.#acknowledged = options.acknowledgedSequence;
    this.reconcileAfter = options.reconcileAfter;
  }

  get nodeId(): NodeId {
    return this.link.peer.nodeId;
  }

  /** Tells the agent up to where its journal is committed. Says it again after a gap, which asks for a resend. */
  acknowledge(sequence: bigint): void {
    this.#acknowledged = sequence;
    this.link.send({ case: "ack", value: create(AckSchema, { sequence }) });
  }

  /** Answers a heartbeat. */
  acknowledgeHeartbeat(heartbeatSequence: bigint): void {
    this.link.send({ case: "ack", value: create(AckSchema, { sequence: this.#acknowledged, heartbeatSequence }) });
  }

  /** The generation of the set that was sent last; one before all where none was. */
  get sentGeneration(): bigint {
    return this.#sentGeneration ?? -1n;
  }

  /**
   * Whether a desired set of this generation is to be sent: it is newer than the one sent, and that one has left.
   * A set that waits is overtaken by the next one, so at most one of them is ever queued.
   */
  wantsDesired(generation: bigint): boolean {
    if (generation <= this.sentGeneration) return false;
    if (this.#sendingDesired) this.#overtaken = true;
    return !this.#sendingDesired;
  }

  /** Sends the whole set. Calls back once it left, where a newer one was wanted meanwhile. */
  sendDesired(set: DesiredSet, overtaken: () => void): void {
    this.#sentGeneration = set.generation;
    this.#sendingDesired = true;
    this.#overtaken = false;
    this.link.send({ case: "desiredSet", value: set }, () => {
      this.#sendingDesired = false;
      if (this.#overtaken) overtaken();
    });
  }

  /** Asks whether the agent is there, once for each nonce. */
  probe(nonce: Buffer): void {
    if (this.#probedNonce?.equals(nonce) === true) return;
    this.#probedNonce = nonce;
    this.link.send({ case: "probe", value: create(ProbeSchema, { nonce }) });
  }
}
