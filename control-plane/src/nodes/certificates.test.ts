import assert from "node:assert/strict";
import { generateKeyPairSync, randomUUID, X509Certificate } from "node:crypto";
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import tls from "node:tls";
import { newId } from "@clodei/proto/ids";
import fc from "fast-check";
import { Authority } from "./authority.ts";
import { openAuthority } from "./authority-store.ts";
import { readCertificateRequest, readNodeCertificate } from "./certificates.ts";
import { createNodeKey, pemOf, rewritePrivateKey } from "./test-node.ts";

const now = new Date();
const location = { country: "ES", region: "madrid", datacenter: "kumo-1", tier: 4 };
const dayMs = 24 * 60 * 60 * 1000;

async function newAuthority(trustDomain = "clodei.com"): Promise<Authority> {
  const { certificatePem, privateKeyPem } = await Authority.generate(now);
  return Authority.fromPem(certificatePem, privateKeyPem, trustDomain, now);
}

async function newNode(authority: Authority) {
  const key = await createNodeKey();
  const nodeId = newId("nod");
  const issued = await authority.issueNodeCertificate({
    nodeId,
    location,
    publicKey: key.publicKey,
    lifetimeMs: dayMs,
    now,
  });
  return { key, nodeId, issued };
}

describe("certificates", () => {
  test("a node's certificate is signed by the root, for clients only, and says who and where the node is", async () => {
    const authority = await newAuthority();
    const { nodeId, issued } = await newNode(authority);
    const root = new X509Certificate(authority.certificatePem);
    const leaf = new X509Certificate(issued.der);
    assert.ok(leaf.checkIssued(root));
    assert.ok(leaf.verify(root.publicKey));
    assert.ok(root.ca);
    assert.ok(!leaf.ca);
    assert.deepEqual(leaf.keyUsage, ["1.3.6.1.5.5.7.3.2"]);
    assert.equal(leaf.subjectAltName, `URI:spiffe://clodei.com/node/${nodeId}`);
    assert.equal(leaf.subject, `C=ES\nST=madrid\nL=kumo-1\nOU=tier-4\nCN=${nodeId}`);
    assert.equal(Date.parse(leaf.validTo), Math.floor((now.getTime() + dayMs) / 1000) * 1000);
    assert.deepEqual(readNodeCertificate(issued.der), {
      nodeId,
      trustDomain: "clodei.com",
      location,
      serial: issued.serial,
      notBefore: issued.notBefore,
      notAfter: issued.notAfter,
      publicKey: issued.publicKey,
    });
    assert.equal(leaf.serialNumber.toLowerCase().padStart(32, "0"), issued.serial.padStart(32, "0"));
    assert.match(issued.serial, /^[0-9a-f]{24,32}$/);
  });

  test("the digest of the tokens is the sha256 of the root's DER", async () => {
    const authority = await newAuthority();
    const root = new X509Certificate(authority.certificatePem);
    assert.equal(root.fingerprint256.replaceAll(":", "").toLowerCase(), authority.digestHex);
    assert.deepEqual(Buffer.from(authority.trustBundle[0] ?? []), root.raw);
  });

  test("only what this authority signed for its own trust domain counts as issued", async () => {
    const authority = await newAuthority();
    const { issued, nodeId } = await newNode(authority);
    assert.equal(authority.issued(issued.der)?.nodeId, nodeId);
    const { issued: foreign } = await newNode(await newAuthority());
    assert.equal(authority.issued(foreign.der), undefined);
    assert.equal(readNodeCertificate(foreign.der)?.location.region, "madrid");
    const tampered = new Uint8Array(issued.der);
    tampered[tampered.length - 1] = (tampered.at(-1) ?? 0) ^ 1;
    assert.equal(authority.issued(tampered), undefined);
    const listener = await authority.issueListenerCertificate(["localhost"], now);
    assert.equal(authority.issued(new X509Certificate(listener.certificateChainPem).raw), undefined);
    assert.equal(authority.issued(authority.trustBundle[0] ?? new Uint8Array()), undefined);
  });

  test("a replica's certificate is for both ends of a link, and passes for no node, nor a node's for a replica", async () => {
    const authority = await newAuthority();
    const replicaId = randomUUID();
    const { certificateChainPem, renewTime, expireTime } = await authority.issueReplicaCertificate(replicaId, now);
    const leaf = new X509Certificate(certificateChainPem);
    assert.equal(leaf.subjectAltName, `URI:spiffe://clodei.com/control-plane/${replicaId}`);
    assert.deepEqual(leaf.keyUsage?.toSorted(), ["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"]);
    assert.ok(renewTime < expireTime && expireTime.getTime() - now.getTime() <= dayMs);
    assert.deepEqual(authority.issuedReplica(leaf.raw), {
      replicaId,
      trustDomain: "clodei.com",
      notAfter: new Date(leaf.validTo),
    });
    assert.equal(authority.issued(leaf.raw), undefined);
    const { issued } = await newNode(authority);
    assert.equal(authority.issuedReplica(issued.der), undefined);
    const listener = await authority.issueListenerCertificate([`spiffe://clodei.com/control-plane/${replicaId}`], now);
    assert.equal(authority.issuedReplica(new X509Certificate(listener.certificateChainPem).raw), undefined);
    const [elsewhere, foreign] = await Promise.all([newAuthority("example.com"), newAuthority()]);
    for (const other of [elsewhere, foreign]) {
      const theirs = new X509Certificate((await other.issueReplicaCertificate(replicaId, now)).certificateChainPem);
      assert.equal(authority.issuedReplica(theirs.raw), undefined);
    }
  });

  test("replicas derive the same secret from one key, whatever the form of its PEM", async () => {
    const { certificatePem, privateKeyPem } = await Authority.generate(now);
    const one = await Authority.fromPem(certificatePem, privateKeyPem, "clodei.com", now);
    const two = await Authority.fromPem(certificatePem, rewritePrivateKey(privateKeyPem, "sec1"), "clodei.com", now);
    assert.deepEqual(one.deriveSecret("a"), two.deriveSecret("a"));
    assert.notDeepEqual(one.deriveSecret("a"), one.deriveSecret("b"));
    assert.notDeepEqual(one.deriveSecret("a"), (await newAuthority()).deriveSecret("a"));
  });

  test("certificate and key that do not fit are refused with what is wrong", async () => {
    const one = await Authority.generate(now);
    const two = await Authority.generate(now);
    const from = (certificate: string, key: string, at = now): Promise<Authority> =>
      Authority.fromPem(certificate, key, "clodei.com", at);
    await assert.rejects(from(one.certificatePem, two.privateKeyPem), /does not belong/);
    await assert.rejects(from("nonsense", one.privateKeyPem), /cannot be read/);
    await assert.rejects(from(one.certificatePem, "nonsense"), /cannot be read/);
    await assert.rejects(
      from(one.certificatePem, one.privateKeyPem, new Date(now.getTime() + 11 * 365 * dayMs)),
      /valid from/,
    );
    const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
    await assert.rejects(
      from(one.certificatePem, privateKey.export({ type: "pkcs8", format: "pem" }).toString()),
      /P-256/,
    );
    const authority = await from(one.certificatePem, one.privateKeyPem);
    const listener = await authority.issueListenerCertificate(["localhost"], now);
    await assert.rejects(from(listener.certificateChainPem, listener.privateKeyPem), /not a CA/);
    await assert.rejects(Authority.fromPem(one.certificatePem, one.privateKeyPem, "Not A Domain", now), /trust domain/);
  });
});

describe("certificate requests", () => {
  test("the key of a well-formed request is taken, and nothing else of it", async () => {
    const key = await createNodeKey();
    const read = await readCertificateRequest(key.certificateRequest);
    assert.deepEqual(read?.publicKey, key.publicKey);
    const elsewhere = await createNodeKey("CN=nod_00000000000000000000000000, O=root");
    assert.ok(await readCertificateRequest(elsewhere.certificateRequest));
  });

  test("no tampering gets another key in, and every byte of what is signed counts", async () => {
    const { certificateRequest, publicKey } = await createNodeKey();
    // The outer header has 3 bytes, that of the signed part 2, of which the second is its length.
    const signedEnd = 3 + 2 + (certificateRequest[4] ?? 0);
    assert.ok(signedEnd < certificateRequest.length);
    for (let at = 0; at < certificateRequest.length; at += 1) {
      const tampered = new Uint8Array(certificateRequest);
      tampered[at] = (tampered[at] ?? 0) ^ (1 << (at % 8));
      const read = await readCertificateRequest(tampered);
      // Behind the signed part the library takes some spellings of the same signature.
      if (at < signedEnd) assert.equal(read, undefined, `byte ${at} of ${certificateRequest.length}`);
      else if (read !== undefined) assert.deepEqual(read.publicKey, publicKey);
    }
  });

  test("a request for another kind of key is refused", async () => {
    for (const algorithm of [
      { name: "ECDSA", namedCurve: "P-384", hash: "SHA-384" },
      { name: "RSASSA-PKCS1-v1_5", hash: "SHA-256", publicExponent: new Uint8Array([1, 0, 1]), modulusLength: 2048 },
    ]) {
      const { certificateRequest } = await createNodeKey("CN=x", algorithm);
      assert.equal(await readCertificateRequest(certificateRequest), undefined, algorithm.name);
    }
  });

  test("a request signed by another key, PEM, and any bytes at all are refused without an error", async () => {
    const [one, two] = [await createNodeKey(), await createNodeKey()];
    const text = Buffer.from(pemOf(one.certificateRequest, "CERTIFICATE REQUEST"));
    assert.equal(await readCertificateRequest(text), undefined);
    // The key of one inside the request of the other: both have the same length.
    const stolen = Buffer.from(one.certificateRequest);
    const position = stolen.indexOf(Buffer.from(one.publicKey));
    assert.ok(position > 0);
    Buffer.from(two.publicKey).copy(stolen, position);
    assert.equal(await readCertificateRequest(stolen), undefined);
    await fc.assert(
      fc.asyncProperty(fc.uint8Array({ maxLength: 200 }), async (bytes) => {
        assert.equal(await readCertificateRequest(new Uint8Array([0x30, ...bytes])), undefined);
        assert.equal(readNodeCertificate(new Uint8Array([0x30, ...bytes])), undefined);
      }),
      { numRuns: 200 },
    );
  });
});

describe("over TLS 1.3", () => {
  test("listener and node accept each other, and neither certificate serves for the other's purpose", async () => {
    const authority = await newAuthority();
    const listener = await authority.issueListenerCertificate(["localhost", "127.0.0.1", "::1"], now);
    const node = await newNode(authority);
    const stranger = await newNode(await newAuthority());
    const server = { cert: listener.certificateChainPem, key: listener.privateKeyPem };
    const client = { cert: pemOf(node.issued.der, "CERTIFICATE"), key: node.key.privateKeyPem };
    const serialOf = (der: Uint8Array): string => new X509Certificate(der).serialNumber;

    const met = await handshake(authority, server, client);
    assert.equal(met.seenByServer, serialOf(node.issued.der));
    assert.equal(met.protocol, "TLSv1.3");
    assert.deepEqual(met.rootSentByServer, Buffer.from(authority.trustBundle[0] ?? []), "the listener sends its root");

    await assert.rejects(handshake(authority, server, server), "a listener's certificate is no client's");
    await assert.rejects(handshake(authority, client, client), "a node's certificate is no server's");
    await assert.rejects(handshake(authority, server, undefined), "no certificate");
    const foreign = { cert: pemOf(stranger.issued.der, "CERTIFICATE"), key: stranger.key.privateKeyPem };
    await assert.rejects(handshake(authority, server, foreign), "a certificate of another CA");
  });
});

type Side = { readonly cert: string; readonly key: string };

/** Meets once, both ways: the server's refusal of a client under TLS 1.3 shows at the first byte. */
async function handshake(authority: Authority, server: Side, client: Side | undefined) {
  const ca = authority.certificatePem;
  let seenByServer = "";
  const listener = tls.createServer(
    { ...server, ca, requestCert: true, rejectUnauthorized: true, minVersion: "TLSv1.3" },
    (socket) => {
      seenByServer = socket.getPeerX509Certificate()?.serialNumber ?? "";
      socket.on("error", () => undefined);
      socket.end("welcome");
    },
  );
  listener.on("tlsClientError", () => undefined);
  await new Promise<void>((resolve) => {
    listener.listen(0, "127.0.0.1", resolve);
  });
  const { port } = listener.address() as AddressInfo;
  try {
    return await new Promise<{ seenByServer: string; protocol: string | null; rootSentByServer: Buffer | undefined }>(
      (resolve, reject) => {
        const socket = tls.connect({ ...client, ca, port, host: "127.0.0.1", servername: "localhost" });
        let root: Buffer | undefined;
        socket.once("secureConnect", () => {
          root = socket.getPeerX509Certificate()?.issuerCertificate?.raw;
        });
        socket.once("error", reject);
        socket.once("data", () => resolve({ seenByServer, protocol: socket.getProtocol(), rootSentByServer: root }));
        socket.once("end", () => socket.destroy());
        socket.once("close", () => reject(new Error("closed without a word")));
      },
    );
  } finally {
    listener.close();
  }
}

describe("the CA's folder", () => {
  test("is made once with a private key file, and opened again, also by two at once", async (context) => {
    const folder = join(await mkdtemp(join(tmpdir(), "clodei-ca-")), "ca");
    context.after(() => rm(join(folder, ".."), { recursive: true, force: true }));
    const source = { folder, trustDomain: "clodei.com" };
    const [one, two] = await Promise.all([openAuthority(source, now), openAuthority(source, now)]);
    const three = await openAuthority(source, now);
    assert.equal(one.digestHex, two.digestHex);
    assert.equal(one.digestHex, three.digestHex);
    assert.deepEqual((await readdir(folder)).toSorted(), ["authority.pem", "certificate.pem"]);
    assert.equal((await stat(folder)).mode & 0o777, 0o700);
    assert.equal((await stat(join(folder, "authority.pem"))).mode & 0o777, 0o600);
    assert.doesNotMatch(await readFile(join(folder, "certificate.pem"), "utf8"), /PRIVATE/);
  });

  test("is refused where others may read the key, and where the file is not whole", async (context) => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-ca-"));
    context.after(() => rm(folder, { recursive: true, force: true }));
    const source = { folder, trustDomain: "clodei.com" };
    await openAuthority(source, now);
    const path = join(folder, "authority.pem");
    await chmod(path, 0o644);
    await assert.rejects(openAuthority(source, now), /chmod 600/);
    await chmod(path, 0o600);
    await writeFile(path, "half");
    await assert.rejects(openAuthority(source, now), /backup/);
  });

  test("is not needed where PEM files are mounted", async (context) => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-ca-"));
    context.after(() => rm(folder, { recursive: true, force: true }));
    const { certificatePem, privateKeyPem } = await Authority.generate(now);
    const files = { certificateFile: join(folder, "tls.crt"), privateKeyFile: join(folder, "tls.key") };
    await writeFile(files.certificateFile, certificatePem);
    await writeFile(files.privateKeyFile, privateKeyPem);
    const authority = await openAuthority({ folder: join(folder, "ca"), files, trustDomain: "clodei.com" }, now);
    assert.equal(authority.certificatePem.trim(), certificatePem.trim());
    assert.deepEqual((await readdir(folder)).toSorted(), ["tls.crt", "tls.key"]);
  });
});
