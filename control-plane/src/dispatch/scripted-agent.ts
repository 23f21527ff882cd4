// An agent of a test that does what the test says: the real protocol over real TLS with Connect's gRPC client, which
// is what the agent uses, and no will of its own.
import { create, type Message, type MessageInitShape } from "@bufbuild/protobuf";
import { createClient, type Client } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import {
  type HelloSchema,
  NodeLinkService,
  SessionRequestSchema,
  UploadLogsRequestSchema,
  type DesiredSet,
  type Goodbye,
  type OpenLogs,
  type SessionRequest,
  type SessionResponse,
  type Welcome,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { GpuHealth } from "@clodei/proto/gen/clodei/v1/inventory";
import type { NodeIdentity } from "./test-fleet.ts";

/** What a message of the agent says. */
type Said<D extends typeof SessionRequestSchema | typeof UploadLogsRequestSchema> = NonNullable<
  MessageInitShape<D>["message"]
>;
type HelloInit = Exclude<MessageInitShape<typeof HelloSchema>, Message>;
type Case = NonNullable<SessionResponse["message"]["case"]>;
type Messages = {
  [M in SessionResponse["message"] as M extends { case: string } ? M["case"] : never]: M extends { value: infer V }
    ? V
    : never;
};
type ValueOf<C extends Case> = Messages[C];

/** How long a test waits for what must come. */
const patienceMs = 30_000;

/** What is sent, one after the other, until it ends. */
class Outbox<T> implements AsyncIterable<T> {
  readonly #waiting: T[] = [];
  #ended = false;
  #wake: (() => void) | undefined;

  push(item: T): void {
    this.#waiting.push(item);
    this.#wake?.();
  }

  end(): void {
    this.#ended = true;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (;;) {
      const item = this.#waiting.shift();
      if (item !== undefined) yield item;
      else if (this.#ended) return;
      else await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }
}

/** Makes the client of a node. */
export function createNodeClient(
  port: number,
  identity: Pick<NodeIdentity, "certificatePem" | "privateKeyPem">,
  caPem: string,
): Client<typeof NodeLinkService> {
  return createClient(
    NodeLinkService,
    createGrpcTransport({
      baseUrl: `https://localhost:${port}`,
      nodeOptions: { ca: caPem, cert: identity.certificatePem, key: identity.privateKeyPem },
    }),
  );
}

/** One session of an agent. */
export class ScriptedAgent {
  readonly client: Client<typeof NodeLinkService>;
  readonly #outbox = new Outbox<SessionRequest>();
  readonly #abort = new AbortController();
  readonly #received: SessionResponse["message"][] = [];
  readonly #listeners = new Set<() => void>();
  readonly #taken = new Set<SessionResponse["message"]>();
  /** How the stream ended; undefined while it stands. "ended" is an end without an error. */
  end: unknown;
  answersProbes = true;

  constructor(client: Client<typeof NodeLinkService>) {
    this.client = client;
    void this.#read();
  }

  /** Opens a session: Hello and Welcome. */
  static async open(
    client: Client<typeof NodeLinkService>,
    hello: HelloInit = {},
  ): Promise<{ agent: ScriptedAgent; welcome: Welcome }> {
    const agent = new ScriptedAgent(client);
    agent.hello(hello);
    return { agent, welcome: await agent.next("welcome") };
  }

  send(message: Said<typeof SessionRequestSchema>): void {
    this.#outbox.push(create(SessionRequestSchema, { message }));
  }

  hello(hello: HelloInit = {}): void {
    this.send({
      case: "hello",
      value: {
        protocolVersion: 1,
        agentVersion: "0.0.0",
        bootId: "boot-1",
        journalId: "journal-1",
        inventory: {
          gpus: [
            { uuid: "GPU-SIM-1", model: "H100-SXM", memoryMib: 81_559, health: GpuHealth.HEALTHY, simulated: true },
          ],
          host: { hostname: "node", cpuCount: 64, memoryMib: 65_536 },
        },
        ...hello,
      },
    });
  }

  heartbeat(sequence: bigint, health: GpuHealth = GpuHealth.HEALTHY): void {
    this.send({
      case: "heartbeat",
      value: { sequence, acceptingWork: true, gpus: [{ uuid: "GPU-SIM-1", health }] },
    });
  }

  /** The next message of this kind that nobody took yet, and that the test means. */
  async next<C extends Case>(kind: C, isMeant: (value: ValueOf<C>) => boolean = () => true): Promise<ValueOf<C>> {
    const find = (): { readonly value: ValueOf<C> } | undefined => {
      for (const message of this.#received) {
        if (message.case !== kind || this.#taken.has(message)) continue;
        // The compiler does not see that the value is of the kind that was compared.
        const value = message.value as ValueOf<C>;
        if (!isMeant(value)) continue;
        this.#taken.add(message);
        return { value };
      }
      return undefined;
    };
    let found: { readonly value: ValueOf<C> } | undefined;
    await this.#until(
      () => {
        found ??= find();
        return found !== undefined;
      },
      () =>
        `no ${kind} came; came: ${this.#received.map((message) => message.case).join(", ")}; end: ${String(this.end)}`,
    );
    if (found === undefined) throw new Error("unreachable");
    return found.value;
  }

  /** How often a kind of message came. */
  count(kind: Case): number {
    return this.#received.filter((message) => message.case === kind).length;
  }

  /** The Goodbye that ends this session. */
  async goodbye(): Promise<Goodbye> {
    const goodbye = await this.next("goodbye");
    await this.ended();
    return goodbye;
  }

  /** The next desired set with at least so many instances. */
  desired(atLeast = 0): Promise<DesiredSet> {
    return this.next("desiredSet", (set) => set.instances.length >= atLeast);
  }

  async ended(): Promise<void> {
    await this.#until(
      () => this.end !== undefined,
      () => "the session did not end",
    );
  }

  /** Ends the session as an agent does that is told to stop. */
  close(): void {
    this.#outbox.end();
  }

  /** Breaks the stream, as a killed agent does. */
  break(): void {
    this.#abort.abort();
    this.#outbox.end();
  }

  /** Answers OpenLogs. */
  upload(open: OpenLogs, signal?: AbortSignal): LogUpload {
    return new LogUpload(this.client, open, signal);
  }

  async #read(): Promise<void> {
    try {
      for await (const { message } of this.client.session(this.#outbox, { signal: this.#abort.signal })) {
        this.#received.push(message);
        if (message.case === "probe" && this.answersProbes) {
          this.send({ case: "probeReply", value: { nonce: message.value.nonce } });
        }
        for (const listener of [...this.#listeners]) listener();
      }
      this.end = "ended";
    } catch (error) {
      this.end = error;
    }
    for (const listener of [...this.#listeners]) listener();
    this.#outbox.end();
  }

  async #until(isDone: () => boolean, complaint: () => string): Promise<void> {
    const deadline = Date.now() + patienceMs;
    while (!isDone()) {
      const leftMs = deadline - Date.now();
      if (leftMs <= 0) throw new Error(complaint());
      await new Promise<void>((resolve) => {
        const done = (): void => {
          this.#listeners.delete(done);
          clearTimeout(timer);
          resolve();
        };
        const timer = setTimeout(done, leftMs);
        this.#listeners.add(done);
      });
    }
  }
}

/** One log stream of an agent. */
export class LogUpload {
  readonly #outbox = new Outbox<ReturnType<typeof create<typeof UploadLogsRequestSchema>>>();
  readonly #abort = new AbortController();
  /** How many messages the transport has taken. */
  taken = 0;
  /** How the call ended: "ended", or its error. */
  readonly result: Promise<unknown>;

  constructor(client: Client<typeof NodeLinkService>, open: OpenLogs, signal?: AbortSignal) {
    signal?.addEventListener("abort", () => this.break(), { once: true });
    this.send({ case: "start", value: { streamId: open.streamId } });
    this.result = client.uploadLogs(this.#counted(), { signal: this.#abort.signal }).then(
      () => "ended",
      (error: unknown) => error,
    );
  }

  send(message: Said<typeof UploadLogsRequestSchema>): void {
    this.#outbox.push(create(UploadLogsRequestSchema, { message }));
  }

  end(attemptEnded: boolean): void {
    this.send({ case: "end", value: { attemptEnded } });
    this.#outbox.end();
  }

  break(): void {
    this.#abort.abort();
    this.#outbox.end();
  }

  async *#counted(): AsyncGenerator<ReturnType<typeof create<typeof UploadLogsRequestSchema>>> {
    for await (const message of this.#outbox) {
      yield message;
      this.taken += 1;
    }
  }
}

/** Waits until a condition holds. */
export async function eventually(what: string, isSo: () => Promise<boolean> | boolean): Promise<void> {
  const deadline = Date.now() + patienceMs;
  while (!(await isSo())) {
    if (Date.now() > deadline) throw new Error(`did not happen: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}
