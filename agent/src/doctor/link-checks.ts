// Whether this node and its control plane can reach and believe each other, and agree about the time.

import { connect } from "node:http2";
import { request } from "node:https";
import type { Identity } from "../identity/identity-store.ts";
import { trustedWith } from "../identity/enrollment-client.ts";
import { isExpired } from "../identity/renewal.ts";
import { messageOf } from "../error-reason.ts";
import type { Finding } from "./finding.ts";
import { findingsOf } from "./finding.ts";

const timeoutMs = 10_000;
const dayMs = 24 * 3_600_000;
/** The header counts in seconds: what is less cannot be told from none. Above the first a clock is suspect, above the second wrong. */
const skewToldMs = 3_000;
const skewWrongMs = 30_000;

/** Of the identity in the state folder. */
export function checkCertificate(identity: Identity | undefined, problem: string, nowMs: number): Finding {
  const { ok, failed } = findingsOf("certificate");
  if (problem !== "") return failed(problem, "enroll the node again, with a token of ReenrollNode");
  if (identity === undefined)
    return failed("the node is not enrolled", "run `clodei-agent enroll` with a token of CreateEnrollmentToken");
  const { validFromDate: begin, validToDate: end } = identity.certificate;
  if (begin.getTime() > nowMs)
    return failed(
      `it is valid from ${begin.toISOString()} on: this machine's clock is wrong`,
      "set the clock, and keep it by NTP",
    );
  const days = Math.floor(Math.abs(end.getTime() - nowMs) / dayMs);
  if (isExpired(identity.certificate, nowMs))
    return failed(
      `it ran out on ${end.toISOString()}`,
      days < 30
        ? "start the agent: it renews the certificate by itself"
        : "more than 30 days ago: enroll the node again, with a token of ReenrollNode",
    );
  return ok(`${identity.nodeId}, valid until ${end.toISOString()}`);
}

/** The node listener: reached, believed, and this node's certificate taken. */
export async function checkNodeLink({ nodeEndpoint, key, certificate, roots }: Identity): Promise<Finding> {
  const { ok, failed } = findingsOf("node-link");
  const { promise, resolve } = Promise.withResolvers<Error | undefined>();
  const session = connect(`https://${nodeEndpoint}`, {
    minVersion: "TLSv1.3",
    rejectUnauthorized: true,
    key: key.pem,
    cert: certificate.toString(),
    ca: roots.map((root) => root.toString()),
  });
  const timer = setTimeout(() => resolve(new Error(`no connection within ${timeoutMs} ms`)), timeoutMs);
  session.once("error", resolve);
  session.once("close", () => resolve(new Error("the connection was closed: the certificate was refused")));
  // In TLS 1.3 a client hears only after its handshake that its certificate was refused: an answer tells.
  session.once("connect", () => session.ping((error) => resolve(error ?? undefined)));
  const error = await promise;
  clearTimeout(timer);
  session.destroy();
  if (error === undefined) return ok(`${nodeEndpoint} knows this node`);
  return failed(`${nodeEndpoint}: ${messageOf(error)}`, remedyFor(error));
}

/** The public listener, by its address; and the clock, by the time that it tells. */
export async function checkControlPlane({ controlPlaneUrl, roots }: Identity): Promise<Finding[]> {
  const { ok, failed } = findingsOf("control-plane");
  const clock = findingsOf("clock");
  const beganMs = Date.now();
  try {
    const told = await dateOf(controlPlaneUrl, trustedWith(roots));
    const reached = ok(`${controlPlaneUrl} answers`);
    const theirsMs = Date.parse(told ?? "");
    if (Number.isNaN(theirsMs)) return [reached, clock.skipped("the control plane tells no time")];
    // Theirs was taken somewhere between our two.
    const skewMs = theirsMs < beganMs ? theirsMs - beganMs : Math.max(0, theirsMs - Date.now());
    const seconds = Math.round(skewMs / 1000);
    const message = `${Math.abs(seconds)} s ${seconds < 0 ? "ahead of" : "behind"} the control plane`;
    const remedy = "keep the clock by NTP: `timedatectl set-ntp true`";
    if (Math.abs(skewMs) > skewWrongMs) return [reached, clock.failed(message, remedy)];
    if (Math.abs(skewMs) > skewToldMs) return [reached, clock.warning(message, remedy)];
    return [reached, clock.ok("agrees with the control plane")];
  } catch (error) {
    return [
      failed(`${controlPlaneUrl}: ${messageOf(error)}`, remedyFor(error)),
      clock.skipped("the control plane cannot be asked"),
    ];
  }
}

function dateOf(url: string, ca: readonly string[]): Promise<string | undefined> {
  const { promise, resolve, reject } = Promise.withResolvers<string | undefined>();
  const asked = request(url, { method: "HEAD", ca: [...ca], agent: false, timeout: timeoutMs }, (response) => {
    response.resume();
    resolve(response.headers.date);
  });
  asked.once("timeout", () => asked.destroy(new Error(`no answer within ${timeoutMs} ms`)));
  asked.once("error", reject);
  asked.end();
  return promise;
}

function remedyFor(error: unknown): string {
  const code = error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : "";
  switch (code) {
    case "ENOTFOUND":
    case "EAI_AGAIN":
      return "the name does not resolve: look at /etc/resolv.conf and at the name";
    case "ECONNREFUSED":
      return "nobody listens there: look at the address, and whether the control plane runs";
    case "EHOSTUNREACH":
    case "ENETUNREACH":
    case "ETIMEDOUT":
      return "there is no way there: look at routes and firewalls (outgoing TCP to that port)";
    case "CERT_HAS_EXPIRED":
    case "CERT_NOT_YET_VALID":
      return "look at this machine's clock first, then at the control plane's certificate";
    case "SELF_SIGNED_CERT_IN_CHAIN":
    case "DEPTH_ZERO_SELF_SIGNED_CERT":
    case "UNABLE_TO_VERIFY_LEAF_SIGNATURE":
    case "UNABLE_TO_GET_ISSUER_CERT_LOCALLY":
      return "somebody else answers there, or a proxy opens the connection: it must reach the control plane unopened";
    case "ERR_TLS_CERT_ALTNAME_INVALID":
      return "its certificate is for other names: use one of them, or add this one to the control plane's names";
    default:
      return "look at routes, firewalls and proxies between this node and the control plane";
  }
}
