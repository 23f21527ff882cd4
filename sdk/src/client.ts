/** The client: one connection to a control plane, and everything that can be done over it. */
import { type Client as ServiceClient, createClient as createServiceClient } from "@connectrpc/connect";
import { CatalogService } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { defaultRetryPolicy, type RetryPolicy } from "./backoff.ts";
import { CallTransport } from "./calls.ts";
import { Catalog } from "./catalog.ts";
import { authorizeBy, type CredentialOptions } from "./credentials.ts";
import { ClodeiError } from "./errors.ts";
import { Identity } from "./identity.ts";
import { Instances } from "./instances.ts";
import { Nodes } from "./nodes.ts";
import { checkOptions, optionNames } from "./request-check.ts";
import { defaultGiveUpAfterMs, type ResumePolicy } from "./resume.ts";
import { openWire } from "#transport";
import type { Wire } from "./wire.ts";

/** Options of a client. Give either apiKey or token. */
export type ClientOptions = CredentialOptions & {
  /** "https://api.example:8443". */
  readonly endpoint: string;
  /**
   * PEM of the authority that signed the server's certificate; the system's roots where absent. With npm start:
   * readFileSync(".data/ca/certificate.pem", "utf8"). Not in browsers, which trust those of their own settings.
   */
  readonly ca?: string | undefined;
  /** Milliseconds that making a connection may take, before the next try. 10,000 where absent; browsers have their own. */
  readonly connectTimeoutMs?: number | undefined;
  /** Milliseconds that a call may take, its retries included. 30,000 where absent; 0 for none. Streams have none. */
  readonly timeoutMs?: number | undefined;
  /** How calls are retried. */
  readonly retry?: Partial<RetryPolicy> | undefined;
  /** How long a watch or followed logs may be cut off before they give up, in milliseconds. 5 minutes where absent. */
  readonly giveUpAfterMs?: number | undefined;
};

/** The services as generated, method by method, with the same retries, deadlines and errors. */
export type ServiceClients = {
  readonly instances: ServiceClient<typeof InstanceService>;
  readonly catalog: ServiceClient<typeof CatalogService>;
  readonly nodes: ServiceClient<typeof NodeService>;
  readonly identity: ServiceClient<typeof IdentityService>;
  readonly enrollment: ServiceClient<typeof EnrollmentService>;
};

const clientNames = optionNames<ClientOptions>({
  endpoint: true,
  apiKey: true,
  token: true,
  organization: true,
  ca: true,
  connectTimeoutMs: true,
  timeoutMs: true,
  retry: true,
  giveUpAfterMs: true,
});

const defaultTimeoutMs = 30_000;
/** A third of a call's time: a path that swallows packets leaves two more tries. */
const defaultConnectTimeoutMs = 10_000;

/** A client. Make it with `createClient`. */
export class ClodeiClient implements Disposable {
  /** Runs containers. */
  readonly instances: Instances;
  /** What can be rented, where, and which images may run. */
  readonly catalog: Catalog;
  /** Runs the fleet, for platform operators. */
  readonly nodes: Nodes;
  /** Who is calling. */
  readonly identity: Identity;
  /** The services as generated, for what the rest has no word for. */
  readonly services: ServiceClients;
  readonly #wire: Wire;
  readonly #closer = new AbortController();

  constructor(wire: Wire, options: ClientOptions) {
    this.#wire = wire;
    const retry = { ...defaultRetryPolicy, ...options.retry };
    const timeoutMs = options.timeoutMs ?? defaultTimeoutMs;
    const closeSignal = this.#closer.signal;
    const transport = new CallTransport({ wire, authorize: authorizeBy(options), retry, timeoutMs, closeSignal });
    const resume: ResumePolicy = {
      retry,
      openWithinMs: timeoutMs > 0 ? timeoutMs : defaultTimeoutMs,
      giveUpAfterMs: options.giveUpAfterMs ?? defaultGiveUpAfterMs,
      isTransient: (error) => transport.isTransient(error),
    };
    this.services = {
      instances: createServiceClient(InstanceService, transport),
      catalog: createServiceClient(CatalogService, transport),
      nodes: createServiceClient(NodeService, transport),
      identity: createServiceClient(IdentityService, transport),
      enrollment: createServiceClient(EnrollmentService, transport),
    };
    this.instances = new Instances({ client: this.services.instances, resume });
    this.catalog = new Catalog(this.services.catalog);
    this.nodes = new Nodes(this.services.nodes, resume);
    this.identity = new Identity(this.services.identity);
  }

  /**
   * Closes the connection. Calls in progress are canceled, and new ones too. An idle client does not keep a
   * process alive, so short programs need not call it.
   *
   * @example client.close();
   */
  close(): void {
    this.#closer.abort(new ClodeiError("canceled", "CANCELED", "the client was closed"));
    this.#wire.close();
  }

  /**
   * The same as `close`.
   *
   * @example using client = createClient({ endpoint, apiKey });
   */
  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * Makes a client. Sends nothing yet; a mistyped API key is refused here and now.
 *
 * @throws ClodeiError with API_KEY_MALFORMED, CREDENTIALS_MISSING or INVALID_ARGUMENT.
 * @example
 * const client = createClient({
 *   endpoint: "https://localhost:8443",
 *   apiKey: process.env.CLODEI_API_KEY,
 *   ca: readFileSync("ca.pem", "utf8"),
 * });
 * console.log(await client.identity.whoAmI());
 */
export function createClient(options: ClientOptions): ClodeiClient {
  checkOptions(options, clientNames);
  if (options.retry !== undefined) checkOptions(options.retry, Object.keys(defaultRetryPolicy), "retry");
  const { endpoint, ca, connectTimeoutMs = defaultConnectTimeoutMs } = options;
  return new ClodeiClient(openWire({ endpoint, ca, connectTimeoutMs }), options);
}
