// Enrollment: from a token to an identity on disk. A crash or a lost answer at any point is repaired by running it
// again: the key that was sent is kept, and the control plane answers the same token and key with the same node.

import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { Code, ConnectError } from "@connectrpc/connect";
import { parseId } from "@clodei/proto/ids";
import type { NodeId } from "@clodei/proto/ids";
import type { EnrollmentTokenParts } from "@clodei/proto/enrollment-token";
import { parseEnrollmentToken } from "@clodei/proto/enrollment-token";
import type { EnrollResponse } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { findAnchor } from "./anchor.ts";
import { connectEnrollment, trustedBy } from "./enrollment-client.ts";
import { publicKeyDer } from "./identity-store.ts";
import type { Identity, IdentityStore } from "./identity-store.ts";
import { certificateRequest } from "./key.ts";
import type { NodeKey } from "./key.ts";
import { checkNodeCertificate, checkTrustBundle, TrustError } from "./trust.ts";

/** Enrollment did not work. The message is for the operator and holds no secret. */
export class EnrollmentError extends Error {
  override readonly name = "EnrollmentError";
}

// A control plane that restarts is away for seconds; an operator waits at the terminal.
const attempts = 5;
const firstDelayMs = 500;

/** Enrolls this node, or enrolls it anew with another token, and writes the identity down. */
export async function enroll(options: {
  readonly store: IdentityStore;
  /** Why the store must not hold this node's identity; undefined where it may. Which node it is the answer tells. */
  readonly refusalOf?: (nodeId: NodeId) => string | undefined;
  readonly controlPlaneUrl: string;
  readonly token: string;
  readonly agentVersion: string;
  readonly signal: AbortSignal;
}): Promise<Identity> {
  const token = parseEnrollmentToken(options.token.trim());
  if (token === undefined)
    throw new EnrollmentError(
      "the enrollment token is malformed: it reads CLDT-1-…, and a part is missing or mistyped",
    );
  const key = await options.store.nextKey();
  const response = await retry(options.signal, () => requestIdentity(options, token, key));
  const identity = judge(response, options.controlPlaneUrl, token, key);
  const refusal = options.refusalOf?.(identity.nodeId);
  if (refusal !== undefined) {
    await options.store.dropNextKey();
    throw new EnrollmentError(
      `${refusal}. Nothing was changed here; the token was used: revoke ${identity.nodeId} and make another token`,
    );
  }
  await options.store.commit(identity);
  return identity;
}

async function requestIdentity(
  options: {
    readonly controlPlaneUrl: string;
    readonly token: string;
    readonly agentVersion: string;
    readonly signal: AbortSignal;
  },
  token: EnrollmentTokenParts,
  key: NodeKey,
): Promise<EnrollResponse> {
  const anchor = await findAnchor(new URL(options.controlPlaneUrl), token.caDigestHex, options.signal);
  using connection = connectEnrollment(options.controlPlaneUrl, trustedBy(anchor));
  return await connection.client.enroll(
    {
      enrollmentToken: options.token.trim(),
      certificateRequest: await certificateRequest(key),
      agentVersion: options.agentVersion,
    },
    { signal: options.signal },
  );
}

function judge(response: EnrollResponse, controlPlaneUrl: string, token: EnrollmentTokenParts, key: NodeKey): Identity {
  const roots = checkTrustBundle(response.trustBundle, token.caDigestHex);
  const certificate = checkNodeCertificate(response.certificate, {
    roots,
    publicKeyDer: publicKeyDer(key),
    nowMs: Date.now(),
  });
  const nodeId = parseId("nod", response.nodeId);
  if (nodeId === undefined) throw new EnrollmentError("the control plane answered without a node id");
  const { location } = response;
  return {
    nodeId,
    nodeName: response.nodeName,
    location:
      location === undefined
        ? ""
        : `${location.country}/${location.region}/${location.datacenter} (tier ${location.tier})`,
    controlPlaneUrl,
    nodeEndpoint: parseEndpoint(response.nodeEndpoint),
    enrollmentId: randomUUID(),
    key,
    certificate,
    roots,
  };
}

/** "host:port", as the control plane names its node listener. */
export function parseEndpoint(endpoint: string): string {
  const url = URL.canParse(`https://${endpoint}`) ? new URL(`https://${endpoint}`) : undefined;
  if (url === undefined || url.pathname !== "/" || url.search !== "" || url.username !== "") {
    throw new EnrollmentError("the control plane named no usable node endpoint");
  }
  return endpoint;
}

async function retry<T>(signal: AbortSignal, work: () => Promise<T>): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await work();
    } catch (error) {
      if (signal.aborted || attempt >= attempts || !isPassing(error)) throw readable(error);
      await delay(firstDelayMs * 2 ** (attempt - 1), undefined, { signal });
    }
  }
}

/** Whether trying again may help. A listener that does not verify, or says no, will say no again. */
function isPassing(error: unknown): boolean {
  if (error instanceof TrustError || error instanceof EnrollmentError) return false;
  if (!(error instanceof ConnectError)) return true;
  if (isCertificateFailure(error)) return false;
  return error.code === Code.Unavailable || error.code === Code.DeadlineExceeded || error.code === Code.Aborted;
}

function readable(error: unknown): unknown {
  if (!(error instanceof ConnectError)) return error;
  if (isCertificateFailure(error)) {
    return new EnrollmentError(
      `the control plane's certificate cannot be verified, so the token was not sent: ${error.rawMessage}`,
      { cause: error },
    );
  }
  return new EnrollmentError(`the control plane refused: ${error.rawMessage}`, { cause: error });
}

function isCertificateFailure(error: ConnectError): boolean {
  const cause: unknown = error.cause;
  const code = cause instanceof Error && "code" in cause ? String(cause.code) : "";
  return /CERT|ALTNAME|SELF_SIGNED|ERR_TLS|ERR_SSL|UNABLE_TO_/.test(code);
}
