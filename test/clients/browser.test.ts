// The SDK in a real browser: bundled as a customer's page is, with a user's token, over CORS.
import assert from "node:assert/strict";
import { createHash, X509Certificate } from "node:crypto";
import { once } from "node:events";
import { accessSync, constants } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { fileURLToPath } from "node:url";
import { after, before, describe, test } from "node:test";
import { build } from "esbuild";
import { type Browser, chromium, type Page } from "playwright-core";
import { startTestIssuer, testAudience, type TestIssuer } from "../../control-plane/src/identity/test-issuer.ts";
import { InstanceState } from "@clodei/sdk";
import { engineUnavailable } from "../harness/engine.ts";
import { eventually } from "../harness/eventually.ts";
import { TestSystem } from "../harness/system.ts";
import { TcpProxy } from "../harness/tcp-proxy.ts";
import type { Asker } from "./page.ts";

const patienceMs = 60_000;
/** Debian's. */
const browserProgram = "/usr/bin/chromium";
const subject = "user-of-a-page";

function browserUnavailable(): string | undefined {
  try {
    accessSync(browserProgram, constants.X_OK);
    return undefined;
  } catch {
    return "needs chromium (Debian's chromium)";
  }
}

/** Serves one page with the script. Each has an origin of its own. */
async function servePage(script: string): Promise<Server> {
  const server = createServer((request, response) => {
    const isScript = request.url === "/page.js";
    response.setHeader("content-type", isScript ? "text/javascript" : "text/html");
    response.end(
      isScript ? script : '<!doctype html><title>page</title><script type="module" src="/page.js"></script>',
    );
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return server;
}

function originOf(server: Server): string {
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** As a customer's bundler does it: the part of the SDK for browsers, and nothing of Node. */
async function bundle(): Promise<string> {
  const entry = fileURLToPath(new URL("page.ts", import.meta.url));
  const { outputFiles } = await build({
    entryPoints: [entry],
    bundle: true,
    write: false,
    platform: "browser",
    format: "esm",
    target: "es2022",
  });
  return outputFiles[0]?.text ?? "";
}

/** A browser that trusts the authority given, and reaches nothing but this machine. */
function launch(ca: string): Promise<Browser> {
  const key = new X509Certificate(ca).publicKey.export({ type: "spki", format: "der" });
  const pin = createHash("sha256").update(key).digest("base64");
  return chromium.launch({
    executablePath: browserProgram,
    args: [
      `--ignore-certificate-errors-spki-list=${pin}`,
      "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    ],
    timeout: patienceMs,
  });
}

describe("the SDK in a browser", { skip: engineUnavailable ?? browserUnavailable(), timeout: 600_000 }, () => {
  const closing = new AsyncDisposableStack();
  let system: TestSystem;
  let issuer: TestIssuer;
  let page: Page;
  let foreignPage: Page;
  let apiKey: string;
  let asker: Asker;

  before(async () => {
    const script = await bundle();
    const serve = async (): Promise<string> => {
      const server = await servePage(script);
      closing.defer(() => {
        server.close();
        server.closeAllConnections();
      });
      return originOf(server);
    };
    const [origin, foreignOrigin] = [await serve(), await serve()];
    issuer = closing.use(await startTestIssuer(() => new Date()));
    system = closing.use(
      await TestSystem.start({
        controlPlaneEnv: {
          CLODEI_CORS_ORIGINS: origin,
          CLODEI_JWT_ISSUERS: JSON.stringify([{ issuer: issuer.issuer, audience: testAudience }]),
        },
      }),
    );
    apiKey = await system.createOrganization("page", { issuer: issuer.issuer, subject });
    asker = { endpoint: system.controlPlane.listening.publicUrl, token: await issuer.token({ sub: subject }) };
    const browser = await launch(system.ca);
    closing.defer(() => browser.close());
    const open = async (url: string): Promise<Page> => {
      const opened = await browser.newPage();
      opened.setDefaultTimeout(patienceMs);
      await opened.goto(url);
      await opened.waitForFunction(() => "clodeiPage" in globalThis);
      return opened;
    };
    [page, foreignPage] = [await open(origin), await open(foreignOrigin)];
  });
  after(async () => {
    await closing.disposeAsync();
  });

  test("lists the instances of the user's organization with a token", async () => {
    using client = system.connect(apiKey);
    const instance = await client.instances.run({ image: "busybox" });
    const listed = await page.evaluate((who) => clodeiPage.list(who), asker);
    assert.deepEqual(listed, { organizationName: "page", credential: 2, ids: [instance.id] });
  });

  test("watches them through a connection that is cut, until the page has enough, which the server sees", async () => {
    await using proxy = await TcpProxy.start(new URL(asker.endpoint).host);
    using client = system.connect(apiKey);
    const shown = () => page.evaluate(() => clodeiPage.shown);
    const untilShown = (id: string, state: InstanceState): Promise<void> =>
      eventually(patienceMs, async () => {
        const found = (await shown()).some((instance) => instance.id === id && instance.state === state);
        assert.ok(found, `${id} ${state}`);
      });
    const first = await client.instances.run({ image: "busybox" });
    await page.evaluate((who) => clodeiPage.watch(who), { ...asker, endpoint: `https://${proxy.endpoint}` });
    await untilShown(first.id, InstanceState.PENDING);
    await first.delete();
    await untilShown(first.id, InstanceState.DELETED);
    const connections = proxy.connections;
    proxy.cut();
    const second = await client.instances.run({ image: "busybox" });
    await untilShown(second.id, InstanceState.PENDING);
    assert.ok(proxy.connections > connections);
    const told = (await shown()).map(({ id, version }) => `${id} ${version}`);
    assert.deepEqual(told, [...new Set(told)], "nothing comes twice");

    await page.evaluate(() => clodeiPage.stopWatching());
    await eventually(patienceMs, async () => {
      assert.equal((await page.evaluate(() => clodeiPage.watchEnded))?.reason, "CANCELED");
      const metrics = await (await fetch(`${system.controlPlane.listening.operationsUrl}/metrics`)).text();
      assert.match(metrics, /open_streams\{[^}]*method="WatchInstances"\} 0/);
    });
  });

  test("reads the details of an error", async () => {
    const error = await page.evaluate((who) => clodeiPage.listTooMany(who), asker);
    assert.ok("reason" in error);
    assert.equal(error.reason, "INVALID_ARGUMENT");
    assert.deepEqual(
      error.fieldViolations.map(({ field, rule }) => [field, rule]),
      [["page_size", "uint32.lte"]],
    );
    assert.match(error.requestId ?? "", /^[0-9a-f-]{36}$/);
  });

  test("an API key in a page is refused, and a token of nobody", async () => {
    const { endpoint } = asker;
    const withKey = await page.evaluate((who) => clodeiPage.list(who), { endpoint, apiKey });
    assert.ok("reason" in withKey);
    assert.deepEqual([withKey.code, withKey.reason], ["permission_denied", "API_KEY_FROM_BROWSER"]);
    const withNothing = await page.evaluate((who) => clodeiPage.list(who), { endpoint, token: "nobody" });
    assert.ok("reason" in withNothing);
    assert.deepEqual([withNothing.code, withNothing.reason], ["unauthenticated", "TOKEN_INVALID"]);
  });

  test("an authority of one's own is refused in a page: the browser decides whom it trusts", async () => {
    const error = await page.evaluate((who) => clodeiPage.list(who), { ...asker, ca: system.ca });
    assert.ok("reason" in error);
    assert.deepEqual([error.code, error.reason], ["invalid_argument", "INVALID_ARGUMENT"]);
    assert.match(error.message, /^ca cannot be given in a browser/);
  });

  test("a page of an origin that the control plane does not name reads nothing, and is told what may be the matter", async () => {
    const error = await foreignPage.evaluate((who) => clodeiPage.list(who), asker);
    assert.ok("reason" in error);
    assert.equal(error.reason, "UNAVAILABLE");
    assert.match(error.message, /CLODEI_CORS_ORIGINS of the control plane does not name this page's origin/);
  });
});
