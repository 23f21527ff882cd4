import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { CatalogService } from "@clodei/proto/gen/clodei/v1/catalog_service";
import {
  type CreateEnrollmentTokenRequest,
  NodeService,
  NodeState,
  WatchNodesResponseSchema,
} from "@clodei/proto/gen/clodei/v1/node_service";
import { newId } from "@clodei/proto/ids";
import { ClodeiError } from "./errors.ts";
import { startServerForClientTests } from "./server-for-client-tests.ts";

const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };

test("an enrollment token comes with what the server keeps of it", async () => {
  const id = newId("ent");
  await using server = await startServerForClientTests(
    (router) =>
      void router.service(NodeService, {
        createEnrollmentToken: () => ({ token: "CLDT-1-x", enrollmentToken: { id, location } }),
      }),
  );
  const { token, enrollmentToken } = await server
    .client()
    .nodes.createEnrollmentToken({ location, lifetimeSeconds: 600 });
  assert.deepEqual([token, enrollmentToken.id], ["CLDT-1-x", id]);
  const request = server.requests[0]?.message as CreateEnrollmentTokenRequest;
  assert.deepEqual([request.lifetime?.seconds, request.location?.tier, request.maxUses], [600n, 4, 0]);
});

test("a token that was lost with its answer is told of, with the id to revoke", async () => {
  const id = newId("ent");
  await using server = await startServerForClientTests(
    (router) =>
      void router.service(NodeService, {
        createEnrollmentToken: () => ({ enrollmentToken: { id, location } }),
        reenrollNode: () => ({ enrollmentToken: { id, location }, node: { id: newId("nod") } }),
      }),
  );
  const client = server.client();
  for (const call of [client.nodes.createEnrollmentToken({ location }), client.nodes.reenroll(newId("nod"))]) {
    await assert.rejects(call, (error: unknown) => {
      assert.ok(error instanceof ClodeiError && error.reason === "SECRET_ALREADY_SHOWN");
      return error.metadata["enrollmentTokenId"] === id;
    });
  }
});

test("nodes are listed by states and location, and cordoned by id", async () => {
  const id = newId("nod");
  await using server = await startServerForClientTests(
    (router) =>
      void router.service(NodeService, {
        listNodes: ({ states, location: asked }) => {
          assert.deepEqual([states, asked?.country], [[NodeState.UNREACHABLE], "ES"]);
          return { nodes: [{ id }] };
        },
        cordonNode: ({ nodeId }) => ({ node: { id: nodeId, cordoned: true } }),
        watchNodes: async function* () {
          yield create(WatchNodesResponseSchema, { event: { case: "snapshot", value: { id } } });
          yield create(WatchNodesResponseSchema, { event: { case: "bookmark", value: {} }, cursor: "c" });
        },
      }),
  );
  const client = server.client();
  const nodes = await client.nodes.list({ states: ["UNREACHABLE"], location: { country: "ES" } }).toArray();
  assert.deepEqual(
    nodes.map((node) => node.id),
    [id],
  );
  assert.equal((await client.nodes.cordon(id)).cordoned, true);
  for await (const event of client.nodes.watch()) {
    if (event.type === "bookmark") break;
    assert.equal(event.type === "snapshot" && event.value.id, id);
  }
});

test("the catalog's filters arrive, and its lists are read to the end", async () => {
  await using server = await startServerForClientTests(
    (router) =>
      void router.service(CatalogService, {
        listOffers: ({ gpuModel, location: asked, pageToken }) => {
          assert.deepEqual([gpuModel, asked?.country, asked?.region], ["L40S", "ES", undefined]);
          return { offers: [{ gpuModel, location }], nextPageToken: pageToken === "" ? "2" : "" };
        },
        listLocations: () => ({ locations: [location] }),
        listImagePolicies: () => ({ imagePolicies: [{ prefix: "library/", normalizedPrefix: "docker.io/library/" }] }),
      }),
  );
  const { catalog } = server.client();
  const offers = await catalog.offers({ gpuModel: "L40S", location: { country: "ES" } }).toArray();
  assert.equal(offers.length, 2);
  assert.equal((await catalog.locations().toArray())[0]?.datacenter, "kumo-1");
  assert.equal((await catalog.imagePolicies().toArray())[0]?.normalizedPrefix, "docker.io/library/");
});
