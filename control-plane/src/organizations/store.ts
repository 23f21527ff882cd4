// All SQL of organizations and memberships. A person's own memberships are asked through definer functions, as
// clodei_app without a tenant: they are what decides the tenant.
import type { OrganizationId, UserId } from "@clodei/proto/ids";
import type { RoleName } from "../identity/service.ts";
import type { SystemTx, Tx } from "../platform/database.ts";

/** A membership as the database knows it. */
export type MembershipRow = {
  readonly organization_id: OrganizationId;
  readonly organization_name: string;
  readonly roles: readonly string[];
};

/** A person's memberships, at most so many. */
export function membershipsOfUser(tx: Tx, userId: UserId, limit: number): Promise<MembershipRow[]> {
  return tx.query<MembershipRow>("select organization_id, organization_name, roles from memberships_of_user($1, $2)", [
    userId,
    limit,
  ]);
}

/** A person's membership in one organization. */
export async function membershipOfUser(
  tx: Tx,
  userId: UserId,
  organizationId: OrganizationId,
): Promise<MembershipRow | undefined> {
  const [row] = await tx.query<MembershipRow>(
    "select organization_id, organization_name, roles from membership_of_user($1, $2)",
    [userId, organizationId],
  );
  return row;
}

/** Whether what a caller was admitted by still holds: the credential, the membership, and at least these roles. */
export async function doesCallerHold(
  tx: Tx,
  callerId: string,
  organizationId: OrganizationId | undefined,
  roles: readonly RoleName[],
): Promise<boolean> {
  const [row] = await tx.query<{ holds: boolean }>("select caller_holds($1, $2, $3) as holds", [
    callerId,
    organizationId ?? null,
    roles,
  ]);
  return row?.holds ?? false;
}

/** Adds an organization. */
export async function insertOrganization(tx: SystemTx, id: OrganizationId, name: string): Promise<void> {
  await tx.execute("insert into organizations (id, name) values ($1, $2)", [id, name]);
}

/** Makes a person a member, or gives a member these roles. */
export async function upsertMembership(
  tx: SystemTx,
  organizationId: OrganizationId,
  userId: UserId,
  roles: readonly RoleName[],
): Promise<void> {
  await tx.execute(
    `insert into memberships (organization_id, user_id, roles) values ($1, $2, $3)
     on conflict (organization_id, user_id) do update set roles = excluded.roles`,
    [organizationId, userId, roles],
  );
}

/** Ends a membership. @returns whether there was one. */
export async function deleteMembership(tx: SystemTx, organizationId: OrganizationId, userId: UserId): Promise<boolean> {
  const deleted = await tx.execute("delete from memberships where organization_id = $1 and user_id = $2", [
    organizationId,
    userId,
  ]);
  return deleted > 0;
}
