// A whole Clodei behind real proxies, by the very configurations that the documents show: they end TLS of the public
// API, and pass that of nodes through.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { Agent, request } from "node:https";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { connect } from "node:tls";
import { promisify } from "node:util";
import { type ClodeiClient, createClient } from "@clodei/sdk";
import { openAuthority } from "../../control-plane/src/nodes/authority-store.ts";
import { importBusybox } from "../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../tools/engine/private-engine.ts";
import { imagePath } from "../../tools/schema/schema.ts";
import { findUnpacked } from "../../tools/setup/unpacked.mjs";
import { DebianServer, serverUnavailable, withFreePorts } from "../harness/debian-server.ts";
import { engineUnavailable, startTestEngine } from "../harness/engine.ts";
import { madrid, TestAgent, TestControlPlane, testImage } from "../harness/system.ts";
import { checkWatchedLife } from "../harness/watched-life.ts";

const root = join(import.meta.dirname, "..", "..");
const documents = join(root, "docs", "proxies");
/** Whom the documents' proxies connect as, and two callers of them. */
const [proxyAddress, oneCaller, anotherCaller] = ["127.0.0.9", "127.0.0.8", "127.0.0.7"];
/** Of one address: far below what the callers here ask for in a row, far above what the others need. */
const requestsPerSecond = 10;
const burst = 5 * requestsPerSecond;

/** A proxy that runs: where it ends TLS, and where it passes that of nodes through. */
type Proxy = AsyncDisposable & { readonly publicUrl: string; readonly nodeEndpoint: string };

type Behind = { readonly publicPort: number; readonly nodePort: number };

/** Files that all proxies here use: a certificate of the control plane's own CA, as an agent trusts it. */
type Certificate = {
  readonly folder: string;
  readonly chainFile: string;
  readonly keyFile: string;
  readonly bothFile: string;
};

async function makeCertificate(folder: string, controlPlane: TestControlPlane): Promise<Certificate> {
  const source = { folder: join(controlPlane.folder, "ca"), files: undefined, trustDomain: "clodei.com" };
  const authority = await openAuthority(source, new Date());
  const made = await authority.issueListenerCertificate(["localhost", "127.0.0.1"], new Date());
  await mkdir(folder, { mode: 0o700 });
  const [chainFile, keyFile, bothFile] = [join(folder, "chain.pem"), join(folder, "key.pem"), join(folder, "both.pem")];
  await writeFile(chainFile, made.certificateChainPem);
  await writeFile(keyFile, made.privateKeyPem, { mode: 0o600 });
  await writeFile(bothFile, `${made.certificateChainPem}${made.privateKeyPem}`, { mode: 0o600 });
  return { folder, chainFile, keyFile, bothFile };
}

/** The text with each part replaced, each of which must be there. */
function replaced(text: string, parts: Readonly<Record<string, string>>): string {
  return Object.entries(parts).reduce((result, [from, to]) => {
    assert.ok(result.includes(from), `the document has no ${JSON.stringify(from)}`);
    return result.replaceAll(from, to);
  }, text);
}

/** HAProxy as documented, but for ports and files. `changes` are what the document tells in comments. */
function startHaproxy(
  certificate: Certificate,
  behind: Behind,
  changes: Readonly<Record<string, string>> = {},
): Promise<Proxy> {
  return withFreePorts(2, async ([publicPort = 0, nodePort = 0]) => {
    const documented = await readFile(join(documents, "haproxy.cfg"), "utf8");
    const text = replaced(documented, {
      "bind 0.0.0.0:443 ssl crt /etc/haproxy/cloud.example.pem": `bind 127.0.0.1:${publicPort} ssl crt ${certificate.bothFile}`,
      "bind 0.0.0.0:8444": `bind 127.0.0.1:${nodePort}`,
      "127.0.0.1:8443": `127.0.0.1:${behind.publicPort}`,
      "127.0.0.1:18444": `127.0.0.1:${behind.nodePort}`,
      ...changes,
    });
    const file = join(certificate.folder, `haproxy-${publicPort}.cfg`);
    await writeFile(file, text);
    const server = await DebianServer.start({
      package: "haproxy",
      args: ["-db", "-f", file],
      listens: [publicPort, nodePort],
    });
    return proxyOf(server, publicPort, nodePort);
  });
}

/** nginx as documented, but for ports and files. */
function startNginx(certificate: Certificate, behind: Behind): Promise<Proxy> {
  return withFreePorts(2, async ([publicPort = 0, nodePort = 0]) => {
    const documented = await readFile(join(documents, "nginx.conf"), "utf8");
    const { folder } = certificate;
    const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(
      (name) => `${name}_temp_path ${folder}/${name};`,
    );
    const modules = join(folder, "modules-enabled");
    await mkdir(modules, { recursive: true });
    const [streamModule] = findUnpacked("nginx")?.modules ?? [];
    await writeFile(join(modules, "stream.conf"), `load_module ${streamModule};\n`);
    const text = replaced(documented, {
      "/etc/nginx/modules-enabled/": `${modules}/`,
      "listen 0.0.0.0:443": `listen 127.0.0.1:${publicPort}`,
      "listen 0.0.0.0:8444": `listen 127.0.0.1:${nodePort}`,
      "/etc/nginx/cloud.example.pem": certificate.chainFile,
      "/etc/nginx/cloud.example.key": certificate.keyFile,
      "127.0.0.1:8443": `127.0.0.1:${behind.publicPort}`,
      "127.0.0.1:18444": `127.0.0.1:${behind.nodePort}`,
      "http {": `http { access_log off; ${paths.join(" ")}`,
    });
    const file = join(folder, `nginx-${publicPort}.conf`);
    const own = `daemon off; master_process off; user root; pid ${folder}/nginx.pid; error_log stderr;`;
    await writeFile(file, `${own}\n${text}`);
    const server = await DebianServer.start({
      package: "nginx",
      args: ["-p", folder, "-e", "stderr", "-c", file],
      listens: [publicPort, nodePort],
    });
    return proxyOf(server, publicPort, nodePort);
  });
}

function proxyOf(server: DebianServer, publicPort: number, nodePort: number): Proxy {
  return {
    publicUrl: `https://localhost:${publicPort}`,
    nodeEndpoint: `localhost:${nodePort}`,
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

const portOf = (place: string): number => Number(/:(\d+)$/.exec(place)?.[1]);

function behindOf({ listening }: TestControlPlane): Behind {
  return { publicPort: portOf(listening.publicUrl), nodePort: portOf(listening.nodeEndpoint) };
}

const unavailable = engineUnavailable ?? serverUnavailable("haproxy");

describe("behind proxies that end TLS", { skip: unavailable, timeout: 900_000 }, () => {
  const closing = new AsyncDisposableStack();
  let engine: PrivateEngine;
  let controlPlane: TestControlPlane;
  let certificate: Certificate;
  let haproxy: Proxy;
  let apiKey: string;
  let caFile: string;
  let operator: ClodeiClient;

  const connections = new Agent({ keepAlive: true, maxSockets: 8 });
  closing.defer(() => connections.destroy());

  const connectBy = (endpoint: string, key = apiKey): ClodeiClient => {
    const client = createClient({ endpoint, apiKey: key, ca: controlPlane.listening.caPem });
    closing.defer(() => client.close());
    return client;
  };

  const keyOf = async (...command: readonly string[]): Promise<string> => keyIn(await controlPlane.command(...command));

  before(async () => {
    engine = closing.use(await startTestEngine());
    const folder = join(engine.folder, "system");
    await mkdir(folder, { mode: 0o755 });
    await importBusybox(engine.socketPath, testImage);
    controlPlane = closing.use(
      new TestControlPlane(join(folder, "control-plane"), {
        TRUSTED_PROXIES: proxyAddress,
        CLODEI_PUBLIC_TLS: "off",
        CLODEI_NODE_PROXY_PROTOCOL: "on",
        CLODEI_ADDRESS_RATE: String(requestsPerSecond),
      }),
    );
    await controlPlane.start();
    certificate = await makeCertificate(join(folder, "proxies"), controlPlane);
    caFile = join(controlPlane.folder, "ca", "certificate.pem");
    haproxy = closing.use(await startHaproxy(certificate, behindOf(controlPlane)));
    apiKey = await keyOf("create-organization", "--name", "acme");
    operator = connectBy(haproxy.publicUrl, await keyOf("create-operator"));
    const agent = await enroll("mad-1", haproxy.nodeEndpoint);
    await agent.start();
  });
  after(() => closing.disposeAsync());

  async function enroll(name: string, nodeEndpoint: string): Promise<TestAgent> {
    const options = { name, nodeEndpoint };
    const agent = closing.use(new TestAgent(join(engine.folder, "system", name), options, engine.socketPath));
    const { token } = await operator.nodes.createEnrollmentToken({ location: madrid, nodeName: name });
    await agent.enroll(haproxy.publicUrl, token);
    return agent;
  }

  /** WhoAmI over HTTP/1.1 as JSON, from an address of loopback. */
  function ask(publicUrl: string, localAddress: string, headers: Readonly<Record<string, string>> = {}) {
    const { promise, resolve, reject } = Promise.withResolvers<number>();
    const outgoing = request(`${publicUrl}/clodei.v1.IdentityService/WhoAmI`, {
      method: "POST",
      localAddress,
      agent: connections,
      ca: controlPlane.listening.caPem,
      headers: { "content-type": "application/json", authorization: `Bearer ${apiKey}`, ...headers },
    });
    outgoing.once("response", (response) => {
      response.resume().once("end", () => resolve(response.statusCode ?? 0));
    });
    outgoing.once("error", reject);
    outgoing.end("{}");
    return promise;
  }

  /** Every protocol by a client that is not ours. */
  async function checkProtocols(publicUrl: string, protocols: readonly string[]): Promise<void> {
    for (const protocol of protocols) {
      // Not by reflection: its stream goes both ways at once, which HTTP/1.1 to the control plane cannot.
      const how = ["--schema", imagePath, "--protocol", protocol, "--cacert", caFile];
      const bearer = `Authorization: Bearer ${apiKey}`;
      const answer = await buf("curl", ...how, "-H", bearer, `${publicUrl}/clodei.v1.IdentityService/WhoAmI`);
      assert.match(answer, /"organizationName": ?"acme"/, protocol);
    }
    assert.equal(await ask(publicUrl, "127.0.0.1"), 200);
  }

  /** That callers of a proxy are told apart, and that none of them can be another by a header. */
  async function checkAddresses(publicUrl: string): Promise<void> {
    const forge = (index: number): Record<string, string> => ({
      "x-forwarded-for": `203.0.113.${index % 250}`,
      forwarded: `for=203.0.113.${index % 250}`,
    });
    const statuses = await Promise.all(
      Array.from({ length: 4 * burst }, (_, index) => ask(publicUrl, oneCaller, forge(index))),
    );
    const refused = statuses.filter((status) => status === 429).length;
    assert.ok(refused > 0, "each forged header was another caller");
    assert.equal(statuses.filter((status) => status === 200).length, statuses.length - refused);
    assert.equal(await ask(publicUrl, anotherCaller), 200, "another caller has a limit of its own");
  }

  test("each document names ports that a proxy and a control plane on one machine do not share", async () => {
    for (const name of ["haproxy.cfg", "nginx.conf"]) {
      const text = await readFile(join(documents, name), "utf8");
      const portsAt = (address: RegExp): Set<string> =>
        new Set([...text.matchAll(address)].map(([, port = ""]) => port));
      const upstream = portsAt(/127\.0\.0\.1:(\d+)/gu);
      assert.deepEqual(upstream, new Set(["8443", /CLODEI_NODE_PORT=(\d+)/u.exec(text)?.[1]]), name);
      const listening = portsAt(/(?:bind|listen) 0\.0\.0\.0:(\d+)/gu);
      assert.deepEqual(listening, new Set(["443", "8444"]), name);
      assert.deepEqual(
        [...listening].filter((port) => upstream.has(port)),
        [],
        name,
      );
    }
  });

  test("HAProxy to HTTP/2 without TLS: every protocol, reflection, streams, and each caller's own address", async () => {
    const listed = await buf("curl", "--cacert", caFile, "--list-methods", haproxy.publicUrl);
    assert.match(listed, /clodei\.v1\.InstanceService\/StreamLogs/);
    await checkProtocols(haproxy.publicUrl, ["connect", "grpc", "grpcweb"]);
    await checkWatchedLife(connectBy(haproxy.publicUrl));
    await checkAddresses(haproxy.publicUrl);
  });

  test("HAProxy to HTTP/1.1: Connect and gRPC-Web, streams, and each caller's own address", async () => {
    await using http1 = await startHaproxy(certificate, behindOf(controlPlane), { " proto h2": "" });
    await checkProtocols(http1.publicUrl, ["connect", "grpcweb"]);
    await checkWatchedLife(connectBy(http1.publicUrl));
    await checkAddresses(http1.publicUrl);
  });

  test(
    "nginx: every protocol, streams, each caller's own address, and nodes",
    { skip: serverUnavailable("nginx") },
    async () => {
      await using nginx = await startNginx(certificate, behindOf(controlPlane));
      await using agent = await enroll("mad-2", nginx.nodeEndpoint);
      await agent.start();
      await checkProtocols(nginx.publicUrl, ["connect", "grpc", "grpcweb"]);
      await checkWatchedLife(connectBy(nginx.publicUrl));
      await checkAddresses(nginx.publicUrl);
    },
  );

  test("who comes past the proxies is not served, whatever it says", async () => {
    const direct = controlPlane.listening.publicUrl;
    assert.match(direct, /^http:/);
    for (const headers of [{}, { "x-forwarded-for": proxyAddress }]) {
      await assert.rejects(fetch(`${direct}/clodei.v1.IdentityService/WhoAmI`, { method: "POST", headers }));
    }
  });

  test("where the PROXY protocol is off, nodes connect by a proxy that passes TLS through, and not with a header", async () => {
    const folder = join(engine.folder, "system", "direct");
    await using direct = new TestControlPlane(folder, {});
    await direct.start();
    await using passing = await startHaproxy(certificate, behindOf(direct), { " send-proxy-v2": "" });
    await using announcing = await startHaproxy(certificate, behindOf(direct));
    const { publicUrl, caPem } = direct.listening;
    const key = keyIn(await direct.command("create-operator"));
    using client = createClient({ endpoint: publicUrl, apiKey: key, ca: caPem });
    const { token } = await client.nodes.createEnrollmentToken({ location: madrid, nodeName: "mad-3" });
    const options = { name: "mad-3", nodeEndpoint: passing.nodeEndpoint };
    await using agent = new TestAgent(join(engine.folder, "system", "mad-3"), options, engine.socketPath);
    await agent.enroll(publicUrl, token);
    await agent.start();
    assert.equal(await shakesHands(passing.nodeEndpoint), true);
    assert.equal(await shakesHands(announcing.nodeEndpoint), false);
  });

  test("nodes come by version 1 of the PROXY protocol as by version 2, and without one not at all", async () => {
    const behind = behindOf(controlPlane);
    await using first = await startHaproxy(certificate, behind, { "send-proxy-v2": "send-proxy" });
    assert.equal(await shakesHands(first.nodeEndpoint), true);
    assert.equal(await shakesHands(haproxy.nodeEndpoint), true);
    await using without = await startHaproxy(certificate, behind, { " send-proxy-v2": "" });
    assert.equal(await shakesHands(without.nodeEndpoint), false);
    const metrics = await (await fetch(`${controlPlane.listening.operationsUrl}/metrics`)).text();
    assert.match(metrics, /^clodei_node_proxy_connections_refused_total\{why="malformed_proxy_header"\} [1-9]/m);
  });
});

async function buf(...args: readonly string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(join(root, "node_modules", ".bin", "buf"), args, { cwd: root });
  return stdout;
}

/** The API key in what a command printed. */
function keyIn(output: string): string {
  return (JSON.parse(output) as { apiKey: string }).apiKey;
}

/** Whether the other end shows a certificate. A client without one is let in no further. */
function shakesHands(endpoint: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({
      port: portOf(endpoint),
      host: "127.0.0.1",
      rejectUnauthorized: false,
      ALPNProtocols: ["h2"],
    });
    socket.once("secureConnect", () => resolve(true));
    socket.once("error", () => resolve(false));
    socket.once("close", () => {
      socket.destroy();
      resolve(false);
    });
  });
}
