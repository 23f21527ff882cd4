import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { createRouterTransport, createClient, type Interceptor } from "@connectrpc/connect";
import { Availability, CatalogService as CatalogServiceDescriptor } from "@clodei/proto/gen/clodei/v1/catalog_service";
import { newId } from "@clodei/proto/ids";
import { defaultImageAllowlist } from "@clodei/proto/image-reference";
import type { FleetGpu, FleetNode } from "../placement/service.ts";
import { startTestDatabase, type TestDatabase } from "../platform/test-database.ts";
import { toConnectError } from "../rpc/errors.ts";
import { catalogHandlers } from "./handlers.ts";
import { CatalogService } from "./service.ts";

let db: TestDatabase;
before(async () => {
  db = await startTestDatabase();
});
after(() => db[Symbol.asyncDispose]());

const mapErrors: Interceptor = (next) => async (request) => {
  try {
    return await next(request);
  } catch (error) {
    throw toConnectError(error, "");
  }
};

function gpus(count: number, allocated: number, fields: Partial<FleetGpu> = {}): FleetGpu[] {
  return Array.from({ length: count }, (_, index) => ({
    uuid: `${newId("nod")}-${index}`,
    model: "H100-SXM",
    memoryMib: 81_559,
    simulated: false,
    index,
    usable: true,
    unhealthy: false,
    allocated: index < allocated,
    ...fields,
  }));
}

function node(country: string, list: FleetGpu[], fields: Partial<FleetNode> = {}): FleetNode {
  return {
    id: newId("nod"),
    location: { country, region: "r", datacenter: "d", tier: 4 },
    obstacle: undefined,
    cpuMillis: 1000,
    memoryMib: 1000,
    freeCpuMillis: 1000,
    freeMemoryMib: 1000,
    gpus: list,
    ...fields,
  };
}

function client(fleet: FleetNode[], readFleet = () => Promise.resolve(fleet)) {
  const catalog = new CatalogService({
    database: db.database,
    placement: { readFleet },
    imageAllowlist: defaultImageAllowlist,
    maxAgeMs: 200,
  });
  const handlers = catalogHandlers({ catalog });
  return createClient(
    CatalogServiceDescriptor,
    createRouterTransport((router) => router.service(CatalogServiceDescriptor, handlers), {
      router: { interceptors: [mapErrors] },
    }),
  );
}

describe("offers", () => {
  it("tell none, low and available for each model, memory and location", async () => {
    const { offers } = await client([
      node("ES", gpus(8, 8)),
      node("FR", gpus(8, 6)),
      node("FR", gpus(4, 0, { model: "L40S", memoryMib: 46_068, simulated: true })),
      node("PT", gpus(8, 0), { obstacle: "cordoned" }),
    ]).listOffers({});
    assert.deepEqual(
      offers.map((offer) => [offer.gpuModel, offer.location?.country, offer.availability, offer.simulated]),
      [
        ["H100-SXM", "ES", Availability.NONE, false],
        ["H100-SXM", "FR", Availability.LOW, false],
        ["H100-SXM", "PT", Availability.NONE, false],
        ["L40S", "FR", Availability.AVAILABLE, true],
      ],
    );
  });

  it("leave out GPUs that cannot be placed on, and obey the filter", async () => {
    const fleet = [node("ES", gpus(1, 0)), node("FR", [...gpus(2, 0), ...gpus(1, 0, { usable: false, model: "" })])];
    const { offers } = await client(fleet).listOffers({ gpuModel: "H100-SXM", location: { country: "FR" } });
    assert.equal(offers.length, 1);
    assert.equal((await client(fleet).listOffers({ gpuModel: "B200" })).offers.length, 0);
  });

  it("come in pages whose tokens belong to their filter", async () => {
    const fleet = ["AT", "BE", "CZ", "DE", "ES"].map((country) => node(country, gpus(1, 0)));
    const catalog = client(fleet);
    const countries: (string | undefined)[] = [];
    let pageToken = "";
    do {
      const page = await catalog.listOffers({ pageSize: 2, pageToken });
      countries.push(...page.offers.map((offer) => offer.location?.country));
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
    assert.deepEqual(countries, ["AT", "BE", "CZ", "DE", "ES"]);
    const { nextPageToken } = await catalog.listOffers({ pageSize: 2 });
    await assert.rejects(catalog.listOffers({ gpuModel: "L40S", pageToken: nextPageToken }), /page_token/);
  });
});

describe("a look at the fleet", () => {
  it("is shared by all who ask, is made anew when it is old, and a failed one is nobody's after it", async () => {
    const fleet = [node("ES", gpus(1, 0))];
    let looks = 0;
    let failure: Error | undefined;
    const catalog = client(fleet, () => {
      looks += 1;
      return failure === undefined ? Promise.resolve([...fleet]) : Promise.reject(failure);
    });
    const ask = async () => (await catalog.listOffers({})).offers.length;
    assert.deepEqual(new Set(await Promise.all(Array.from({ length: 100 }, ask))), new Set([1]));
    assert.equal((await catalog.listLocations({})).locations.length, 1);
    assert.equal(looks, 1);
    fleet.push(node("FR", gpus(1, 0)));
    while ((await ask()) !== 2) await sleep(20);
    assert.equal(looks, 2);
    failure = new Error("the database is away");
    const fails = () =>
      ask().then(
        () => false,
        () => true,
      );
    while (!(await fails())) await sleep(20);
    failure = undefined;
    assert.equal(await ask(), 2);
  });
});

describe("locations and image policies", () => {
  it("name each location once, and each entry of the allowlist with what it means", async () => {
    const catalog = client([node("FR", []), node("ES", []), node("ES", [])]);
    const { locations } = await catalog.listLocations({});
    assert.deepEqual(
      locations.map(({ country, tier }) => [country, tier]),
      [
        ["ES", 4],
        ["FR", 4],
      ],
    );
    const { imagePolicies } = await catalog.listImagePolicies({});
    assert.equal(imagePolicies.length, defaultImageAllowlist.length);
    assert.ok(
      imagePolicies.some((policy) => policy.prefix === "pytorch/" && policy.normalizedPrefix === "docker.io/pytorch/"),
    );
  });
});
