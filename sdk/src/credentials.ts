/** What the client shows to say who it is. */
import { parseApiKey } from "@clodei/proto/api-key";
import { ClodeiError } from "./errors.ts";

/** One of the two ways to say who is calling. */
export type CredentialOptions = {
  /** "clodei_sk_…". */
  readonly apiKey?: string | undefined;
  /**
   * Returns a token of a configured issuer. Called for every request, so it must cache. What it throws is the cause of
   * the error of the call, CREDENTIALS_MISSING.
   */
  readonly token?: (() => string | Promise<string>) | undefined;
  /** The organization in whose name a token acts, where its user belongs to several. */
  readonly organization?: string | undefined;
};

/** Writes the headers that say who is calling. */
export type Authorize = (headers: Headers) => Promise<void>;

/**
 * Checks the credentials, without sending anything.
 *
 * @throws ClodeiError with API_KEY_MALFORMED where the key is mistyped, CREDENTIALS_MISSING where there are none.
 */
export function authorizeBy(options: CredentialOptions): Authorize {
  const { apiKey, token, organization } = options;
  if (apiKey === undefined && token === undefined) {
    const message = "give an apiKey, which npm start keeps in .data/keys/organization, or a token function";
    throw new ClodeiError("unauthenticated", "CREDENTIALS_MISSING", message);
  }
  if (apiKey !== undefined && token !== undefined) {
    throw new ClodeiError("unauthenticated", "CREDENTIALS_MISSING", "give an apiKey or a token function, and not both");
  }
  if (apiKey !== undefined && parseApiKey(apiKey) === undefined) {
    const message = "the API key is mistyped or incomplete: its checksum is wrong. Nothing was sent.";
    throw new ClodeiError("unauthenticated", "API_KEY_MALFORMED", message);
  }
  return async (headers) => {
    headers.set("authorization", `Bearer ${apiKey ?? (await tokenOf(token))}`);
    if (organization !== undefined) headers.set("clodei-organization", organization);
  };
}

/** What the function throws is told as its own: a call must not say that the control plane cannot be reached. */
async function tokenOf(token: CredentialOptions["token"]): Promise<string> {
  try {
    return (await token?.()) ?? "";
  } catch (cause) {
    if (cause instanceof ClodeiError) throw cause;
    const message = `the token function failed: ${cause instanceof Error ? cause.message : String(cause)}`;
    throw new ClodeiError("unauthenticated", "CREDENTIALS_MISSING", message, { cause });
  }
}
