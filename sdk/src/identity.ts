/** `client.identity`. */
import type { Client } from "@connectrpc/connect";
import type { IdentityService, WhoAmIResponse } from "@clodei/proto/gen/clodei/v1/identity_service";
import { callOptions, type CallOptions } from "./calls.ts";

/** Who is calling. */
export class Identity {
  readonly #client: Client<typeof IdentityService>;

  constructor(client: Client<typeof IdentityService>) {
    this.#client = client;
  }

  /**
   * Says whom the server takes the caller for: the quickest way to see that endpoint and credentials are right.
   *
   * @example console.log((await client.identity.whoAmI()).organizationName);
   */
  async whoAmI(options: CallOptions = {}): Promise<WhoAmIResponse> {
    return await this.#client.whoAmI({}, callOptions(options));
  }
}
