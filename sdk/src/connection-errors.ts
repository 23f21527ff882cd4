/** Why no connection came about, in words that say what to do. The codes are those of Node and OpenSSL. */

/** How a connection was to be made. */
export type ConnectionAttempt = {
  /** "https://api.example:8443". */
  readonly origin: string;
  readonly hasCa: boolean;
};

const untrustedCodes: ReadonlySet<string> = new Set([
  "DEPTH_ZERO_SELF_SIGNED_CERT",
  "SELF_SIGNED_CERT_IN_CHAIN",
  "UNABLE_TO_GET_ISSUER_CERT",
  "UNABLE_TO_GET_ISSUER_CERT_LOCALLY",
  "UNABLE_TO_VERIFY_LEAF_SIGNATURE",
  "CERT_SIGNATURE_FAILURE",
]);

/** What stands behind an error's code; undefined where the code does not tell. */
export function explainConnectionError(code: string, { origin, hasCa }: ConnectionAttempt): string | undefined {
  if (untrustedCodes.has(code)) return `${explainUntrusted(origin, hasCa)} (${code})`;
  switch (code) {
    case "ERR_TLS_CERT_ALTNAME_INVALID":
      return `the certificate at ${origin} is for another host name: name the host in endpoint as its operator does ("https://localhost:8443" with npm start)`;
    case "CERT_HAS_EXPIRED":
    case "CERT_NOT_YET_VALID":
      return `the certificate at ${origin} is not valid now: is the clock of this machine right? (${code})`;
    case "ERR_SSL_WRONG_VERSION_NUMBER":
    case "ERR_SSL_PACKET_LENGTH_TOO_LONG":
    case "EPROTO":
      return `what listens at ${origin} does not speak TLS: is it the port of the public API? (${code})`;
    case "ECONNREFUSED":
      return `nothing listens at ${origin}: does the control plane run, and is this its port? npm start prints it as "public API" (${code})`;
    case "ENOTFOUND":
      return `${origin} names a host that does not exist: look at endpoint (${code})`;
    default:
      return undefined;
  }
}

function explainUntrusted(origin: string, hasCa: boolean): string {
  const file = `npm start prints its file as "CA" (.data/ca/certificate.pem)`;
  return hasCa
    ? `the certificate at ${origin} was not signed by the authority in ca: give that of this control plane; ${file}, and a new data folder has a new one`
    : `the certificate at ${origin} was signed by an authority that this machine does not know: give it to createClient as ca: readFileSync(FILE, "utf8"); ${file}`;
}
