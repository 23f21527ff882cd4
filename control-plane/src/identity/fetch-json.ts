// Fetching from an issuer, bounded: no redirect is followed (it could lead anywhere), a body ends at a size, and
// everything ends at a time. TLS is verified by Node's own rules; NODE_EXTRA_CA_CERTS adds a private CA.

/** An issuer answers with keys or with a user: a few kilobytes. */
const maxBodyBytes = 256 * 1024;
const timeoutMs = 5_000;

/** An answer, whatever its status. */
export type BoundedAnswer = { readonly status: number; readonly body: string };

/**
 * Fetches a small text.
 *
 * @throws Error where there is no answer in time, or one that is too long.
 */
export async function fetchBounded(url: URL, headers: Readonly<Record<string, string>>): Promise<BoundedAnswer> {
  const response = await fetch(url, { headers, redirect: "manual", signal: AbortSignal.timeout(timeoutMs) });
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    bytes += chunk.byteLength;
    // Leaving the loop cancels the body.
    if (bytes > maxBodyBytes) throw new Error(`the answer of ${url.host} is longer than ${maxBodyBytes} bytes`);
    chunks.push(chunk);
  }
  return { status: response.status, body: Buffer.concat(chunks).toString("utf8") };
}
