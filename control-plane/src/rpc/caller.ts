// Whom the server takes a caller for. The listeners find it out before a request's body is read, and everything
// behind them trusts it.
import type { Role } from "@clodei/proto/gen/clodei/options/v1/options";
import type { ApiKeyId, NodeId, OperatorId, OrganizationId, UserId } from "@clodei/proto/ids";

/** How a caller proved who it is. */
export type Credential = "api_key" | "token";

/** When a token ends, by which a caller was admitted. Absent for an API key, whose end the database knows. */
type TokenEnd = { readonly tokenExpireTime?: Date };

/** A caller without credentials. */
export type AnonymousCaller = { readonly kind: "anonymous" };

/** A caller that acts in the name of an organization. */
export type CustomerCaller = {
  readonly kind: "customer";
  readonly organizationId: OrganizationId;
  readonly organizationName: string;
  readonly callerId: ApiKeyId | UserId;
  readonly credential: Credential;
  readonly roles: ReadonlySet<Role>;
  readonly emailVerified: boolean;
} & TokenEnd;

/** A person with a valid token, who belongs to no organization. */
export type UserCaller = {
  readonly kind: "user";
  readonly callerId: UserId;
  readonly emailVerified: boolean;
} & TokenEnd;

/** A platform operator. Never implied by a role in an organization. */
export type PlatformCaller = {
  readonly kind: "platform";
  readonly callerId: OperatorId | ApiKeyId;
  readonly credential: Credential;
} & TokenEnd;

/** A node, by its certificate on the node listener. */
export type NodeCaller = { readonly kind: "node"; readonly nodeId: NodeId; readonly certificateSerial: string };

/** Another control plane on the same database, by its certificate on the replica listener. */
export type ReplicaCaller = { readonly kind: "replica"; readonly replicaId: string };

export type Caller = AnonymousCaller | CustomerCaller | UserCaller | PlatformCaller | NodeCaller | ReplicaCaller;

/**
 * Finds out who calls, from a request's headers.
 * @param origin the browser's origin, where the request comes from one.
 * @throws DomainError when there are credentials, and they are wrong. None at all make an anonymous caller.
 */
export type Authenticate = (headers: Headers, origin: string | undefined) => Promise<Caller>;

export const anonymousCaller: AnonymousCaller = { kind: "anonymous" };
