// Sends the logs that OpenLogs asked for, each stream as an RPC of its own, so that bulk never holds up the session.
// The store is read only as fast as the control plane takes it: the transport pulls, and nothing is collected here.

import { create } from "@bufbuild/protobuf";
import type { Client } from "@connectrpc/connect";
import {
  LogsRefusedReason,
  LogsRefusedSchema,
  UploadLogsRequestSchema,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type {
  LogsRefused,
  NodeLinkService,
  OpenLogs,
  UploadLogsRequest,
} from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { parseId } from "@clodei/proto/ids";
import type { Logger } from "pino";
import { messageOf } from "../error-reason.ts";
import { LogsNotFoundError } from "../logs/log-store.ts";
import type { LogStore } from "../logs/log-store.ts";
import type { LogEvent, LogRequest } from "../logs/spool-reader.ts";
import { sleep } from "../sleep.ts";
import type { AttemptKey } from "../worker/model.ts";

/** Open log streams of a node. More are refused: a node serves tenants, not readers. */
export const maxLogStreams = 64;

/** Within this time the store says that it holds nothing: one look at the disk. */
const missingWithinMs = 100;

interface Upload {
  readonly controller: AbortController;
  readonly done: Promise<void>;
}

/** The log streams of one session. */
export class LogUploads {
  readonly #client: Client<typeof NodeLinkService>;
  readonly #logs: LogStore;
  readonly #refuse: (refused: LogsRefused) => void;
  readonly #log: Logger;
  readonly #uploads = new Map<string, Upload>();

  constructor(options: {
    readonly client: Client<typeof NodeLinkService>;
    readonly logs: LogStore;
    readonly refuse: (refused: LogsRefused) => void;
    readonly log: Logger;
  }) {
    this.#client = options.client;
    this.#logs = options.logs;
    this.#refuse = options.refuse;
    this.#log = options.log;
  }

  /** Opens a stream, or refuses. */
  open(request: OpenLogs): void {
    const { streamId } = request;
    const instanceId = parseId("ins", request.attempt?.instanceId ?? "");
    if (this.#uploads.has(streamId)) return;
    if (this.#uploads.size >= maxLogStreams)
      return this.#sayNo(streamId, LogsRefusedReason.TOO_MANY, `${maxLogStreams} log streams are open`);
    if (instanceId === undefined || request.attempt === undefined)
      return this.#sayNo(streamId, LogsRefusedReason.NOT_FOUND, "no such attempt");
    const key = { instanceId, attempt: request.attempt.attempt };
    const controller = new AbortController();
    const done = this.#upload(key, request, controller.signal).finally(() => this.#uploads.delete(streamId));
    this.#uploads.set(streamId, { controller, done });
  }

  /** Ends a stream. */
  cancel(streamId: string): void {
    this.#uploads.get(streamId)?.controller.abort();
  }

  /** Ends every stream. */
  async close(): Promise<void> {
    const all = [...this.#uploads.values()];
    for (const { controller } of all) controller.abort();
    await Promise.all(all.map(({ done }) => done));
  }

  async #upload(key: AttemptKey, request: OpenLogs, signal: AbortSignal): Promise<void> {
    const reading = new AbortController();
    const events = this.#logs.read(key, requestOf(request), AbortSignal.any([signal, reading.signal]));
    const first = events.next();
    try {
      if (await isMissing(first, signal))
        return this.#sayNo(request.streamId, LogsRefusedReason.NOT_FOUND, "the node holds no logs of that attempt");
      await this.#client.uploadLogs(messagesOf(request.streamId, first, events), { signal, timeoutMs: 0 });
    } catch (error) {
      if (error instanceof LogsNotFoundError) this.#sayNo(request.streamId, LogsRefusedReason.NOT_FOUND, error.message);
      // The control plane opens it again from where it came to.
      else if (!signal.aborted)
        this.#log.debug({ instanceId: key.instanceId, error: messageOf(error) }, "a log stream broke off");
    } finally {
      // A reader that waits for output hears of nothing else: without this it would keep its place until there is some.
      reading.abort();
      await events.return(undefined).catch(() => undefined);
    }
  }

  #sayNo(streamId: string, reason: LogsRefusedReason, message: string): void {
    this.#refuse(create(LogsRefusedSchema, { streamId, reason, message }));
  }
}

function requestOf(request: OpenLogs): LogRequest {
  const { follow, tailLines, sinceTime, positions } = request;
  return { follow, tailLines, sinceTime, positions };
}

/** Whether there are no such logs. The store says so at once; output may take as long as it takes. */
async function isMissing(first: Promise<unknown>, signal: AbortSignal): Promise<boolean> {
  const missing = first.then(
    () => false,
    (error: unknown) => error instanceof LogsNotFoundError,
  );
  return await Promise.race([missing, sleep(missingWithinMs, signal).then(() => false)]);
}

async function* messagesOf(
  streamId: string,
  first: Promise<IteratorResult<LogEvent>>,
  events: AsyncGenerator<LogEvent>,
): AsyncGenerator<UploadLogsRequest> {
  yield create(UploadLogsRequestSchema, { message: { case: "start", value: { streamId } } });
  let attemptEnded = false;
  for (let result = await first; result.done !== true; result = await events.next()) {
    const event = result.value;
    switch (event.kind) {
      case "chunk":
        yield create(UploadLogsRequestSchema, { message: { case: "chunk", value: event.chunk } });
        break;
      case "gap":
        yield create(UploadLogsRequestSchema, { message: { case: "gap", value: event.gap } });
        break;
      case "end":
        attemptEnded = true;
        break;
    }
  }
  yield create(UploadLogsRequestSchema, { message: { case: "end", value: { attemptEnded } } });
}
