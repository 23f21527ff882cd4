// A request that carries an idempotency key has one effect, however often it is sent. Its record is the first
// row that its transaction writes, so effect, answer and record commit together, a duplicate in flight waits for
// that commit, and a failure burns no key.
import { createHash } from "node:crypto";
import {
  clone,
  create,
  type DescMessage,
  type DescMethodUnary,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import { reflect, type ReflectMessage } from "@bufbuild/protobuf/reflect";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { type Database, sqlStateOf, type SystemTx, type TenantTx, type Tx } from "./database.ts";
import { DomainError } from "./errors.ts";

/** How long a duplicate waits for the request in flight. */
const inFlightWaitMs = 5_000;
const inFlightRetryMs = 1_000;
/** How long an answer can be replayed. */
export const idempotencyRetentionMs = 24 * 60 * 60 * 1_000;
const lockNotAvailable = "55P03";

/** A request to run once. Scope of its key: the organization (of the transaction), the caller, and the method. */
export type IdempotentCall<Req extends DescMessage, Res extends DescMessage> = {
  readonly callerId: string;
  readonly method: DescMethodUnary<Req, Res>;
  /** With an empty key there is no protection: the effect runs. */
  readonly request: MessageShape<Req> & { readonly idempotencyKey: string };
};

/** What of an answer is stored, where that is not all of it. */
export type StoredAnswer<Res extends DescMessage> = {
  /** Takes out of a copy of the answer what is not to be stored. */
  readonly strip: (response: MessageShape<Res>) => void;
  /** Puts it back where the answer is replayed. Absent: it was a secret, and is gone. */
  readonly restore?: (response: MessageShape<Res>) => Promise<void>;
};

/** An answer, and whether it is that of an earlier request. */
export type IdempotentResult<Res> = {
  readonly response: Res;
  readonly replayed: boolean;
  /** A replayed answer that held a secret, which it now lacks: say SECRET_ALREADY_SHOWN. */
  readonly redacted: boolean;
};

/**
 * Runs the effect of a request once. Call it first in the transaction, and after authorization.
 * @throws DomainError IDEMPOTENCY_KEY_REUSED when the key came with other content, IDEMPOTENCY_KEY_IN_FLIGHT when
 *   the first request still runs after 5 seconds.
 */
export async function runIdempotent<Req extends DescMessage, Res extends DescMessage>(
  tx: TenantTx | SystemTx,
  call: IdempotentCall<Req, Res>,
  effect: () => Promise<MessageInitShape<Res>>,
  storedAnswer?: StoredAnswer<Res>,
): Promise<IdempotentResult<MessageShape<Res>>> {
  const { method, request } = call;
  const run = async () => create(method.output, await effect());
  if (request.idempotencyKey === "") return { response: await run(), replayed: false, redacted: false };
  const organizationId = "organizationId" in tx ? tx.organizationId : "";
  const id = [organizationId, call.callerId, `${method.parent.typeName}.${method.name}`, request.idempotencyKey];
  const hash = hashRequest(method.input, request);
  if (!(await insertRecord(tx, id, hash))) {
    const replayed = await replay(tx, id, hash, method.output);
    await storedAnswer?.restore?.(replayed.response);
    return replayed;
  }
  const response = await run();
  const stored = clone(method.output, response);
  storedAnswer?.strip(stored);
  await tx.execute(
    `update idempotency_records set response = $5, redacted = $6
    where organization_id = $1 and caller_id = $2 and method = $3 and key = $4`,
    [...id, toBinary(method.output, stored), storedAnswer !== undefined && storedAnswer.restore === undefined],
  );
  return { response, replayed: false, redacted: false };
}

/** Deletes records past their retention, some at a time. @returns how many. */
export async function pruneIdempotencyRecords(database: Database, now: Date): Promise<number> {
  const before = new Date(now.getTime() - idempotencyRetentionMs);
  return database.system((tx) =>
    tx.execute(
      `delete from idempotency_records where (organization_id, caller_id, method, key) in (
        select organization_id, caller_id, method, key from idempotency_records
        where create_time < $1 order by create_time limit 5000
      )`,
      [before],
    ),
  );
}

/** Inserts the record, waiting for a duplicate in flight. @returns false when the key's first request committed. */
async function insertRecord(tx: Tx, id: readonly string[], hash: Buffer): Promise<boolean> {
  await tx.execute(`set local lock_timeout = ${inFlightWaitMs}`);
  try {
    const inserted = await tx.execute(
      `insert into idempotency_records (organization_id, caller_id, method, key, request_sha256)
      values ($1, $2, $3, $4, $5) on conflict do nothing`,
      [...id, hash],
    );
    await tx.execute("set local lock_timeout = 0");
    return inserted === 1;
  } catch (error) {
    if (sqlStateOf(error) !== lockNotAvailable) throw error;
    throw new DomainError(
      ErrorReason.IDEMPOTENCY_KEY_IN_FLIGHT,
      "a request with this idempotency key is being worked on",
      { retryAfterMs: inFlightRetryMs, cause: error },
    );
  }
}

async function replay<Res extends DescMessage>(
  tx: Tx,
  id: readonly string[],
  hash: Buffer,
  responseSchema: Res,
): Promise<IdempotentResult<MessageShape<Res>>> {
  const [record] = await tx.query<{ request_sha256: Buffer; response: Buffer | null; redacted: boolean }>(
    `select request_sha256, response, redacted from idempotency_records
    where organization_id = $1 and caller_id = $2 and method = $3 and key = $4`,
    id,
  );
  if (record === undefined || record.response === null) throw new Error("an idempotency record has no answer");
  if (!record.request_sha256.equals(hash)) {
    throw new DomainError(
      ErrorReason.IDEMPOTENCY_KEY_REUSED,
      "this idempotency key was used before with other content: use a new key for a new request",
    );
  }
  return { response: fromBinary(responseSchema, record.response), replayed: true, redacted: record.redacted };
}

/** Digests what a request asks for: all of it but the key, with maps in one order, because the wire has none. */
export function hashRequest<Req extends DescMessage>(schema: Req, request: MessageShape<Req>): Buffer {
  const copy: MessageShape<Req> = clone(schema, request);
  const message = reflect(schema, copy);
  const keyField = schema.fields.find(({ name }) => name === "idempotency_key");
  if (keyField !== undefined) message.clear(keyField);
  sortMaps(message);
  return createHash("sha256").update(toBinary(schema, copy)).digest();
}

function sortMaps(message: ReflectMessage): void {
  for (const field of message.fields) {
    if (!message.isSet(field)) continue;
    if (field.fieldKind === "message") sortMaps(message.get(field));
    else if (field.fieldKind === "list" && field.listKind === "message") {
      for (const item of message.get(field)) if (isReflected(item)) sortMaps(item);
    } else if (field.fieldKind === "map") {
      const map = message.get(field);
      const entries = [...map.entries()].toSorted(([a], [b]) => (String(a) < String(b) ? -1 : 1));
      for (const [key] of entries) map.delete(key);
      for (const [key, value] of entries) {
        map.set(key, value);
        if (isReflected(value)) sortMaps(value);
      }
    }
  }
}

function isReflected(value: unknown): value is ReflectMessage {
  return typeof value === "object" && value !== null && "desc" in value && "message" in value;
}
