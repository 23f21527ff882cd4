// What can be rented, where, and which images may run. Offers are of the whole fleet, which no tenant's login sees:
// they are made in a system transaction, and only what customers may know leaves it.
import { normalizeAllowlistEntry } from "@clodei/proto/image-reference";
import type { PlacementService } from "../placement/service.ts";
import type { Location } from "../placement/service.ts";
import type { SystemTx } from "../platform/database.ts";
import { listLocations, listOffers, type Offer, type OfferFilter } from "./model.ts";

/** An entry of the image allowlist. */
export type ImagePolicy = { readonly prefix: string; readonly normalizedPrefix: string };

/** The catalog. */
export class CatalogService {
  readonly #placement: Pick<PlacementService, "readFleet">;
  readonly #imagePolicies: readonly ImagePolicy[];

  constructor(options: {
    readonly placement: Pick<PlacementService, "readFleet">;
    readonly imageAllowlist: readonly string[];
  }) {
    this.#placement = options.placement;
    this.#imagePolicies = options.imageAllowlist.map((prefix) => ({
      prefix,
      normalizedPrefix: normalizeAllowlistEntry(prefix),
    }));
  }

  /** Offers by model, memory and location. */
  async offers(tx: SystemTx, filter: OfferFilter): Promise<Offer[]> {
    return listOffers(await this.#placement.readFleet(tx), filter);
  }

  /** Locations that have nodes. */
  async locations(tx: SystemTx): Promise<Location[]> {
    return listLocations(await this.#placement.readFleet(tx));
  }

  /** Which images may run. */
  imagePolicies(): readonly ImagePolicy[] {
    return this.#imagePolicies;
  }
}
