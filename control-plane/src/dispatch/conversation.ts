// The session protocol, from our side: Hello, Welcome, and then whatever the agent has to say, one message after the
// other. What we have to say comes from the session keeper, the heartbeats and the log relay.
import { setTimeout as sleep } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate } from "@bufbuild/protobuf/wkt";
import {
  NodeLinkService,
  WelcomeSchema,
  type Hello,
  type SessionRequest,
  type SessionRequestSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { nodeLinkProtocolVersion } from "@clodei/proto/node-link";
import type { InstancesService } from "../instances/service.ts";
import type { NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import { type Database, DatabaseAwayError } from "../platform/database.ts";
import type { Log } from "../platform/log.ts";
import type { Wakeups } from "../platform/wakeups.ts";
import { authorize } from "../rpc/authorization.ts";
import { reasonName } from "../rpc/errors.ts";
import type { CertificateGate } from "./certificate-gate.ts";
import type { HeartbeatBatcher } from "./heartbeats.ts";
import type { Received } from "./incoming.ts";
import type { DispatchLimits } from "./limits.ts";
import type { LogRelay } from "./log-relay.ts";
import type { DispatchMetrics } from "./metrics.ts";
import { NodeSession } from "./node-session.ts";
import { applyStatusReport, applyUsageReport, noteReport, type ReportOutcome } from "./reports.ts";
import type { SessionLink } from "./session.ts";
import { reconcileContainers, type SessionClaims } from "./session-claims.ts";
import type { SessionKeeper } from "./session-keeper.ts";
import { answerProbe, endSession } from "./store.ts";

/** What a conversation needs. */
export type ConversationOptions = {
  readonly database: Database;
  readonly wakeups: Wakeups;
  readonly nodes: NodesService;
  readonly instances: InstancesService;
  readonly clock: Clock;
  readonly log: Log;
  readonly metrics: DispatchMetrics;
  readonly limits: DispatchLimits;
  readonly gate: CertificateGate;
  readonly claims: SessionClaims;
  readonly keeper: SessionKeeper;
  readonly heartbeats: HeartbeatBatcher;
  readonly relay: LogRelay;
  readonly heartbeatIntervalMs: number;
  readonly leaseMs: number;
};

/** Between two tries while the database is away. */
const databaseRetryMs = 500;

/** Speaks with agents. One for all sessions. */
export class Conversation {
  readonly #options: ConversationOptions;

  constructor(options: ConversationOptions) {
    this.#options = options;
  }

  /** Speaks until either side ends the session. Throws where something fails that is not the database's absence. */
  async run(link: SessionLink): Promise<void> {
    authorize(NodeLinkService.method.session, {
      kind: "node",
      nodeId: link.peer.nodeId,
      certificateSerial: link.peer.certificateSerial,
    });
    const late = setTimeout(
      () => link.goodbye(ErrorReason.PROTOCOL_VIOLATION, "Hello did not come in time", { cut: true }),
      this.#options.limits.firstMessageTimeoutMs,
    );
    let session: NodeSession | undefined;
    const begin = async (received: Received<typeof SessionRequestSchema>): Promise<void> => {
      session = await this.#begin(link, received);
    };
    try {
      await link.receive((received) => {
        if (session !== undefined) return this.#hear(session, received);
        clearTimeout(late);
        return begin(received);
      });
    } finally {
      clearTimeout(late);
      if (session !== undefined) await this.#finish(session);
    }
  }

  /** Takes what is said in a session: at once where nothing has to be asked for it. */
  #hear(session: NodeSession, received: Received<typeof SessionRequestSchema>): Promise<void> | undefined {
    const message = received.kind === "message" ? received.message.message : undefined;
    if (message?.case !== "heartbeat" || !this.#options.gate.isKnownGood(session.link.peer))
      return this.#hearChecked(session, received);
    session.heardAtMs = performance.now();
    this.#options.heartbeats.add(session, message.value);
    return undefined;
  }

  async #hearChecked(session: NodeSession, received: Received<typeof SessionRequestSchema>): Promise<void> {
    const message = await this.#accept(session.link, received);
    if (message === undefined) return;
    session.heardAtMs = performance.now();
    await this.#persist(session.link, () => this.#handle(session, message));
  }

  /** Checks a message before anything looks at it. Undefined: the session has been ended. */
  async #accept(
    link: SessionLink,
    received: Received<typeof SessionRequestSchema>,
  ): Promise<SessionRequest["message"] | undefined> {
    if (received.kind === "violation") {
      link.goodbye(ErrorReason.PROTOCOL_VIOLATION, received.text, { cut: true });
      return undefined;
    }
    const refusal = await this.#persist(link, () => this.#options.gate.refusal(link.peer));
    if (refusal !== undefined) {
      link.goodbye(refusal.reason, refusal.message, { cut: true });
      return undefined;
    }
    return received.message.message;
  }

  /**
   * Does what needs the database, and waits while the database is away: nothing is read from the agent meanwhile, and
   * nothing is lost. Ending the sessions instead would have the whole fleet reconnect in a loop.
   */
  async #persist<T>(link: SessionLink, work: () => Promise<T>): Promise<T> {
    for (;;) {
      try {
        return await work();
      } catch (error) {
        if (!(error instanceof DatabaseAwayError) || link.isOver) throw error;
        this.#options.log.debug({ err: error, nodeId: link.peer.nodeId }, "a session waits for the database");
        await sleep(databaseRetryMs * (0.5 + Math.random()), undefined, { signal: link.ended }).catch(() => undefined);
      }
    }
  }

  /** Undefined: the session has been ended. */
  async #begin(link: SessionLink, received: Received<typeof SessionRequestSchema>): Promise<NodeSession | undefined> {
    const message = await this.#accept(link, received);
    const hello = message === undefined ? undefined : helloIn(link, message);
    if (hello === undefined) return undefined;
    const session = await this.#welcome(link, hello);
    if (session === undefined) return undefined;
    this.#options.log.info(
      { nodeId: session.nodeId, sessionId: session.id, agentVersion: hello.agentVersion },
      "a node's session began",
    );
    return session;
  }

  async #welcome(link: SessionLink, hello: Hello): Promise<NodeSession | undefined> {
    const claimant = { hello, link };
    const claim = await this.#persist(link, () => this.#options.claims.claim(claimant));
    if (claim.kind === "gone") return undefined;
    if (claim.kind === "quarantined") {
      link.goodbye(ErrorReason.NODE_QUARANTINED, "another process uses this node's identity", { cut: true });
      return undefined;
    }
    const { sessionId: id, secret, acknowledgedSequence, reconcileAfter } = claim.session;
    const session = new NodeSession({ id, link, hello, acknowledgedSequence, reconcileAfter });
    link.send({
      case: "welcome",
      value: create(WelcomeSchema, {
        sessionId: id,
        sessionSecret: secret,
        heartbeatInterval: durationFromMs(this.#options.heartbeatIntervalMs),
        lease: durationFromMs(this.#options.leaseMs),
        serverTime: timestampFromDate(this.#options.clock()),
        acknowledgedSequence,
      }),
    });
    this.#options.keeper.hold(session);
    return session;
  }

  async #handle(session: NodeSession, message: SessionRequest["message"]): Promise<void> {
    switch (message.case) {
      case "heartbeat":
        this.#options.heartbeats.add(session, message.value);
        return;
      case "statusReport":
      case "usageReport":
        await this.#report(session, message);
        return;
      case "inventory":
        await this.#options.heartbeats.beforeInventory(session);
        await this.#options.database.system((tx) =>
          this.#options.nodes.recordInventory(tx, session.nodeId, message.value),
        );
        return;
      case "probeReply":
        await this.#probeReplied(session, message.value.nonce);
        return;
      case "logsRefused":
        this.#options.relay.refuse(session.nodeId, message.value);
        return;
      case "hello":
      case undefined:
        session.link.goodbye(ErrorReason.PROTOCOL_VIOLATION, "Hello comes first, and only once", { cut: true });
    }
  }

  async #report(
    session: NodeSession,
    message: Extract<SessionRequest["message"], { case: "statusReport" | "usageReport" }>,
  ): Promise<void> {
    const { database, instances, metrics, log } = this.#options;
    const journal = { nodeId: session.nodeId, journalId: session.hello.journalId };
    const pending = session.reconcileAfter;
    const outcome = await database.system(async (tx): Promise<ReportOutcome> => {
      const now = this.#options.clock();
      const applied =
        message.case === "statusReport"
          ? await applyStatusReport(tx, instances, journal, message.value, now)
          : await applyUsageReport(tx, instances, journal, message.value, now);
      if (pending !== undefined && applied.watermark >= pending.sequence) {
        await reconcileContainers(tx, instances, session.nodeId, session.hello, pending.bootChanged);
      }
      return applied;
    });
    session.acknowledge(outcome.watermark);
    if (pending !== undefined && outcome.watermark >= pending.sequence) {
      session.reconcileAfter = undefined;
      this.#options.keeper.hint(session.nodeId);
    }
    noteReport(message.case === "statusReport" ? "status" : "usage", outcome, session.nodeId, metrics, log);
  }

  async #probeReplied(session: NodeSession, nonce: Uint8Array): Promise<void> {
    await this.#options.database.system(async (tx) => {
      const asked = await answerProbe(tx, session.nodeId, session.id, nonce, this.#options.clock());
      if (asked) tx.afterCommit(() => this.#options.wakeups.notify(`node:${session.nodeId}`));
    });
  }

  /** Notes that the session is over, unless a newer one has taken its place. */
  async #finish(session: NodeSession): Promise<void> {
    this.#options.keeper.release(session);
    const { goodbyeReason } = session.link;
    const reason = goodbyeReason === undefined ? "DISCONNECTED" : reasonName(goodbyeReason);
    this.#options.metrics.sessionsEnded.inc({ reason });
    this.#options.log.info({ nodeId: session.nodeId, sessionId: session.id, reason }, "a node's session ended");
    try {
      await this.#options.database.system(async (tx) => {
        const was = await endSession(tx, session.nodeId, session.id, this.#options.clock());
        if (was) await this.#options.nodes.recordDisconnect(tx, session.nodeId);
      });
    } catch (error) {
      // The lease ends by itself.
      this.#options.log.warn({ err: error, nodeId: session.nodeId }, "the end of a session could not be recorded");
    }
  }
}

/** The Hello that a session begins with. Undefined: the message is none that we speak with, and the session has been ended. */
function helloIn(link: SessionLink, message: SessionRequest["message"]): Hello | undefined {
  if (message.case !== "hello") {
    link.goodbye(ErrorReason.PROTOCOL_VIOLATION, "the first message must be Hello", { cut: true });
    return undefined;
  }
  if (message.value.protocolVersion !== nodeLinkProtocolVersion) {
    link.goodbye(ErrorReason.VERSION_NOT_SUPPORTED, `this server speaks protocol version ${nodeLinkProtocolVersion}`);
    return undefined;
  }
  return message.value;
}
