// Whether a node may speak, asked before every one of its messages. The handshake looked at the certificate once,
// and a resumed TLS session not at all: expiry, supersession and revocation are judged here, from the database,
// with a memory shorter than the second in which a revoked node must be out. (The session keeper refreshes it at
// once where a hint names the node.)
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import type { NodeId } from "@clodei/proto/ids";
import type { CertificateCheck, NodesService } from "../nodes/service.ts";
import type { Clock } from "../platform/clock.ts";
import type { Database, SystemTx } from "../platform/database.ts";
import type { DispatchLimits } from "./limits.ts";

/** Who is at the other end, as the certificate of its TLS connection says. */
export type Peer = {
  readonly nodeId: NodeId;
  readonly certificateSerial: string;
  readonly certificateExpireTime: Date;
  /** "address:port" of its connection. */
  readonly address: string;
};

/** Why a node may not speak. */
export type Refusal = { readonly reason: ErrorReason; readonly message: string };

/** What the database says of a certificate. Undefined of one that it does not know. */
export type Check = CertificateCheck | undefined;

type Remembered = { readonly check: Check; atMs: number };

/** Judges certificates, and remembers the judgment for a moment. */
export class CertificateGate {
  readonly #database: Pick<Database, "look">;
  readonly #clock: Clock;
  readonly #nodes: NodesService;
  readonly #limits: DispatchLimits;
  readonly #remembered = new Map<string, Remembered>();
  /** The question that goes out next, and whom it is about. */
  #next: { readonly peers: Peer[]; readonly checks: Promise<readonly Check[]> } | undefined;
  #asking: Promise<unknown> = Promise.resolve();

  constructor(options: {
    database: Pick<Database, "look">;
    nodes: NodesService;
    clock: Clock;
    limits: DispatchLimits;
  }) {
    this.#nodes = options.nodes;
    this.#database = options.database;
    this.#clock = options.clock;
    this.#limits = options.limits;
  }

  /** Returns why the peer may not speak, or undefined where it may. */
  async refusal(peer: Peer): Promise<Refusal | undefined> {
    const remembered = this.#recent(peer);
    if (remembered !== undefined) return this.judge(peer, remembered.check);
    return this.judge(peer, await this.#ask(peer));
  }

  /** Whether the peer may speak for all that is remembered. False where nothing is: `refusal` asks then. */
  isKnownGood(peer: Peer): boolean {
    const remembered = this.#recent(peer);
    return remembered !== undefined && this.judge(peer, remembered.check) === undefined;
  }

  /**
   * Returns why the peer may not speak, by what `refresh` answered for it, or undefined where it may. Whoever judges many
   * hands in the time, which then is asked for once.
   */
  judge(peer: Peer, check: Check, now = this.#clock()): Refusal | undefined {
    // Also where the database does not know the certificate: it was of a node that is no more, or of another control plane.
    if (check === undefined || check.nodeId !== peer.nodeId) return certificateInvalid("the certificate is unknown");
    if (check.state === "revoked") return { reason: ErrorReason.NODE_REVOKED, message: "the node was revoked" };
    if (check.fault !== undefined) return certificateInvalid(`the certificate is ${check.fault}`);
    // As numbers: comparing objects is slow where it is done for every session all the time.
    const nowMs = now.getTime();
    if (check.expireTime.getTime() <= nowMs || peer.certificateExpireTime.getTime() <= nowMs) {
      return certificateInvalid("the certificate is expired");
    }
    if (check.state === "quarantined") {
      return {
        reason: ErrorReason.NODE_QUARANTINED,
        message: "two processes used the node's identity: an operator must enroll it again",
      };
    }
    return undefined;
  }

  /**
   * Asks the database about all of these at once, and answers in their order. `tx` must not have read anything before:
   * its view would be older.
   */
  async refresh(tx: SystemTx, peers: readonly Peer[]): Promise<Check[]> {
    // Taken before the question: an answer is as old as the moment in which it was asked for.
    const atMs = performance.now();
    const serials = peers.map((peer) => peer.certificateSerial);
    // Taken before the question as well: meanwhile the memory may be cleared.
    const checks = serials.map((serial) => this.#remembered.get(serial)?.check);
    const good = serials.filter((_, index) => isGood(checks[index]));
    const ended = new Set(good.length === 0 ? [] : await this.#nodes.endedCertificates(tx, good));
    const doubtful = new Set(serials.filter((serial, index) => !isGood(checks[index]) || ended.has(serial)));
    if (doubtful.size > 0) {
      const answers = await this.#nodes.checkCertificates(tx, [...doubtful]);
      for (const [index, serial] of serials.entries()) if (doubtful.has(serial)) checks[index] = answers.get(serial);
    }
    this.#remember(serials, checks, atMs);
    return checks;
  }

  #remember(serials: readonly string[], checks: readonly Check[], atMs: number): void {
    if (this.#remembered.size + serials.length > this.#limits.maxCachedCertificates) this.#remembered.clear();
    for (const [index, serial] of serials.entries()) {
      const check = checks[index];
      const remembered = this.#remembered.get(serial);
      // In place: of thousands, a new one each second would be garbage that has grown old.
      if (remembered !== undefined && remembered.check === check) remembered.atMs = atMs;
      else this.#remembered.set(serial, { check, atMs });
    }
  }

  /**
   * Asks about one peer, and together about all who are asked for before the question goes out: one question is under
   * way at a time. Else a process that has been too busy to refresh would ask for each message of each agent by itself,
   * and stay too busy.
   */
  async #ask(peer: Peer): Promise<Check> {
    if (this.#next === undefined) {
      const peers: Peer[] = [];
      const checks = this.#asking.then(() => {
        this.#next = undefined;
        return this.#database.look((tx) => this.refresh(tx, peers));
      });
      this.#next = { peers, checks };
      this.#asking = checks.catch(() => undefined);
    }
    const { peers, checks } = this.#next;
    const index = peers.push(peer) - 1;
    return (await checks)[index];
  }

  #recent(peer: Peer): Remembered | undefined {
    const remembered = this.#remembered.get(peer.certificateSerial);
    if (remembered === undefined) return undefined;
    return performance.now() - remembered.atMs < this.#limits.certificateCacheMs ? remembered : undefined;
  }
}

/** Whether nothing but an event can make it bad, or the time, which is asked at every judgment. */
function isGood(check: CertificateCheck | undefined): boolean {
  return check !== undefined && check.fault === undefined && check.state !== "revoked" && check.state !== "quarantined";
}

function certificateInvalid(message: string): Refusal {
  return { reason: ErrorReason.CERTIFICATE_INVALID, message };
}
