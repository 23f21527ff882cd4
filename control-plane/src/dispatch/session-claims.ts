// Which of two sessions is the node. A Hello that shows the secret of the session before replaces it at once; one
// that does not is a clone, unless nobody answers for the session that stands. The decision is the database's, one
// Hello of a node at a time, so that it is the same whichever replicas the two are connected to.
import { createHash, randomBytes, randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import type { Hello } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { NodeId } from "@clodei/proto/ids";
import type { InstancesService } from "../instances/service.ts";
import type { NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import type { DispatchLimits } from "./limits.ts";
import { decideHello } from "./model.ts";
import type { SessionLink } from "./session.ts";
import {
  askProbe,
  endAnySession,
  lockNodeSession,
  readSessions,
  readWatermark,
  replaceSession,
  setReconciledBoot,
  type SessionRow,
} from "./store.ts";

/** A Hello, and whether whoever sent it is still there. */
export type Claimant = {
  readonly hello: Hello;
  readonly link: Pick<SessionLink, "peer" | "isGone" | "ended">;
};

/** What became of a Hello. */
export type Claim =
  | { readonly kind: "welcome"; readonly session: ClaimedSession }
  | { readonly kind: "quarantined" }
  /** Whoever sent it went away meanwhile. */
  | { readonly kind: "gone" };

/** The node's new session. */
export type ClaimedSession = {
  readonly sessionId: string;
  readonly secret: Buffer;
  readonly acknowledgedSequence: bigint;
  /** Set where the journal holds reports that are not committed yet: what they say comes before what Hello says. */
  readonly reconcileAfter: PendingReconcile | undefined;
};

/** What Hello said of the node's containers, to be looked at once the journal is committed up to here. */
export type PendingReconcile = { readonly sequence: bigint; readonly bootChanged: boolean };

type Attempt =
  | Claim
  | { readonly kind: "asked"; readonly sessionId: string; readonly nonce: Buffer; readonly deadline: number };

type Answer = "answered" | "silent" | "changed";

const secretBytes = 32;
const nonceBytes = 16;
/** Between two looks at an answer, where no hint comes. */
const answerPollMs = 250;

/** What the decisions need. */
export type SessionClaimsOptions = {
  readonly database: Database;
  readonly wakeups: Wakeups;
  readonly clock: Clock;
  readonly limits: DispatchLimits;
  readonly leaseMs: number;
  /** Names this process. */
  readonly replicaId: string;
  /** Where other replicas reach it, once it listens for them. */
  readonly replicaEndpoint: () => string | undefined;
  readonly nodes: NodesService;
  readonly instances: InstancesService;
};

/** Decides Hellos. */
export class SessionClaims {
  readonly #options: SessionClaimsOptions;

  constructor(options: SessionClaimsOptions) {
    this.#options = options;
  }

  /** Decides a Hello. Takes as long as the older session may take to answer, where it has to be asked. */
  async claim(claimant: Claimant): Promise<Claim> {
    let silentSessionId: string | undefined;
    // Ends: every round but the last follows another session's change, and one of those two is ours.
    for (;;) {
      const attempt = await this.#attempt(claimant, silentSessionId);
      if (attempt.kind !== "asked") return attempt;
      const answer = await this.#awaitAnswer(claimant, attempt);
      if (claimant.link.isGone) return { kind: "gone" };
      if (answer === "silent") silentSessionId = attempt.sessionId;
      if (answer === "answered") {
        // A Hello that was only late is followed by its connection's end: an agent has one session at a time.
        await sleep(this.#options.limits.cloneGraceMs, undefined, { signal: claimant.link.ended }).catch(
          () => undefined,
        );
        if (claimant.link.isGone) return { kind: "gone" };
        if (await this.#quarantine(claimant, attempt.sessionId)) return { kind: "quarantined" };
      }
    }
  }

  /** Takes the node's session, or asks the session that stands whether anybody is there. */
  #attempt(claimant: Claimant, silentSessionId: string | undefined): Promise<Attempt> {
    const { nodeId } = claimant.link.peer;
    const shown = sha256(claimant.hello.sessionSecret);
    return this.#options.database.system(async (tx): Promise<Attempt> => {
      await lockNodeSession(tx, nodeId);
      const [standing] = await readSessions(tx, [nodeId]);
      if (claimant.link.isGone) return { kind: "gone" };
      const now = this.#options.clock();
      const decision =
        standing !== undefined && standing.sessionId === silentSessionId
          ? "take"
          : decideHello(standing, shown, now, this.#options.leaseMs);
      if (decision === "take" || standing === undefined) return this.#take(tx, claimant, standing, shown, now);
      return this.#ask(tx, standing, now);
    });
  }

  async #take(
    tx: SystemTx,
    { hello, link: { peer } }: Claimant,
    standing: SessionRow | undefined,
    shown: Buffer,
    now: Date,
  ): Promise<Claim> {
    const { nodeId } = peer;
    const { inventory } = hello;
    if (inventory === undefined) throw new Error("the schema requires an inventory");
    const secret = randomBytes(secretBytes);
    const sessionId = randomUUID();
    // In the order of locks that everybody keeps: session, instances, node.
    await replaceSession(tx, {
      nodeId,
      sessionId,
      replicaId: this.#options.replicaId,
      replicaEndpoint: this.#options.replicaEndpoint(),
      secretHash: sha256(secret),
      previousSecretHash: shown,
      time: now,
    });
    const acknowledgedSequence = await readWatermark(tx, nodeId, hello.journalId);
    const bootChanged = standing?.reconciledBootId !== undefined && standing.reconciledBootId !== hello.bootId;
    const committed = acknowledgedSequence >= hello.journalSequence;
    if (committed) await reconcileContainers(tx, this.#options.instances, nodeId, hello, bootChanged);
    await this.#options.nodes.recordHello(tx, nodeId, { ...hello, inventory });
    await this.#options.nodes.certificateUsed(tx, peer.certificateSerial);
    tx.afterCommit(() => this.#hint(nodeId));
    return {
      kind: "welcome",
      session: {
        sessionId,
        secret,
        acknowledgedSequence,
        reconcileAfter: committed ? undefined : { sequence: hello.journalSequence, bootChanged },
      },
    };
  }

  async #ask(tx: SystemTx, standing: SessionRow, now: Date): Promise<Attempt> {
    const { probeTimeoutMs } = this.#options.limits;
    const asked = standing.probe;
    const waiting =
      asked !== undefined && asked.replyTime === undefined && now.getTime() - asked.time.getTime() < probeTimeoutMs;
    // Two newcomers at once ask one question: a second nonce would void the answer to the first.
    const nonce = waiting ? asked.nonce : randomBytes(nonceBytes);
    if (!waiting) await askProbe(tx, standing.nodeId, standing.sessionId, nonce, now);
    tx.afterCommit(() => this.#hint(standing.nodeId));
    const deadline = (waiting ? asked.time.getTime() : now.getTime()) + probeTimeoutMs;
    return { kind: "asked", sessionId: standing.sessionId, nonce, deadline };
  }

  async #awaitAnswer(claimant: Claimant, asked: Extract<Attempt, { kind: "asked" }>): Promise<Answer> {
    const { nodeId } = claimant.link.peer;
    while (!claimant.link.isGone) {
      // Subscribed before the look, so that an answer between the two is not slept through.
      const hint = this.#options.wakeups.wait([`node:${nodeId}`], answerPollMs, claimant.link.ended);
      const [standing] = await this.#options.database.system((tx) => readSessions(tx, [nodeId]));
      if (standing === undefined || standing.sessionId !== asked.sessionId || standing.endTime !== undefined) {
        return "changed";
      }
      if (standing.probe?.nonce.equals(asked.nonce) !== true) return "changed";
      if (standing.probe.replyTime !== undefined) return "answered";
      if (this.#options.clock().getTime() >= asked.deadline) return "silent";
      await hint;
    }
    return "changed";
  }

  /** Quarantines the node, unless the session that answered is over meanwhile. */
  #quarantine(claimant: Claimant, answeringSessionId: string): Promise<boolean> {
    const { nodeId } = claimant.link.peer;
    return this.#options.database.system(async (tx) => {
      await lockNodeSession(tx, nodeId);
      const [standing] = await readSessions(tx, [nodeId]);
      if (claimant.link.isGone) return false;
      if (standing?.sessionId !== answeringSessionId || standing.endTime !== undefined) return false;
      await endAnySession(tx, nodeId, this.#options.clock());
      await this.#options.nodes.quarantine(tx, nodeId, "two processes used the node's identity at the same time");
      await this.#options.nodes.recordDisconnect(tx, nodeId);
      tx.afterCommit(() => this.#hint(nodeId));
      return true;
    });
  }

  #hint(nodeId: NodeId): void {
    this.#options.wakeups.notify(`node:${nodeId}`);
  }
}

/** Compares what runs with what should, once everything that the journal says has been applied. */
export async function reconcileContainers(
  tx: SystemTx,
  instances: InstancesService,
  nodeId: NodeId,
  hello: Pick<Hello, "bootId" | "containers">,
  bootChanged: boolean,
): Promise<void> {
  await instances.reconcileHello(tx, nodeId, bootChanged, hello.containers);
  await setReconciledBoot(tx, nodeId, hello.bootId);
}

function sha256(secret: Uint8Array): Buffer {
  return createHash("sha256").update(secret).digest();
}
