// In whose name a person acts. Pure.
import type { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import type { OrganizationId } from "@clodei/proto/ids";

/** A person's place in an organization. */
export type Membership = {
  readonly organizationId: OrganizationId;
  readonly organizationName: string;
  readonly roles: ReadonlySet<Role>;
};

/** In whose name a request acts, where its header names none. */
export type DefaultOrganization =
  | { readonly kind: "one"; readonly membership: Membership }
  | { readonly kind: "none" }
  /** Of several, the request must name one. */
  | { readonly kind: "several"; readonly memberships: readonly Membership[] };

/** The only membership there is, or why there is not one. */
export function defaultOrganization(memberships: readonly Membership[]): DefaultOrganization {
  const [first, second] = memberships;
  if (first === undefined) return { kind: "none" };
  return second === undefined ? { kind: "one", membership: first } : { kind: "several", memberships };
}
