import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { randomBytes, verify, X509Certificate } from "node:crypto";
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { formatEnrollmentToken } from "@clodei/proto/enrollment-token";
import { newId } from "@clodei/proto/ids";
import { renewalSignatureMessage } from "@clodei/proto/node-link";
import { publicKeyOfRequest, TestAuthority } from "../testing/authority.ts";
import { listen } from "../testing/control-plane.ts";
import type { TestListener } from "../testing/control-plane.ts";
import { enroll, EnrollmentError } from "./enroll.ts";
import { IdentityStore } from "./identity-store.ts";
import type { Identity } from "./identity-store.ts";
import { certificateRequest } from "./key.ts";
import { isExpired, renewalTimeMs, renewExpired } from "./renewal.ts";
import { StateFolder } from "./state-folder.ts";
import { checkTrustBundle, TrustError } from "./trust.ts";

const signal = new AbortController().signal;
const hourMs = 3_600_000;

interface Enrollment {
  readonly authority: TestAuthority;
  readonly listener: TestListener;
  readonly token: string;
  readonly store: IdentityStore;
  readonly folder: string;
  readonly keys: string[];
}

async function withEnrollment(
  work: (enrollment: Enrollment) => Promise<void>,
  options: {
    life?: { fromMs: number; toMs: number };
    names?: { type: "dns" | "ip"; value: string }[];
    loseFirstAnswer?: boolean;
    bundle?: (ca: TestAuthority) => Uint8Array[];
  } = {},
): Promise<void> {
  const authority = await TestAuthority.create();
  const nodeId = newId("nod");
  const keys: string[] = [];
  const challenge = new Uint8Array(randomBytes(32));
  let answers = 0;
  const issue = async (
    request: Uint8Array,
    life = options.life ?? { fromMs: Date.now() - 1000, toMs: Date.now() + hourMs },
  ) => ({
    certificate: await authority.issueNode(request, nodeId, life),
    trustBundle: options.bundle?.(authority) ?? [authority.rootDer],
    nodeEndpoint: "localhost:8444",
    expireTime: timestampFromMs(life.toMs),
  });
  await using listener = await listen({
    issued: await authority.issueServer(options.names ?? [{ type: "dns", value: "localhost" }]),
    routes: (router) =>
      router.service(EnrollmentService, {
        enroll: async ({ enrollmentToken, certificateRequest: csr }) => {
          keys.push((await publicKeyOfRequest(csr)).export({ format: "pem", type: "spki" }).toString());
          if (enrollmentToken !== token) throw new ConnectError("unknown token", Code.PermissionDenied);
          answers += 1;
          if (options.loseFirstAnswer === true && answers === 1) throw new ConnectError("lost", Code.Unavailable);
          const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
          return { nodeId, nodeName: "node-1", location, ...(await issue(csr)) };
        },
        createRenewalChallenge: () => ({ challenge, expireTime: timestampFromMs(Date.now() + 60_000) }),
        renewExpired: async (request) => {
          const old = new X509Certificate(request.certificate);
          const message = renewalSignatureMessage(request.challenge, request.certificateRequest);
          if (!verify("sha256", message, old.publicKey, request.signature))
            throw new ConnectError("bad signature", Code.PermissionDenied);
          return await issue(request.certificateRequest, { fromMs: Date.now() - 1000, toMs: Date.now() + hourMs });
        },
      }),
  });
  const token = formatEnrollmentToken({
    caDigestHex: authority.digestHex,
    id: newId("ent"),
    secret: randomBytes(32).toString("base64url"),
  });
  const folder = await mkdtemp(join(tmpdir(), "clodei-enroll-"));
  try {
    using state = await StateFolder.open(join(folder, "state"));
    await work({
      authority,
      listener,
      token,
      store: new IdentityStore(state.paths.identity),
      folder: state.paths.identity,
      keys,
    });
  } finally {
    await rm(folder, { recursive: true });
  }
}

describe("enrollment", () => {
  it("trusts the listener by the root that the token names, and keeps the key on the node", async () => {
    await withEnrollment(async ({ listener, token, store, folder }) => {
      const identity = await enroll({
        store,
        controlPlaneUrl: listener.url,
        token: ` ${token}\n`,
        agentVersion: "1",
        signal,
      });
      assert.match(identity.nodeId, /^nod_/);
      assert.equal(identity.location, "ES/madrid/kumo-1 (tier 4)");
      assert.equal((await stat(join(folder, "key.pem"))).mode & 0o777, 0o600);
      assert.equal((await stat(join(folder, ".."))).mode & 0o777, 0o700);
      const loaded = await store.load();
      assert.equal(loaded?.nodeId, identity.nodeId);
      assert.ok(loaded?.certificate.checkPrivateKey(loaded.key.privateKey));
    });
  });

  it("sends the same key again after a lost answer", async () => {
    await withEnrollment(
      async ({ listener, token, store, keys }) => {
        await enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal });
        assert.equal(keys.length, 2);
        assert.equal(keys[0], keys[1]);
      },
      { loseFirstAnswer: true },
    );
  });

  it("sends nothing to a listener whose chain lacks the token's root", async () => {
    const other = await TestAuthority.create("Another CA");
    await withEnrollment(async ({ listener, store }) => {
      const token = formatEnrollmentToken({
        caDigestHex: other.digestHex,
        id: newId("ent"),
        secret: randomBytes(32).toString("base64url"),
      });
      await assert.rejects(
        enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal }),
        (error: unknown) => {
          assert.ok(error instanceof EnrollmentError);
          assert.match(error.message, /cannot be verified, so the token was not sent/);
          assert.ok(!error.message.includes(token));
          return true;
        },
      );
      assert.equal(listener.requests(), 0);
      assert.equal(await store.load(), undefined);
    });
  });

  it("sends nothing to a listener of another host name, though its root is the token's", async () => {
    await withEnrollment(
      async ({ listener, token, store }) => {
        await assert.rejects(
          enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal }),
          EnrollmentError,
        );
        assert.equal(listener.requests(), 0);
      },
      { names: [{ type: "dns", value: "elsewhere.example" }] },
    );
  });

  it("refuses a trust bundle without the token's root, before it trusts anything", async () => {
    const other = await TestAuthority.create("Another CA");
    await withEnrollment(
      async ({ listener, token, store }) => {
        await assert.rejects(
          enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal }),
          TrustError,
        );
        assert.equal(await store.load(), undefined);
      },
      { bundle: () => [other.rootDer] },
    );
  });

  it("refuses a malformed token without a connection", async () => {
    await withEnrollment(async ({ listener, store }) => {
      await assert.rejects(
        enroll({ store, controlPlaneUrl: listener.url, token: "CLDT-1-nonsense", agentVersion: "1", signal }),
        EnrollmentError,
      );
      assert.equal(listener.requests(), 0);
    });
  });
});

describe("renewal of a certificate that ran out", () => {
  it("signs the server's challenge with the old key and takes a new key over", async () => {
    await withEnrollment(async ({ listener, token, store, authority }) => {
      const identity = await enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal });
      const old = await authority.issueNode(await certificateRequest(identity.key), identity.nodeId, {
        fromMs: Date.now() - hourMs,
        toMs: Date.now() - 1000,
      });
      const expired = { ...identity, certificate: new X509Certificate(old) };
      assert.ok(isExpired(expired.certificate, Date.now()));
      const renewed = await renewExpired(store, expired, signal);
      assert.ok(!isExpired(renewed.certificate, Date.now()));
      assert.notEqual(renewed.key.pem, identity.key.pem);
      assert.equal(renewed.enrollmentId, identity.enrollmentId);
      assert.equal((await store.load())?.key.pem, renewed.key.pem);
    });
  });

  it("comes at half of the certificate's life, 10 percent earlier or later", async () => {
    await withEnrollment(async ({ listener, token, store }) => {
      const { certificate } = await enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal });
      const begin = certificate.validFromDate.getTime();
      const life = certificate.validToDate.getTime() - begin;
      assert.equal(Math.round(((renewalTimeMs(certificate, () => 0) - begin) / life) * 1000), 450);
      assert.equal(Math.round(((renewalTimeMs(certificate, () => 1) - begin) / life) * 1000), 550);
    });
  });
});

describe("the identity's files", () => {
  it("hold one identity or the other wherever a change is cut off", async () => {
    await withEnrollment(async ({ listener, token, store, folder }) => {
      const change = () => enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal });
      const files = async () =>
        new Map(
          await Promise.all(
            (await readdir(folder)).map(async (name) => [name, await readFile(join(folder, name), "utf8")] as const),
          ),
        );
      const put = async (content: ReadonlyMap<string, string>) => {
        for (const name of await readdir(folder)) await rm(join(folder, name));
        for (const [name, text] of content) await writeFile(join(folder, name), text, { mode: 0o600 });
      };
      const first = await change();
      const before = await files();
      const second = await change();
      const after = await files();
      const [key, nextKey] = [first.key.pem, second.key.pem];
      assert.notEqual(key, nextKey);
      const [node, nextNode] = [before.get("node.json") ?? "", after.get("node.json") ?? ""];
      const whole = async () => {
        const identity = await store.load();
        return [identity?.enrollmentId, identity?.key.pem, identity?.certificate.serialNumber];
      };
      const parts = (identity: Identity) => [
        identity.enrollmentId,
        identity.key.pem,
        identity.certificate.serialNumber,
      ];
      // Before the rename of node.json, and between it and the key's: there is no other moment.
      await put(new Map([...before, ["key.next.pem", nextKey], ["node.json.new", nextNode.slice(0, 100)]]));
      assert.deepEqual(await whole(), parts(first));
      assert.equal(node, await readFile(join(folder, "node.json"), "utf8"));
      await put(
        new Map([
          ["key.pem", key],
          ["key.next.pem", nextKey],
          ["node.json", nextNode],
        ]),
      );
      assert.deepEqual(await whole(), parts(second));
      assert.deepEqual(await files(), after);
    });
  });

  it("of an earlier agent are read, and gone after the next change", async () => {
    await withEnrollment(async ({ listener, token, store, folder }) => {
      const change = () => enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal });
      const identity = await change();
      const { certificate, trust, ...description } = JSON.parse(
        await readFile(join(folder, "node.json"), "utf8"),
      ) as Record<string, string>;
      await writeFile(join(folder, "certificate.pem"), certificate ?? "");
      await writeFile(join(folder, "trust.pem"), trust ?? "");
      await writeFile(join(folder, "node.json"), JSON.stringify(description));
      const loaded = await store.load();
      assert.deepEqual(
        [loaded?.nodeId, loaded?.certificate.serialNumber, loaded?.roots.length],
        [identity.nodeId, identity.certificate.serialNumber, 1],
      );
      await change();
      assert.deepEqual((await readdir(folder)).toSorted(), ["key.pem", "node.json"]);
    });
  });

  it("are refused when others may read the key", async () => {
    await withEnrollment(async ({ listener, token, store, folder }) => {
      await enroll({ store, controlPlaneUrl: listener.url, token, agentVersion: "1", signal });
      await chmod(join(folder, "key.pem"), 0o640);
      await assert.rejects(store.load(), /0600/);
    });
  });
});

describe("a trust bundle", () => {
  it("may hold a successor that the token's root signed, and no other root", async () => {
    const [one, two, stranger] = await Promise.all(
      ["one", "two", "stranger"].map((name) => TestAuthority.create(name)),
    );
    assert.ok(one !== undefined && two !== undefined && stranger !== undefined);
    const cross = await one.crossSign(two);
    assert.equal(checkTrustBundle([one.rootDer, cross, two.rootDer], one.digestHex).length, 3);
    assert.throws(() => checkTrustBundle([one.rootDer, two.rootDer], one.digestHex), TrustError);
    assert.throws(() => checkTrustBundle([one.rootDer, stranger.rootDer], one.digestHex), TrustError);
    assert.throws(() => checkTrustBundle([], one.digestHex), TrustError);
  });
});
