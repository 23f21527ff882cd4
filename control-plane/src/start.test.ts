import assert from "node:assert/strict";
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readdir, readFile, rm, stat } from "node:fs/promises";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { ConnectError, createClient, type Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { IdentityService } from "@clodei/proto/gen/clodei/v1/identity_service";
import { InstanceService } from "@clodei/proto/gen/clodei/v1/instance_service";
import { NodeService } from "@clodei/proto/gen/clodei/v1/node_service";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { Health, HealthCheckResponse_ServingStatus as Serving } from "@clodei/proto/gen/grpc/health/v1/health";
import { loadConfig } from "./config.ts";
import { startEmbeddedPostgres } from "./platform/embedded-postgres.ts";
import { createLog } from "./platform/log.ts";
import { publicServices, startControlPlane } from "./start.ts";

const program = join(import.meta.dirname, "main.ts");
const freePorts = ["--public-port", "0", "--node-port", "0", "--operations-port", "0"];

type Listening = { publicUrl: string; nodeEndpoint: string; operationsUrl: string; caPem: string; pid: number };

async function withFolder(work: (folder: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-start-"));
  try {
    await work(folder);
  } finally {
    // After a SIGKILL the database may still be writing its last.
    await rm(folder, { recursive: true, force: true, maxRetries: 50, retryDelay: 100 });
  }
}

async function run(
  args: readonly string[],
  environment: Record<string, string> = {},
): Promise<{ stdout: string; stderr: string }> {
  return promisify(execFile)(process.execPath, [program, ...args], { env: { PATH: "/usr/bin:/bin", ...environment } });
}

async function serve(
  folder: string,
  environment: Record<string, string> = {},
): Promise<{ child: ChildProcess; listening: Listening }> {
  const child = spawn(process.execPath, [program, "serve", "--data", folder, "--log-level", "warn", ...freePorts], {
    stdio: ["ignore", "pipe", "inherit"],
    env: { PATH: "/usr/bin:/bin", ...environment },
  });
  for await (const line of createInterface({ input: child.stdout })) {
    return { child, listening: (JSON.parse(line) as { listening: Listening }).listening };
  }
  throw new Error("it ended without a word");
}

async function stop(child: ChildProcess, signal: NodeJS.Signals): Promise<number | null> {
  const exited = once(child, "exit") as Promise<[number | null]>;
  child.kill(signal);
  const [code] = await exited;
  return code;
}

function transportTo(listening: Pick<Listening, "publicUrl" | "caPem">, apiKey?: string): Transport {
  return createGrpcTransport({
    baseUrl: listening.publicUrl,
    nodeOptions: { ca: listening.caPem },
    interceptors: [
      (next) => (request) => {
        if (apiKey !== undefined) request.header.set("authorization", `Bearer ${apiKey}`);
        return next(request);
      },
    ],
  });
}

async function reasonOf(promise: Promise<unknown>): Promise<string | undefined> {
  try {
    await promise;
  } catch (error) {
    return ConnectError.from(error).findDetails(ErrorInfoSchema)[0]?.reason;
  }
  return "none";
}

describe("the program", () => {
  test("serves, takes commands beside it, drains on SIGTERM, and starts again on the same data", async () => {
    await withFolder(async (folder) => {
      const first = await serve(folder);
      const { stdout } = await run(["create-organization", "--data", folder, "--name", "Acme"]);
      const organization = JSON.parse(stdout) as { organizationId: string; apiKey: string };
      const operator = JSON.parse((await run(["create-operator", "--data", folder])).stdout) as { apiKey: string };

      const customer = transportTo(first.listening, organization.apiKey);
      const whoAmI = await createClient(IdentityService, customer).whoAmI({});
      assert.equal(whoAmI.organizationId, organization.organizationId);
      const created = await createClient(InstanceService, customer).createInstance({ spec: { image: "busybox" } });
      await createClient(NodeService, transportTo(first.listening, operator.apiKey)).listNodes({});
      assert.equal(await reasonOf(createClient(NodeService, customer).listNodes({})), "PERMISSION_DENIED");

      const identity = (apiKey?: string) =>
        createClient(IdentityService, transportTo(first.listening, apiKey)).whoAmI({});
      const typo = organization.apiKey.replace(/.$/, (last) => (last === "0" ? "1" : "0"));
      assert.equal(await reasonOf(identity()), "CREDENTIALS_MISSING");
      assert.equal(await reasonOf(identity(typo)), "API_KEY_MALFORMED");

      const keyId = /key_[0-9a-z]{26}/.exec(organization.apiKey)?.[0] ?? "";
      const spare = JSON.parse((await run(["create-organization", "--data", folder, "--name", "Spare"])).stdout) as {
        organizationId: string;
        apiKey: string;
      };
      const spareId = /key_[0-9a-z]{26}/.exec(spare.apiKey)?.[0] ?? "";
      assert.equal((await identity(spare.apiKey)).organizationId, spare.organizationId);
      const revoke = (id: string) => run(["revoke-api-key", "--data", folder, "--key-id", id]);
      const revoked = JSON.parse((await revoke(spareId)).stdout) as Record<string, string>;
      assert.deepEqual(
        [revoked["keyId"], revoked["organizationId"], revoked["name"]],
        [spareId, spare.organizationId, "admin"],
      );
      assert.equal(await reasonOf(identity(spare.apiKey)), "API_KEY_INVALID");
      assert.equal((await identity(organization.apiKey)).organizationId, organization.organizationId);
      const unknown = keyId.replace(/.$/, (last) => (last === "0" ? "1" : "0"));
      await assert.rejects(revoke(unknown), new RegExp(`there is no key ${unknown}\n`));
      await assert.rejects(revoke(spare.apiKey), (error) => {
        const { stderr } = error as { stderr: string };
        assert.ok(!stderr.includes(spareId), "a key is not repeated");
        return /--key-id must be key_/.test(stderr);
      });

      const watching = Promise.withResolvers<void>();
      const watched = reasonOf(
        (async () => {
          for await (const _message of createClient(InstanceService, customer).watchInstances({})) watching.resolve();
        })(),
      );
      await Promise.race([watching.promise, watched]);
      assert.equal(await stop(first.child, "SIGTERM"), 0);
      assert.equal(await watched, "UNAVAILABLE");
      assert.deepEqual(await readdir(join(folder, "run")), []);

      const second = await serve(folder);
      try {
        assert.equal(second.listening.caPem, first.listening.caPem);
        const { instance } = await createClient(
          InstanceService,
          transportTo(second.listening, organization.apiKey),
        ).getInstance({
          instanceId: created.instance?.id ?? "",
        });
        assert.equal(instance?.id, created.instance?.id);
        await assert.rejects(run(["serve", "--data", folder, ...freePorts]), /another process uses the database/);
        for (const [name, mode] of [
          ["ca", 0o700],
          ["keys", 0o700],
          ["postgres", 0o700],
        ] as const) {
          assert.equal((await stat(join(folder, name))).mode & 0o777, mode, name);
        }
      } finally {
        await stop(second.child, "SIGTERM");
      }
    });
  });

  test("no command but serve makes a database: in a wrong data folder it says so, and leaves nothing", async () => {
    await withFolder(async (folder) => {
      for (const command of [
        ["create-operator"],
        ["create-organization", "--name", "Acme"],
        ["revoke-api-key", "--key-id", `key_${"0".repeat(26)}`],
        ["forget-ca"],
      ]) {
        for (const wrong of [folder, join(folder, "none")]) {
          await assert.rejects(run([...command, "--data", wrong]), {
            code: 2,
            stdout: "",
            stderr: `clodei-control-plane: ${wrong} has no database: is --data right? \`serve\` makes one\n`,
          });
        }
      }
      assert.deepEqual(await readdir(folder), []);
    });
  });

  test("a SIGKILL leaves no process behind, and loses nothing that was answered", async () => {
    await withFolder(async (folder) => {
      const first = await serve(folder);
      const { apiKey } = JSON.parse((await run(["create-organization", "--data", folder, "--name", "A"])).stdout) as {
        apiKey: string;
      };
      const { instance } = await createClient(InstanceService, transportTo(first.listening, apiKey)).createInstance({
        spec: { image: "busybox" },
      });
      const postmaster = Number((await readFile(join(folder, "postgres", "postmaster.pid"), "utf8")).split("\n")[0]);
      await stop(first.child, "SIGKILL");
      for (let n = 0; n < 500 && isAlive(postmaster); n += 1) await sleep(20);
      assert.ok(!isAlive(postmaster));
      const second = await serve(folder);
      try {
        const found = await createClient(InstanceService, transportTo(second.listening, apiKey)).getInstance({
          instanceId: instance?.id ?? "",
        });
        assert.equal(found.instance?.id, instance?.id);
      } finally {
        assert.equal(await stop(second.child, "SIGINT"), 0);
      }
    });
  });

  test("says what is wrong with its settings, in one go and without a stack", async () => {
    const failure = await run(["serve", "--public-port", "x"], {
      CLODEI_LEASE_MS: "1",
      DATABASE_URL: "mysql://x",
    }).then(
      () => assert.fail("it started"),
      (error: unknown) => error as { code: number; stderr: string },
    );
    assert.equal(failure.code, 2);
    assert.match(failure.stderr, /--public-port \(CLODEI_PUBLIC_PORT\): must be a whole number/);
    assert.ok(!failure.stderr.includes("    at "), failure.stderr);
    const { stdout } = await run(["--help"]);
    assert.match(stdout, /create-operator/);
    assert.match((await run(["--version"])).stdout, /^\d+\.\d+\.\d+/);
    await assert.rejects(run(["dance"]), /there is no command "dance"/);
    await assert.rejects(run(["--no-such-flag"]), /no-such-flag/);
    await assert.rejects(run(["serve", "--name", "x"]), /serve does not take --name/);
    await assert.rejects(run(["create-organization", "--name", ""]), /--name must have 1 to 128 characters/);
    const alone = ["create-organization", "--name", "A", "--member-subject", "ada"];
    await assert.rejects(run(alone), /--member-issuer and --member-subject belong together/);
    await assert.rejects(run(["revoke-api-key"]), /--key-id is missing/);
  });
});

describe("a database of one's own", () => {
  test("says which port is taken and where it is set, in one line and without a stack", async () => {
    const other = createServer().listen(0, "127.0.0.1");
    await once(other, "listening");
    const { port } = other.address() as AddressInfo;
    try {
      await withFolder(async (folder) => {
        for (const name of ["public", "node", "replica", "operations"]) {
          const ports = [...freePorts, "--replica-host", "127.0.0.1", "--replica-port", "0"];
          ports[ports.indexOf(`--${name}-port`) + 1] = String(port);
          const args = ["serve", "--data", folder, "--log-level", "error", ...ports];
          const failure: unknown = await run(args).catch((error: unknown) => error);
          assert.ok(failure instanceof Error && "stderr" in failure && "code" in failure);
          assert.equal(failure.code, 1);
          const text = String(failure.stderr);
          assert.ok(text.startsWith(`clodei-control-plane: cannot listen on 127.0.0.1 port ${port}: `), text);
          assert.match(text, new RegExp(`CLODEI_${name.toUpperCase()}_PORT`));
          assert.equal(text.trimEnd().split("\n").length, 1, text);
        }
      });
    } finally {
      other.close();
    }
  });

  test("init-database makes the logins; a replica serves by their URLs; health follows the database's loss and return", async () => {
    await withFolder(async (folder) => {
      const log = createLog("silent");
      const start = () => startEmbeddedPostgres({ dataFolder: join(folder, "server"), durable: false, log });
      let server = await start();
      const { host, password } = server.administrator;
      const administrator = `postgres://postgres:${String(password)}@/clodei?host=${encodeURIComponent(host ?? "")}`;
      const { stdout } = await run(["init-database"], { CLODEI_DATABASE_ADMIN_URL: administrator });
      const urls = Object.fromEntries(
        stdout
          .trim()
          .split("\n")
          .map((line) => {
            const at = line.indexOf("=");
            return [line.slice(0, at), line.slice(at + 1)] as const;
          }),
      );
      assert.deepEqual(Object.keys(urls), ["DATABASE_URL", "DATABASE_SYSTEM_URL", "DATABASE_MIGRATION_URL"]);
      const flags = { "--data": join(folder, "a"), "--public-port": "0", "--node-port": "0", "--operations-port": "0" };
      const { DATABASE_MIGRATION_URL: _migration, ...withoutMigration } = urls;
      await assert.rejects(
        startControlPlane(loadConfig({ environment: withoutMigration, flags }), { log }),
        /the database lacks 0001_platform\.sql/,
      );
      const swapped = { ...urls, DATABASE_URL: urls["DATABASE_SYSTEM_URL"] ?? "" };
      const running = await startControlPlane(loadConfig({ environment: urls, flags }), { log });
      try {
        const elsewhere = { ...flags, "--data": join(folder, "b") };
        await assert.rejects(
          startControlPlane(loadConfig({ environment: urls, flags: elsewhere }), { log }),
          /served with another CA.*CLODEI_CA_CERTIFICATE_FILE/,
        );
        const second = await startControlPlane(loadConfig({ environment: urls, flags }), { log });
        await second.close();
        await run(["forget-ca"], urls);
        const third = await startControlPlane(loadConfig({ environment: urls, flags: elsewhere }), { log });
        await third.close();
        await assert.rejects(
          startControlPlane(loadConfig({ environment: swapped, flags }), { log }),
          /must be clodei_app/,
        );
        const health = createClient(Health, transportTo(running));
        const statuses = async (): Promise<Set<Serving>> => {
          const all = await health.list({});
          return new Set(Object.values(all.statuses).map(({ status }) => status));
        };
        const until = async (expected: Serving): Promise<void> => {
          for (let n = 0; n < 300; n += 1) {
            const found = await statuses();
            if (found.size === 1 && found.has(expected)) return;
            await sleep(50);
          }
          assert.fail(`health did not become ${expected}`);
        };
        const { statuses: named } = await health.list({});
        for (const { typeName } of publicServices) assert.ok(typeName in named, typeName);
        await until(Serving.SERVING);
        assert.equal((await fetch(`${running.operationsUrl}/readyz`)).status, 200);

        await server[Symbol.asyncDispose]();
        await until(Serving.NOT_SERVING);
        const ready = await fetch(`${running.operationsUrl}/readyz`);
        assert.deepEqual([ready.status, await ready.text()], [503, "not ready: database\n"]);
        assert.equal(
          (await fetch(`${running.operationsUrl}/healthz`)).status,
          200,
          "it is alive, and must not be restarted for this",
        );
        const apiKey =
          "clodei_sk_key_01m814q2e6e2wts2mp2sgrpzh9_0w91tmxjpzbzmp90pcbpfd0q3km7dge1dppjzc4295jzyg36tfca_99946744";
        assert.equal(
          await reasonOf(createClient(IdentityService, transportTo(running, apiKey)).whoAmI({})),
          "UNAVAILABLE",
        );

        server = await start();
        // The embedded server gives its roles their passwords back at its start.
        await run(["init-database"], { CLODEI_DATABASE_ADMIN_URL: administrator });
      } finally {
        await running.close();
      }
      const metrics = await fetch(`${running.operationsUrl}/metrics`).catch(() => undefined);
      assert.equal(metrics, undefined, "nothing listens any more");
      await server[Symbol.asyncDispose]();
    });
  });

  test("metrics count requests by service, method and code, and loopback alone can read them", async () => {
    await withFolder(async (folder) => {
      const flags = { "--data": folder, "--public-port": "0", "--node-port": "0", "--operations-port": "0" };
      const running = await startControlPlane(loadConfig({ environment: {}, flags }), { log: createLog("silent") });
      try {
        await reasonOf(createClient(IdentityService, transportTo(running)).whoAmI({}));
        const text = await (await fetch(`${running.operationsUrl}/metrics`)).text();
        assert.match(
          text,
          /clodei_rpc_requests_total\{service="clodei\.v1\.IdentityService",method="WhoAmI",code="unauthenticated"\} 1/,
        );
        assert.match(text, /process_resident_memory_bytes \d+/);
        assert.match(running.operationsUrl, /^http:\/\/127\.0\.0\.1:/);
        assert.equal((await fetch(`${running.operationsUrl}/secrets`)).status, 404);
        assert.equal((await fetch(`${running.operationsUrl}/metrics`, { method: "POST" })).status, 405);
      } finally {
        await running.close();
      }
    });
  });
});

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}
