// The script of the test's page: the SDK as a page uses it. Bundled for browsers; the test calls it there.
import { ClodeiError, createClient, type Instance, type InstanceState } from "@clodei/sdk";
import { showInstances } from "../../sdk/examples/browser.ts";

/** What an error of the SDK says, as far as it can leave the page. */
export type ToldError = Pick<ClodeiError, "code" | "reason" | "message" | "fieldViolations" | "requestId">;

/** Who asks. */
export type Asker = {
  readonly endpoint: string;
  readonly token?: string;
  readonly apiKey?: string;
  readonly ca?: string;
};

const clientOf = ({ endpoint, token, apiKey, ca }: Asker) =>
  createClient({
    endpoint,
    ca,
    ...(apiKey === undefined ? { token: () => token ?? "" } : { apiKey }),
    retry: { maxAttempts: 1 },
  });

async function told<T>(work: () => Promise<T>): Promise<T | ToldError> {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof ClodeiError)) throw error;
    const { code, reason, message, fieldViolations, requestId } = error;
    return { code, reason, message, fieldViolations, requestId };
  }
}

const watching = new AbortController();
const page = {
  /** What a watch told, in its order. */
  shown: [] as { readonly id: string; readonly state: InstanceState; readonly version: number }[],
  /** What ended the watch. */
  watchEnded: undefined as ToldError | undefined,

  list: (asker: Asker) =>
    told(async () => {
      using client = clientOf(asker);
      const instances = await client.instances.list().toArray();
      const { organizationName, credential } = await client.identity.whoAmI();
      return { organizationName, credential, ids: instances.map(({ id }) => id) };
    }),

  /** Asks for a larger page than there is: the server's answer names the field. */
  listTooMany: (asker: Asker) =>
    told(async () => {
      using client = clientOf(asker);
      return await client.services.instances.listInstances({ pageSize: 501 });
    }),

  watch({ endpoint, token = "" }: Asker): void {
    const show = ({ id, state, version }: Instance): void => {
      page.shown.push({ id, state, version: Number(version) });
    };
    const ended = showInstances(endpoint, () => Promise.resolve(token), show, watching.signal);
    void told(() => ended).then((error) => (page.watchEnded = error ?? undefined));
  },

  stopWatching: (): void => watching.abort(),
};

declare global {
  /** In the page alone. */
  var clodeiPage: typeof page;
}
globalThis.clodeiPage = page;
