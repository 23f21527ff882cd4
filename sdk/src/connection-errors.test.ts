import assert from "node:assert/strict";
import { createServer } from "node:http";
import { once } from "node:events";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { type ClientOptions, createClient } from "./client.ts";
import { ClodeiError } from "./errors.ts";
import { startServerForClientTests } from "./server-for-client-tests.ts";

const retry = { maxAttempts: 1 };

/** Calls by a client of its own, which is closed at once, and returns the error. */
async function failure(options: ClientOptions): Promise<ClodeiError> {
  using client = createClient({ retry, ...options });
  try {
    await client.identity.whoAmI();
  } catch (error) {
    assert.ok(error instanceof ClodeiError, String(error));
    return error;
  }
  return assert.fail("it did not reject");
}

test("whoever cannot connect is told what to do about it", async () => {
  await using server = await startServerForClientTests(() => undefined);
  await using other = await startServerForClientTests(() => undefined);
  const plain = createServer().listen(0, "127.0.0.1");
  await once(plain, "listening");
  const plainPort = (plain.address() as AddressInfo).port;
  const { endpoint, ca, apiKey } = server;
  const cases: readonly (readonly [Partial<ClientOptions>, RegExp])[] = [
    [{ ca: undefined }, /does not know: give it to createClient as ca: .*\.data\/ca\/certificate\.pem/u],
    [{ ca: other.ca }, /was not signed by the authority in ca/u],
    [{ endpoint: endpoint.replace("127.0.0.1", "localhost") }, /for another host name: name the host in endpoint/u],
    [
      { endpoint: endpoint.replace("https", "http") },
      /if what listens there speaks TLS, endpoint must begin with https:/u,
    ],
    [{ endpoint: `https://127.0.0.1:${plainPort}` }, /does not speak TLS: is it the port of the public API/u],
    [{ endpoint: `http://127.0.0.1:${plainPort}` }, /was lost/u],
    [{ endpoint: "https://clodei.invalid" }, /names a host that does not exist: look at endpoint/u],
  ];
  for (const [options, message] of cases) {
    const error = await failure({ endpoint, ca, apiKey, ...options });
    assert.match(error.message, message);
    assert.equal(error.reason, "UNAVAILABLE");
  }
  const elsewhere = await failure({ endpoint: `${endpoint}/elsewhere`, ca, apiKey });
  assert.match(elsewhere.message, /^HTTP 404, answered by something that is not Clodei's public API/u);
  const closed = once(plain, "close");
  plain.close();
  await closed;
  const error = await failure({ endpoint: `https://127.0.0.1:${plainPort}`, apiKey });
  assert.match(error.message, /nothing listens at .*npm start prints it as "public API"/u);
});
