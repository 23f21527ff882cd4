// All SQL of identity. Authentication goes through definer functions as clodei_app without a tenant; what makes and
// revokes credentials works as clodei_system.
import type { ApiKeyId, OperatorId, OrganizationId, UserId } from "@clodei/proto/ids";
import type { SystemTx, Tx } from "../platform/database.ts";
import type { RoleName } from "./model.ts";

/** What a good API key speaks for. */
export type ApiKeyRow = {
  readonly organization_id: OrganizationId | null;
  readonly organization_name: string | null;
  readonly operator_id: OperatorId | null;
  readonly roles: readonly string[];
};

/** The key with this id and hash, where it is good now. */
export async function authenticateApiKey(tx: Tx, id: ApiKeyId, secretHash: Uint8Array): Promise<ApiKeyRow | undefined> {
  const [row] = await tx.query<ApiKeyRow>(
    "select organization_id, organization_name, operator_id, roles from authenticate_api_key($1, $2)",
    [id, secretHash],
  );
  return row;
}

/** The user that an issuer names, made at first sight; undefined where it is disabled. */
export async function authenticateUser(
  tx: Tx,
  issuer: string,
  subject: string,
  newId: UserId,
): Promise<{ readonly userId: UserId; readonly operatorId: OperatorId | undefined } | undefined> {
  const [row] = await tx.query<{ user_id: UserId; operator_id: OperatorId | null }>(
    "select user_id, operator_id from authenticate_user($1, $2, $3)",
    [issuer, subject, newId],
  );
  return row === undefined ? undefined : { userId: row.user_id, operatorId: row.operator_id ?? undefined };
}

/** Stores a key by its hash. */
export async function insertApiKey(
  tx: SystemTx,
  key: {
    readonly id: ApiKeyId;
    readonly organizationId: OrganizationId | undefined;
    readonly operatorId: OperatorId | undefined;
    readonly name: string;
    readonly secretHash: Uint8Array;
    readonly roles: readonly RoleName[];
    readonly expireTime: Date | undefined;
  },
): Promise<void> {
  await tx.execute(
    `insert into api_keys (id, organization_id, operator_id, name, secret_hash, roles, expire_time)
     values ($1, $2, $3, $4, $5, $6, $7)`,
    [
      key.id,
      key.organizationId ?? null,
      key.operatorId ?? null,
      key.name,
      key.secretHash,
      key.roles,
      key.expireTime ?? null,
    ],
  );
}

/** A key that is revoked. */
export type RevokedApiKeyRow = {
  readonly organization_id: OrganizationId | null;
  readonly operator_id: OperatorId | null;
  readonly name: string;
  readonly revoke_time: Date;
};

/** Revokes a key; one that was revoked before keeps its time. Undefined: there is none by this id. */
export async function revokeApiKey(tx: SystemTx, id: ApiKeyId): Promise<RevokedApiKeyRow | undefined> {
  const [row] = await tx.query<RevokedApiKeyRow>(
    `update api_keys set revoke_time = coalesce(revoke_time, now()) where id = $1
     returning organization_id, operator_id, name, revoke_time`,
    [id],
  );
  return row;
}

/** Adds a platform operator. */
export async function insertOperator(
  tx: SystemTx,
  operator: { readonly id: OperatorId; readonly name: string; readonly userId: UserId | undefined },
): Promise<void> {
  await tx.execute("insert into operators (id, name, user_id) values ($1, $2, $3)", [
    operator.id,
    operator.name,
    operator.userId ?? null,
  ]);
}

/** Disables an operator, and so its keys. @returns whether there is one by this id. */
export async function disableOperator(tx: SystemTx, id: OperatorId): Promise<boolean> {
  const changed = await tx.execute("update operators set disable_time = coalesce(disable_time, now()) where id = $1", [
    id,
  ]);
  return changed > 0;
}

/** Disables a user. @returns whether there is one by this id. */
export async function disableUser(tx: SystemTx, id: UserId): Promise<boolean> {
  const changed = await tx.execute("update users set disable_time = coalesce(disable_time, now()) where id = $1", [id]);
  return changed > 0;
}

/** The user that an issuer names, made where there is none yet. */
export async function ensureUser(tx: SystemTx, issuer: string, subject: string, newId: UserId): Promise<UserId> {
  await tx.execute(
    "insert into users (id, issuer, subject) values ($1, $2, $3) on conflict (issuer, subject) do nothing",
    [newId, issuer, subject],
  );
  const [row] = await tx.query<{ id: UserId }>("select id from users where issuer = $1 and subject = $2", [
    issuer,
    subject,
  ]);
  if (row === undefined) throw new Error("an upsert left no row");
  return row.id;
}
