/** `client.catalog`. */
import type { Client } from "@connectrpc/connect";
import type { CatalogService, ImagePolicy, Offer } from "@clodei/proto/gen/clodei/v1/catalog_service";
import type { Location } from "@clodei/proto/gen/clodei/v1/location";
import { callOptions } from "./calls.ts";
import { listNames, type ListOptions, Paginated } from "./pagination.ts";
import { optionNames } from "./request-check.ts";
import type { LocationConstraint } from "./spec.ts";

/** Options of a list of offers. */
export type ListOffersOptions = ListOptions & {
  /** Offers of this model only. */
  readonly gpuModel?: string | undefined;
  /** Offers in this location only. */
  readonly location?: LocationConstraint | undefined;
};

const offerNames = [
  ...listNames,
  ...optionNames<Omit<ListOffersOptions, keyof ListOptions>>({ gpuModel: true, location: true }),
];

/** What can be rented, where, and which images may run. */
export class Catalog {
  readonly #client: Client<typeof CatalogService>;

  constructor(client: Client<typeof CatalogService>) {
    this.#client = client;
  }

  /**
   * GPU models by memory and location, with their availability.
   *
   * @example
   * for await (const offer of client.catalog.offers({ location: { country: "ES" } })) {
   *   console.log(offer.gpuModel, offer.location?.datacenter);
   * }
   */
  offers(options: ListOffersOptions = {}): Paginated<Offer> {
    const { gpuModel = "", location } = options;
    const filter = { gpuModel, location };
    return new Paginated(async (pageToken) => {
      const request = { pageSize: options.pageSize ?? 0, pageToken, ...filter };
      const { offers, nextPageToken } = await this.#client.listOffers(request, callOptions(options, offerNames));
      return { items: offers, nextPageToken };
    }, options.pageToken);
  }

  /**
   * The locations that have nodes.
   *
   * @example for await (const location of client.catalog.locations()) console.log(location.country);
   */
  locations(options: ListOptions = {}): Paginated<Location> {
    return new Paginated(async (pageToken) => {
      const request = { pageSize: options.pageSize ?? 0, pageToken };
      const { locations, nextPageToken } = await this.#client.listLocations(request, callOptions(options, listNames));
      return { items: locations, nextPageToken };
    }, options.pageToken);
  }

  /**
   * Which images may run.
   *
   * @example for await (const policy of client.catalog.imagePolicies()) console.log(policy.prefix);
   */
  imagePolicies(options: ListOptions = {}): Paginated<ImagePolicy> {
    return new Paginated(async (pageToken) => {
      const request = { pageSize: options.pageSize ?? 0, pageToken };
      const { imagePolicies, nextPageToken } = await this.#client.listImagePolicies(
        request,
        callOptions(options, listNames),
      );
      return { items: imagePolicies, nextPageToken };
    }, options.pageToken);
  }
}
