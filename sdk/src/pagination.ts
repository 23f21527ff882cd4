/** Lists, read page by page as they are needed. */
import { callNames, type CallOptions } from "./calls.ts";
import { optionNames } from "./request-check.ts";

/** A page of a list. */
export type Page<T> = {
  readonly items: readonly T[];
  /** Gives the next page; empty on the last. Good across processes, for the same filter. */
  readonly nextPageToken: string;
};

/** Options of a list. */
export type ListOptions = CallOptions & {
  /** Items in a page, 1 to 500; 50 where absent. */
  readonly pageSize?: number | undefined;
  /** Begins at the page that this token gives, instead of the first. */
  readonly pageToken?: string | undefined;
};

/** The options of every list. */
export const listNames = [
  ...callNames,
  ...optionNames<Omit<ListOptions, keyof CallOptions>>({ pageSize: true, pageToken: true }),
];

/** Fetches one page. */
export type FetchPage<T> = (pageToken: string) => Promise<Page<T>>;

/**
 * A list. Iterating over it yields every item, and fetches a page when the one before is used up.
 *
 * @example
 * for await (const node of client.nodes.list()) console.log(node.name);
 * for await (const page of client.nodes.list({ pageSize: 100 }).pages()) console.log(page.items.length);
 * const all = await client.nodes.list().toArray();
 */
export class Paginated<T> implements AsyncIterable<T> {
  readonly #fetchPage: FetchPage<T>;
  readonly #firstToken: string;

  constructor(fetchPage: FetchPage<T>, firstToken = "") {
    this.#fetchPage = fetchPage;
    this.#firstToken = firstToken;
  }

  /**
   * The pages, one at a time.
   *
   * @example for await (const page of client.instances.list().pages()) console.log(page.items.length);
   */
  async *pages(): AsyncGenerator<Page<T>, void, undefined> {
    for (let pageToken = this.#firstToken; ;) {
      const page = await this.#fetchPage(pageToken);
      yield page;
      if (page.nextPageToken === "") return;
      pageToken = page.nextPageToken;
    }
  }

  /** The items of all pages. */
  async *[Symbol.asyncIterator](): AsyncGenerator<T, void, undefined> {
    for await (const page of this.pages()) yield* page.items;
  }

  /**
   * The items of all pages in an array: for lists that are known to be short.
   *
   * @example const locations = await client.catalog.locations().toArray();
   */
  async toArray(): Promise<T[]> {
    const items: T[] = [];
    for await (const item of this) items.push(item);
    return items;
  }
}
