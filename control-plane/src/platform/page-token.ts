// Page tokens are opaque and belong to one filter: a token that came with other filters would skip or repeat
// rows in silence, so it is refused. They are no secret and grant nothing: the query behind them is the caller's.
import { createHash } from "node:crypto";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { DomainError } from "./errors.ts";

const version = 1;
const maxTokenLength = 512;

/** A digest of what a list was filtered by. Give every field that changes which rows are listed. */
export function filterHash(filter: unknown): string {
  return createHash("sha256")
    .update(JSON.stringify(filter, (_, value: unknown) => (typeof value === "bigint" ? `${value}n` : value)))
    .digest("base64url")
    .slice(0, 16);
}

/** Makes the token of a position: the sort keys of the last row of a page. */
export function encodePageToken(hash: string, position: readonly string[]): string {
  return Buffer.from(JSON.stringify([version, hash, ...position])).toString("base64url");
}

/**
 * Reads a token. The empty token means the first page: undefined.
 * @throws DomainError PAGE_TOKEN_INVALID for one that is not ours, or belongs to other filters.
 */
export function decodePageToken(token: string, hash: string): readonly string[] | undefined {
  if (token === "") return undefined;
  const [tokenVersion, tokenHash, ...position] = parse(token);
  if (tokenVersion !== version || tokenHash !== hash || !position.every(isPart)) {
    throw new DomainError(
      ErrorReason.PAGE_TOKEN_INVALID,
      "page_token is not the next_page_token of a page with the same filters",
    );
  }
  return position;
}

/** A made-up part must not become an error of ours: PostgreSQL holds no NUL. */
function isPart(part: unknown): part is string {
  return typeof part === "string" && !part.includes("\0") && part.isWellFormed();
}

function parse(token: string): unknown[] {
  if (token.length > maxTokenLength) return [];
  try {
    const parsed: unknown = JSON.parse(Buffer.from(token, "base64url").toString("utf8"));
    return Array.isArray(parsed) ? parsed : [];
  } catch {
    return [];
  }
}

/** A page of what was found, of which one more than its size was asked for, and the token of the next. */
export function pageOf<T>(
  found: readonly T[],
  size: number,
  hash: string,
  positionOf: (last: T) => readonly string[],
): { readonly page: readonly T[]; readonly nextPageToken: string } {
  const page = found.slice(0, size);
  const last = page.at(-1);
  const isCut = found.length > size && last !== undefined;
  return { page, nextPageToken: isCut ? encodePageToken(hash, positionOf(last)) : "" };
}

/** How many rows a page has: 0 asks for the default. */
export function pageSizeOf(requested: number): number {
  return requested === 0 ? defaultPageSize : Math.min(requested, maxPageSize);
}

const defaultPageSize = 50;
const maxPageSize = 500;
