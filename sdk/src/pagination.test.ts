import assert from "node:assert/strict";
import { test } from "node:test";
import { Code } from "@connectrpc/connect";
import { InstanceState } from "@clodei/proto/gen/clodei/v1/instance";
import { newId } from "@clodei/proto/ids";
import { errorWith, instances, startServerForClientTests, take } from "./server-for-client-tests.ts";

const id = newId("ins");

test("lists go through all pages as the loop needs them, and can go on from a token", async () => {
  const ids = Array.from({ length: 7 }, () => newId("ins"));
  await using server = await startServerForClientTests(
    instances({
      listInstances({ pageSize, pageToken, filter, showDeleted }) {
        assert.deepEqual(
          [pageSize, filter?.states, filter?.labels, showDeleted],
          [3, [InstanceState.RUNNING], { a: "b" }, true],
        );
        const from = Number(pageToken);
        const nextPageToken = from + 3 < ids.length ? String(from + 3) : "";
        return { instances: ids.slice(from, from + 3).map((item) => ({ id: item })), nextPageToken };
      },
    }),
  );
  const options = { pageSize: 3, states: ["RUNNING"], labels: { a: "b" }, showDeleted: true } as const;
  const client = server.client();
  const all = await client.instances.list(options).toArray();
  assert.deepEqual(
    all.map((item) => item.id),
    ids,
  );
  assert.equal(server.requests.length, 3);
  await take(2, client.instances.list(options));
  assert.equal(server.requests.length, 4, "a page that is not needed is not fetched");
  const pages = await Array.fromAsync(client.instances.list({ ...options, pageToken: "3" }).pages());
  assert.deepEqual(
    pages.map((page) => page.items.length),
    [3, 1],
  );
});

test("a page that fails for a moment is fetched again, within the list", async () => {
  let failures = 1;
  await using server = await startServerForClientTests(
    instances({
      listInstanceEvents({ pageToken }) {
        if (pageToken === "2" && failures-- > 0) throw errorWith(Code.Unavailable, "UNAVAILABLE");
        return { events: [{ sequence: BigInt(pageToken === "" ? 1 : 2) }], nextPageToken: pageToken === "" ? "2" : "" };
      },
      getInstance: () => ({ instance: { id } }),
    }),
  );
  const handle = await server.client().instances.get(id);
  const events = await handle.events().toArray();
  assert.deepEqual(
    events.map(({ sequence }) => sequence),
    [1n, 2n],
  );
});
