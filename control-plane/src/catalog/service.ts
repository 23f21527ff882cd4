// What can be rented, where, and which images may run. Offers are of the whole fleet, which no tenant's login sees:
// they are made in a system transaction, and only what customers may know leaves it. All callers share one look at the
// fleet, because each reads every inventory.
import { normalizeAllowlistEntry } from "@clodei/proto/image-reference";
import type { Location, PlacementService } from "../placement/service.ts";
import type { Database } from "../platform/database.ts";
import { filterOffers, listLocations, listOffers, type Offer, type OfferFilter } from "./model.ts";

/** An entry of the image allowlist. */
export type ImagePolicy = { readonly prefix: string; readonly normalizedPrefix: string };

/** What the catalog is made of. */
export type CatalogOptions = {
  readonly database: Database;
  readonly placement: Pick<PlacementService, "readFleet">;
  readonly imageAllowlist: readonly string[];
  /** How old what callers share may be. */
  readonly maxAgeMs: number;
};

/** What one look at the fleet showed. */
type Snapshot = { readonly offers: readonly Offer[]; readonly locations: readonly Location[] };

/** The catalog. */
export class CatalogService {
  readonly #options: CatalogOptions;
  readonly #imagePolicies: readonly ImagePolicy[];
  /** The last look, or the one that is under way. */
  #shared: Promise<Snapshot> | undefined;

  constructor(options: CatalogOptions) {
    this.#options = options;
    this.#imagePolicies = options.imageAllowlist.map((prefix) => ({
      prefix,
      normalizedPrefix: normalizeAllowlistEntry(prefix),
    }));
  }

  /** Offers by model, memory and location. */
  async offers(filter: OfferFilter): Promise<Offer[]> {
    return filterOffers((await this.#snapshot()).offers, filter);
  }

  /** Locations that have nodes. */
  async locations(): Promise<readonly Location[]> {
    return (await this.#snapshot()).locations;
  }

  /** Which images may run. */
  imagePolicies(): readonly ImagePolicy[] {
    return this.#imagePolicies;
  }

  /** One look at a time, however many ask. It is forgotten by its age, or at once where it failed. */
  #snapshot(): Promise<Snapshot> {
    if (this.#shared !== undefined) return this.#shared;
    const forget = (): void => {
      this.#shared = undefined;
    };
    const look = this.#look();
    this.#shared = look;
    look.then(() => setTimeout(forget, this.#options.maxAgeMs).unref(), forget);
    return look;
  }

  async #look(): Promise<Snapshot> {
    const { database, placement } = this.#options;
    const fleet = await database.system((tx) => placement.readFleet(tx));
    return { offers: listOffers(fleet), locations: listLocations(fleet) };
  }
}
