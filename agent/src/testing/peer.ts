// The control plane's end of the node link, as a test drives it: it hears what it waits for and says what it likes,
// also what no control plane would.

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { create } from "@bufbuild/protobuf";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromMs } from "@bufbuild/protobuf/wkt";
import type { HandlerContext } from "@connectrpc/connect";
import type { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { SessionResponseSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { SessionRequest, SessionResponse } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { newId } from "@clodei/proto/ids";
import type { IdentityStore, Identity } from "../identity/identity-store.ts";
import { publicKeyDer } from "../identity/identity-store.ts";
import { certificateRequest } from "../identity/key.ts";
import { checkNodeCertificate } from "../identity/trust.ts";
import type { TestAuthority } from "./authority.ts";
import type { TestListener } from "./control-plane.ts";

/** The session secret of every Welcome. */
export const sessionSecret = new Uint8Array(32).fill(7);

/** One session. */
export class Peer {
  readonly #incoming: AsyncIterator<SessionRequest>;
  readonly #outgoing: SessionResponse[] = [];
  #wake = Promise.withResolvers<void>();
  #closed = false;

  constructor(requests: AsyncIterable<SessionRequest>) {
    this.#incoming = requests[Symbol.asyncIterator]();
  }

  say(message: MessageInitShape<typeof SessionResponseSchema>["message"]): void {
    this.#outgoing.push(create(SessionResponseSchema, message === undefined ? {} : { message }));
    this.#wake.resolve();
  }

  welcome(acknowledgedSequence = 0n, heartbeatMs = 60_000): void {
    const value = {
      sessionId: "s",
      sessionSecret,
      heartbeatInterval: durationFromMs(heartbeatMs),
      lease: durationFromMs(30_000),
      serverTime: timestampFromMs(Date.now()),
      acknowledgedSequence,
    };
    this.say({ case: "welcome", value });
  }

  goodbye(reason: ErrorReason): void {
    this.say({ case: "goodbye", value: { reason, message: "because" } });
    this.close();
  }

  close(): void {
    this.#closed = true;
    this.#wake.resolve();
  }

  /** The next message of this kind; others are passed over. */
  async hear<C extends SessionRequest["message"]["case"]>(
    kind: C,
  ): Promise<Extract<SessionRequest["message"], { case: C }>["value"]> {
    for (;;) {
      const result = await this.#incoming.next();
      assert.ok(result.done !== true, `the session ended before ${kind}`);
      if (result.value.message.case === kind) return result.value.message.value as never;
    }
  }

  async *responses(signal: AbortSignal): AsyncGenerator<SessionResponse> {
    signal.addEventListener("abort", () => this.close());
    for (;;) {
      const next = this.#outgoing.shift();
      if (next !== undefined) yield next;
      else if (this.#closed) return;
      else {
        this.#wake = Promise.withResolvers<void>();
        await this.#wake.promise;
      }
    }
  }
}

/** Sessions in the order in which an agent opens them. */
export class Peers {
  readonly #waiting: Peer[] = [];
  #arrived = Promise.withResolvers<void>();

  /** Handles NodeLinkService.Session. */
  async *serve(requests: AsyncIterable<SessionRequest>, context: HandlerContext): AsyncGenerator<SessionResponse> {
    const peer = new Peer(requests);
    this.#waiting.push(peer);
    this.#arrived.resolve();
    yield* peer.responses(context.signal);
  }

  /** The next session that the agent opens. */
  async next(): Promise<Peer> {
    for (;;) {
      const peer = this.#waiting.shift();
      if (peer !== undefined) return peer;
      this.#arrived = Promise.withResolvers<void>();
      await this.#arrived.promise;
    }
  }
}

/** Gives the store an identity whose control plane is the listener, as an enrollment would. */
export async function giveIdentity(
  store: IdentityStore,
  authority: TestAuthority,
  listener: Pick<TestListener, "port" | "url">,
  life: { readonly fromMs: number; readonly toMs: number },
): Promise<Identity> {
  const nodeId = newId("nod");
  const key = await store.nextKey();
  const der = await authority.issueNode(await certificateRequest(key), nodeId, life);
  const roots = [new X509Certificate(authority.rootDer)];
  const certificate = checkNodeCertificate(der, { roots, publicKeyDer: publicKeyDer(key), nowMs: Date.now() });
  const identity = {
    nodeId,
    key,
    certificate,
    roots,
    nodeName: "node",
    location: "ES",
    controlPlaneUrl: listener.url,
    nodeEndpoint: `localhost:${listener.port}`,
    enrollmentId: "e",
  };
  await store.commit(identity);
  return identity;
}
