// One session: Hello, Welcome, then whatever either side has to say, until it ends. Everything that a message causes
// is level-triggered, so a session may break at any point and the next one makes it good.

import type { Validator } from "@bufbuild/protovalidate";
import { create } from "@bufbuild/protobuf";
import { durationMs, timestampFromDate, timestampMs } from "@bufbuild/protobuf/wkt";
import type { Client } from "@connectrpc/connect";
import type { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import {
  HeartbeatSchema,
  HelloSchema,
  ProbeReplySchema,
  SessionResponseSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type {
  DesiredSet,
  NodeLinkService,
  SessionResponse,
  Welcome,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { nodeLinkProtocolVersion } from "@clodei/proto/node-link";
import type { Logger } from "pino";
import { messageOf, reasonOf } from "../error-reason.ts";
import type { Inventory } from "../inventory/inventory.ts";
import { JournalError } from "../journal/journal.ts";
import type { Journal } from "../journal/journal.ts";
import type { LogStore } from "../logs/log-store.ts";
import { sleep } from "../sleep.ts";
import type { Worker } from "../worker/worker.ts";
import { jitterMs } from "./backoff.ts";
import { LogUploads } from "./log-uploads.ts";
import { Outbox } from "./outbox.ts";
import { Reports } from "./reports.ts";

/** A control plane that does not answer Hello in this time is one to be left. */
const welcomeTimeoutMs = 15_000;
/** A desired set that could not be journaled (the disk is full) is tried again after this. */
const setRetryMs = 5_000;
/** Heartbeats outside these bounds would make a storm, or look dead. */
const heartbeatBoundsMs = { least: 50, most: 300_000 } as const;

/** Of what a Goodbye says, so much is kept. */
const maxGoodbyeCharacters = 1024;

/** What a session works with. */
export interface SessionOptions {
  readonly client: Client<typeof NodeLinkService>;
  readonly worker: Pick<
    Worker,
    | "acceptance"
    | "applyDesiredSet"
    | "beginSession"
    | "containers"
    | "observedGeneration"
    | "onAcceptance"
    | "setServerTime"
  >;
  readonly journal: Journal;
  readonly inventory: Pick<Inventory, "current" | "gpuStatuses" | "onChange">;
  /** One for all sessions: its first look at a kind of message takes a tenth of a second. */
  readonly validator: Validator;
  readonly logs: LogStore;
  readonly agentVersion: string;
  readonly bootId: string;
  readonly onWelcome: (sessionId: string) => void;
  readonly log: Logger;
}

/** How a session ended. */
export interface SessionEnd {
  /** Whether the control plane ever answered Hello. */
  readonly welcomed: boolean;
  /** The reason that it gave; undefined where the link broke without one. */
  readonly reason: ErrorReason | undefined;
  readonly message: string;
  /** Reconnect after a random time up to this; undefined where nothing was said. */
  readonly reconnectWithinMs: number | undefined;
}

/** A session. Used once. */
export class Session {
  readonly #options: SessionOptions;
  readonly #outbox = new Outbox();
  readonly #controller = new AbortController();
  #reports: Reports | undefined;
  #uploads: LogUploads | undefined;
  #goodbye: SessionEnd | undefined;
  #failure: unknown;
  #welcomed = false;
  /** Hello told of an inventory that has changed since. */
  #inventoryChanged = false;
  #heardMs = performance.now();
  #leaseMs = welcomeTimeoutMs;
  #heartbeatMs = 10_000;
  #heartbeats = 0n;
  #waitingSet: DesiredSet | undefined;

  constructor(options: SessionOptions) {
    this.#options = options;
  }

  /** Runs until the session ends. Never throws. */
  async run(signal: AbortSignal): Promise<SessionEnd> {
    const { client, journal, inventory, worker, log } = this.#options;
    const onAbort = (): void => this.#end(signal.reason);
    signal.addEventListener("abort", onAbort, { once: true });
    if (signal.aborted) this.#controller.abort();
    this.#sayHello();
    using _appended = journal.onAppend(() => this.#reports?.send());
    using _changed = inventory.onChange(() => this.#sayInventory());
    // Placement must not wait for the next heartbeat to hear that an engine went or came.
    using _accepts = worker.onAcceptance(() => {
      if (this.#welcomed) this.#sayHeartbeat();
    });
    const watchdog = this.#watch();
    try {
      for await (const response of client.session(this.#outbox, { signal: this.#controller.signal, timeoutMs: 0 })) {
        this.#heardMs = performance.now();
        if (!this.#take(response)) break;
      }
    } catch (error) {
      this.#failure ??= error;
    }
    signal.removeEventListener("abort", onAbort);
    this.#outbox.close();
    await this.#uploads?.close();
    this.#controller.abort();
    await watchdog;
    const failure = this.#failure;
    if (this.#goodbye === undefined && failure !== undefined && !signal.aborted)
      log.debug({ error: messageOf(failure) }, "session broke off");
    return (
      this.#goodbye ?? {
        welcomed: this.#welcomed,
        reason: reasonOf(failure),
        message: failure === undefined ? "the control plane ended the stream" : messageOf(failure),
        reconnectWithinMs: undefined,
      }
    );
  }

  #end(reason: unknown): void {
    this.#failure ??= reason;
    this.#controller.abort();
  }

  #sayHello(): void {
    const { worker, journal, inventory, agentVersion, bootId } = this.#options;
    this.#outbox.push({
      case: "hello",
      value: create(HelloSchema, {
        protocolVersion: nodeLinkProtocolVersion,
        agentVersion,
        bootId,
        sessionSecret: journal.sessionSecret(),
        inventory: inventory.current(),
        containers: worker.containers(),
        journalSequence: journal.lastSequence,
        journalId: journal.id,
        observedGeneration: worker.observedGeneration,
      }),
    });
  }

  /** With a heartbeat behind it: one that was on its way holds the health of before, and may be taken in later. */
  #sayInventory(): void {
    this.#inventoryChanged = !this.#welcomed;
    if (!this.#welcomed) return;
    this.#outbox.push({ case: "inventory", value: this.#options.inventory.current() });
    this.#sayHeartbeat();
  }

  #sayHeartbeat(): void {
    const { worker, inventory } = this.#options;
    const { accepting, message } = worker.acceptance();
    this.#heartbeats += 1n;
    this.#outbox.push({
      case: "heartbeat",
      value: create(HeartbeatSchema, {
        sequence: this.#heartbeats,
        gpus: inventory.gpuStatuses(),
        acceptingWork: accepting,
        acceptingWorkMessage: message,
        observedGeneration: worker.observedGeneration,
        time: timestampFromDate(new Date()),
      }),
    });
  }

  /** Takes a message; false ends the session. */
  #take(response: SessionResponse): boolean {
    const { message } = response;
    // A desired set is judged by the worker: one bad specification ends one attempt and not the session.
    if (message.case !== "desiredSet") {
      const result = this.#options.validator.validate(SessionResponseSchema, response);
      if (result.kind !== "valid") return this.#refuse(result.error.message);
    }
    if (!this.#welcomed && message.case !== "welcome" && message.case !== "goodbye")
      return this.#refuse("a message came before Welcome");
    switch (message.case) {
      case "welcome":
        return this.#welcome(message.value);
      case "desiredSet":
        return this.#desire(message.value);
      case "ack":
        if (message.value.sequence > this.#options.journal.lastSequence)
          return this.#refuse("more was acknowledged than was sent");
        this.#options.journal.acknowledge(message.value.sequence);
        this.#reports?.send();
        return true;
      case "openLogs":
        this.#uploads?.open(message.value);
        return true;
      case "closeLogs":
        this.#uploads?.cancel(message.value.streamId);
        return true;
      case "probe":
        return this.#outbox.push({
          case: "probeReply",
          value: create(ProbeReplySchema, { nonce: message.value.nonce }),
        });
      case "goodbye": {
        const { reason, message: text, reconnectWithin } = message.value;
        const reconnectWithinMs = reconnectWithin === undefined ? undefined : durationMs(reconnectWithin);
        // The text comes into the log, and nothing bounds it on the wire.
        this.#goodbye = {
          welcomed: this.#welcomed,
          reason,
          message: text.slice(0, maxGoodbyeCharacters),
          reconnectWithinMs,
        };
        return false;
      }
      case undefined:
        return this.#refuse("an unknown message came");
    }
  }

  #refuse(why: string): boolean {
    this.#options.log.warn({ why: why.slice(0, 512) }, "the control plane broke the session protocol");
    this.#failure = new Error(`protocol: ${why}`);
    return false;
  }

  #welcome(welcome: Welcome): boolean {
    const { journal, worker, log } = this.#options;
    if (this.#welcomed) return this.#refuse("a second Welcome came");
    try {
      if (welcome.acknowledgedSequence > journal.lastSequence) {
        log.error(
          { acknowledged: welcome.acknowledgedSequence.toString() },
          "the control plane knows more of the journal than it holds: the state folder is an older copy; a new journal begins",
        );
        journal.renew();
        // The next session opens with the new journal's name.
        this.#failure = new Error("a new journal begins");
        return false;
      }
      journal.saveSessionSecret(welcome.sessionSecret);
    } catch (error) {
      // Without it a reconnect may look like a clone's: reconnects are tried with what is known.
      log.warn({ error: messageOf(error) }, "the session secret could not be journaled");
    }
    this.#welcomed = true;
    journal.acknowledge(welcome.acknowledgedSequence);
    worker.beginSession();
    if (welcome.serverTime !== undefined) worker.setServerTime(timestampMs(welcome.serverTime));
    this.#leaseMs = welcome.lease === undefined ? 30_000 : Math.max(1000, durationMs(welcome.lease));
    const interval = welcome.heartbeatInterval === undefined ? 10_000 : durationMs(welcome.heartbeatInterval);
    this.#heartbeatMs = Math.min(heartbeatBoundsMs.most, Math.max(heartbeatBoundsMs.least, interval));
    this.#uploads = new LogUploads({
      ...this.#options,
      refuse: (refused) => void this.#outbox.push({ case: "logsRefused", value: refused }),
    });
    this.#reports = new Reports(journal, this.#outbox);
    this.#outbox.onRoom = () => this.#reports?.send();
    if (this.#inventoryChanged) this.#sayInventory();
    else this.#sayHeartbeat();
    this.#reports.send();
    this.#beat().catch((error: unknown) => this.#end(error));
    this.#options.onWelcome(welcome.sessionId);
    return true;
  }

  #desire(set: DesiredSet): boolean {
    const { worker, log } = this.#options;
    this.#waitingSet = undefined;
    try {
      if (!worker.applyDesiredSet(set))
        log.info({ generation: set.generation.toString() }, "ignored a desired set that is older than the last");
      return true;
    } catch (error) {
      if (!(error instanceof JournalError)) return this.#refuse(messageOf(error));
      // What was not written down is not acted on; the heartbeats tell why.
      log.error({ error: messageOf(error) }, "a desired set could not be journaled; it is tried again");
      this.#waitingSet = set;
      return true;
    }
  }

  async #beat(): Promise<void> {
    const { signal } = this.#controller;
    while (!signal.aborted) {
      await sleep(jitterMs(this.#heartbeatMs), signal);
      if (!signal.aborted) this.#sayHeartbeat();
    }
  }

  /** Leaves a control plane that fell silent, and tries a set again that could not be journaled. */
  async #watch(): Promise<void> {
    const { signal } = this.#controller;
    while (!signal.aborted) {
      await sleep(Math.min(setRetryMs, this.#leaseMs / 2), signal);
      if (signal.aborted) return;
      if (performance.now() - this.#heardMs > this.#leaseMs)
        this.#end(new Error(`nothing was heard for ${this.#leaseMs} ms`));
      const set = this.#waitingSet;
      if (set !== undefined && !this.#desire(set)) this.#end(new Error("the desired set cannot be understood"));
    }
  }
}
