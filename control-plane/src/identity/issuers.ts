// Which issuers' tokens are accepted, as the configuration says it. What is unsafe is refused here, at start and by
// name: plain http off this machine, and a claim that users can edit as the proof of their e-mail address.
import { isIP } from "node:net";

/** An issuer whose tokens are accepted. */
export type JwtIssuer = {
  /** The claim `iss`, byte by byte. */
  readonly issuer: string;
  /** One of these must be in the claim `aud`. */
  readonly audiences: readonly string[];
  /** Where its public keys are. */
  readonly jwksUrl: URL;
  /** The path of the claim that says true when the e-mail address is verified. */
  readonly emailVerifiedClaim: readonly string[] | undefined;
  /** Where to ask instead, with the token as bearer: answers with the user. */
  readonly userEndpoint: UserEndpoint | undefined;
};

/** An issuer's user endpoint. */
export type UserEndpoint = {
  readonly url: URL;
  /** Headers that it wants besides, for example Supabase's `apikey`. */
  readonly headers: Readonly<Record<string, string>>;
};

/** More would not be a configuration, and each costs memory for its keys. */
const maxIssuers = 16;
const maxUrlCharacters = 2048;

/** What users of the issuers that we know of may write themselves. */
const claimsOfUsers: ReadonlySet<string> = new Set(["user_metadata", "raw_user_meta_data", "unsafe_metadata"]);

/**
 * Reads the issuers from JSON:
 *
 * ```json
 * [{ "issuer": "https://id.example/auth/v1", "audience": "authenticated",
 *    "jwksUrl": "https://id.example/auth/v1/.well-known/jwks.json",
 *    "userEndpoint": "https://id.example/auth/v1/user", "userEndpointHeaders": { "apikey": "…" } }]
 * ```
 *
 * `audience` is a text or a list. `jwksUrl` is ISSUER/.well-known/jwks.json where absent. `emailVerifiedClaim` is a
 * path with dots ("email_verified", "app_metadata.email_verified") and goes before `userEndpoint`; with neither,
 * nobody's address counts as verified.
 *
 * @throws Error that names the entry, the field, and what is allowed.
 */
export function parseJwtIssuers(json: string): JwtIssuer[] {
  let parsed: unknown;
  try {
    parsed = JSON.parse(json);
  } catch {
    throw new Error("the token issuers are no JSON: give a list of objects, or leave the setting out");
  }
  if (!Array.isArray(parsed)) throw new Error("the token issuers must be a JSON list of objects");
  if (parsed.length > maxIssuers) throw new Error(`at most ${maxIssuers} token issuers are allowed`);
  const issuers = parsed.map((entry: unknown, index) => readIssuer(entry, `token issuer ${index + 1}`));
  const names = new Set(issuers.map(({ issuer }) => issuer));
  if (names.size !== issuers.length) throw new Error("a token issuer is named twice");
  return issuers;
}

const knownFields: ReadonlySet<string> = new Set([
  "issuer",
  "audience",
  "jwksUrl",
  "emailVerifiedClaim",
  "userEndpoint",
  "userEndpointHeaders",
]);

function readIssuer(entry: unknown, where: string): JwtIssuer {
  if (!isRecord(entry)) throw new Error(`${where} must be an object`);
  const unknown = Object.keys(entry).find((field) => !knownFields.has(field));
  if (unknown !== undefined) {
    throw new Error(
      `${where} has the unknown field ${JSON.stringify(unknown)}: known are ${[...knownFields].join(", ")}`,
    );
  }
  const issuer = entry["issuer"];
  if (typeof issuer !== "string" || issuer === "") throw new Error(`${where}: issuer must be the claim "iss"`);
  checkUrl(issuer, `${where}: issuer`);
  const jwksUrl = entry["jwksUrl"] ?? `${issuer.replace(/\/$/, "")}/.well-known/jwks.json`;
  const endpoint = entry["userEndpoint"];
  return {
    issuer,
    audiences: readAudiences(entry["audience"], where),
    jwksUrl: checkUrl(jwksUrl, `${where}: jwksUrl`),
    emailVerifiedClaim: readClaimPath(entry["emailVerifiedClaim"], where),
    userEndpoint:
      endpoint === undefined
        ? undefined
        : {
            url: checkUrl(endpoint, `${where}: userEndpoint`),
            headers: readHeaders(entry["userEndpointHeaders"], where),
          },
  };
}

function readAudiences(value: unknown, where: string): string[] {
  const audiences: unknown[] = Array.isArray(value) ? value : [value];
  const texts = audiences.filter((item) => typeof item === "string" && item !== "");
  if (texts.length === 0 || texts.length !== audiences.length) {
    // Without it a token that the issuer made for another service would open this one.
    throw new Error(`${where}: audience must be a text or a list of texts, for example "authenticated"`);
  }
  return texts.map(String);
}

function readClaimPath(value: unknown, where: string): string[] | undefined {
  if (value === undefined) return undefined;
  if (typeof value !== "string" || value === "")
    throw new Error(`${where}: emailVerifiedClaim must be a path with dots`);
  const path = value.split(".");
  const editable = path.find((part) => claimsOfUsers.has(part));
  if (editable !== undefined) {
    throw new Error(`${where}: emailVerifiedClaim must not be in ${editable}, which users edit themselves`);
  }
  return path;
}

function readHeaders(value: unknown, where: string): Record<string, string> {
  if (value === undefined) return {};
  if (!isRecord(value)) throw new Error(`${where}: userEndpointHeaders must be an object of texts`);
  const headers: Record<string, string> = {};
  for (const [name, text] of Object.entries(value)) {
    if (typeof text !== "string" || name.toLowerCase() === "authorization") {
      throw new Error(`${where}: userEndpointHeaders must be an object of texts, without authorization`);
    }
    headers[name] = text;
  }
  return headers;
}

/** https with a verified certificate; http on this machine alone, for tests and an issuer of our own. */
function checkUrl(value: unknown, what: string): URL {
  if (typeof value !== "string" || value.length > maxUrlCharacters || !URL.canParse(value)) {
    throw new Error(`${what} must be a URL`);
  }
  const url = new URL(value);
  if (url.protocol !== "https:" && !(url.protocol === "http:" && isLoopback(url.hostname))) {
    throw new Error(`${what} must be https (http is for loopback only)`);
  }
  if (url.username !== "" || url.password !== "") throw new Error(`${what} must hold no credentials`);
  return url;
}

function isLoopback(hostname: string): boolean {
  const host = hostname.replace(/^\[|\]$/g, "");
  if (isIP(host) === 4) return host.startsWith("127.");
  return host === "::1" || host === "localhost";
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
