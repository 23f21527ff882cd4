// CatalogService as the contract has it.
import { create } from "@bufbuild/protobuf";
import type { ServiceImpl } from "@connectrpc/connect";
import {
  Availability,
  type CatalogService as CatalogServiceDescriptor,
  ListImagePoliciesResponseSchema,
  ListLocationsResponseSchema,
  ListOffersResponseSchema,
} from "@clodei/proto/gen/clodei/v1/catalog_service";
import { decodePageToken, filterHash, pageOf, pageSizeOf } from "../platform/page-token.ts";
import { locationKey, offerKey, type Availability as OfferAvailability } from "./model.ts";
import type { CatalogService } from "./service.ts";

/** The handlers of CatalogService. */
export function catalogHandlers({
  catalog,
}: {
  readonly catalog: CatalogService;
}): ServiceImpl<typeof CatalogServiceDescriptor> {
  return {
    async listOffers(request) {
      const { country, region, datacenter } = request.location ?? {};
      const filter = { gpuModel: request.gpuModel, location: { country, region, datacenter } };
      const all = await catalog.offers(filter);
      const { page, nextPageToken } = paginate(all, offerKey, request, filterHash(["offers", filter]));
      const offers = page.map((offer) => ({ ...offer, availability: availabilities[offer.availability] }));
      return create(ListOffersResponseSchema, { offers, nextPageToken });
    },
    async listLocations(request) {
      const all = await catalog.locations();
      const { page, nextPageToken } = paginate(all, locationKey, request, filterHash(["locations"]));
      return create(ListLocationsResponseSchema, {
        locations: page.map((location) => ({ ...location })),
        nextPageToken,
      });
    },
    listImagePolicies(request) {
      const all = catalog.imagePolicies().toSorted((a, b) => (a.prefix < b.prefix ? -1 : 1));
      const { page, nextPageToken } = paginate(all, ({ prefix }) => prefix, request, filterHash(["image-policies"]));
      const imagePolicies = page.map((policy) => ({ ...policy }));
      return create(ListImagePoliciesResponseSchema, { imagePolicies, nextPageToken });
    },
  };
}

const availabilities: Readonly<Record<OfferAvailability, Availability>> = {
  none: Availability.NONE,
  low: Availability.LOW,
  available: Availability.AVAILABLE,
};

/** Cuts a page out of a short sorted list: what stands after the key that the token names. */
function paginate<T>(
  all: readonly T[],
  keyOf: (item: T) => string,
  request: { readonly pageSize: number; readonly pageToken: string },
  hash: string,
): { readonly page: readonly T[]; readonly nextPageToken: string } {
  const [after] = decodePageToken(request.pageToken, hash) ?? [];
  const rest = after === undefined ? all : all.filter((item) => keyOf(item) > after);
  return pageOf(rest, pageSizeOf(request.pageSize), hash, (last) => [keyOf(last)]);
}
