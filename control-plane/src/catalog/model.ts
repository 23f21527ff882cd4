// Offers out of the fleet, as pure functions. An offer says whether GPUs are free and never how many: a count that
// goes up and down would tell one tenant about the others.
import { type FleetNode, isInLocation, type Location, type LocationConstraint } from "../placement/service.ts";

/** Whether GPUs of an offer are free: none, at most a quarter of them, or more. */
export type Availability = "none" | "low" | "available";

/** A GPU model at a location. */
export type Offer = {
  readonly gpuModel: string;
  readonly gpuMemoryMib: number;
  readonly location: Location;
  readonly simulated: boolean;
  readonly availability: Availability;
};

/** Which offers are meant. */
export type OfferFilter = {
  /** Empty: all. */
  readonly gpuModel: string;
  readonly location: LocationConstraint;
};

/** Below this share of free GPUs an offer is low. */
const lowShare = 0.25;

/** The fleet's offers, by model, memory and location. GPUs that cannot be placed on are no offer. */
export function listOffers(fleet: readonly FleetNode[]): Offer[] {
  const gpus = fleet.flatMap((node) =>
    node.gpus
      .filter((gpu) => gpu.usable)
      .map((gpu) => ({ gpu, location: node.location, isFree: node.obstacle === undefined && !gpu.allocated })),
  );
  const groups = Map.groupBy(gpus, ({ gpu, location }) =>
    JSON.stringify([gpu.model, gpu.memoryMib, locationKey(location), gpu.simulated]),
  );
  return [...groups.values()]
    .flatMap((group) => {
      const [first] = group;
      if (first === undefined) return [];
      const free = group.filter(({ isFree }) => isFree).length;
      const { gpu, location } = first;
      const { model: gpuModel, memoryMib: gpuMemoryMib, simulated } = gpu;
      return [{ gpuModel, gpuMemoryMib, location, simulated, availability: availabilityOf(free, group.length) }];
    })
    .toSorted((a, b) => compareText(offerKey(a), offerKey(b)));
}

/** Those of the offers that are meant. */
export function filterOffers(offers: readonly Offer[], filter: OfferFilter): Offer[] {
  return offers.filter(
    ({ gpuModel, location }) =>
      (filter.gpuModel === "" || gpuModel === filter.gpuModel) && isInLocation(filter.location, location),
  );
}

/** The fleet's locations, by country, region and datacenter. */
export function listLocations(fleet: readonly FleetNode[]): Location[] {
  const locations = new Map(fleet.map(({ location }) => [locationKey(location), location]));
  return [...locations.values()].toSorted((a, b) => compareText(locationKey(a), locationKey(b)));
}

/** Sorts offers, and tells them apart. */
export function offerKey(offer: Offer): string {
  const memory = String(offer.gpuMemoryMib).padStart(10, "0");
  return [offer.gpuModel, memory, locationKey(offer.location), offer.simulated ? "1" : "0"].join("\n");
}

/** Sorts locations, and tells them apart. */
export function locationKey({ country, region, datacenter, tier }: Location): string {
  return [country, region, datacenter, tier].join("\n");
}

function availabilityOf(free: number, total: number): Availability {
  if (free === 0) return "none";
  return free / total <= lowShare ? "low" : "available";
}

function compareText(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
