/**
 * The certificate authority of the node link: one root with a P-256 key, that signs nodes', listeners' and
 * replicas' certificates itself. Its digest stands in every enrollment token, so a node trusts exactly this root.
 * Made at first start in DATA/ca, or given as PEM from a mounted secret (needed where there are several replicas).
 */
import "reflect-metadata"; // before @peculiar/x509, which needs it at import
import { createHash, createPrivateKey, hkdfSync, type KeyObject, randomBytes, X509Certificate } from "node:crypto";
import { isIP } from "node:net";
import * as x509 from "@peculiar/x509";
import type { NodeId } from "@clodei/proto/ids";
import {
  clientAuth,
  importPublicKey,
  keyAlgorithm,
  type NodeCertificate,
  parseCertificate,
  readNodeCertificate,
  readReplicaCertificate,
  type ReplicaCertificate,
  replicaSpiffeIdOf,
  serverAuth,
  signatureAlgorithm,
  spiffeIdOf,
  subjectOf,
} from "./certificates.ts";
import type { NodeLocation } from "./model.ts";

const dayMs = 24 * 60 * 60 * 1000;

/** Nodes carry the root's digest in their tokens and the root in their state: it outlives the machines. */
const rootLifetimeMs = 10 * 365 * dayMs;

/** Renewed at half of it without a restart; long enough that a listener that cannot renew is noticed first. */
const listenerLifetimeMs = 7 * dayMs;

/**
 * Roots and listeners' certificates begin this long before they are made: a node whose clock is slow must still
 * be able to connect, and be told the time.
 */
const listenerBackdateMs = dayMs;

/** The control plane alone judges a node's certificate: only the clocks of its replicas have to agree. */
const nodeBackdateMs = 5 * 60 * 1000;

/** Nobody revokes a replica: its certificate is as short as a node's, and renewed at half of it. */
const replicaLifetimeMs = dayMs;

/** 128 random bits: unique without asking anybody, and nothing to guess. */
const serialBytes = 16;

/** A certificate that was made for a node. */
export type IssuedNodeCertificate = NodeCertificate & { readonly der: Uint8Array<ArrayBuffer> };

/** What a TLS listener needs. */
type KeyedCertificate = {
  /** PEM of the certificate and of the root: an agent that knows only the root's digest takes it from here. */
  readonly certificateChainPem: string;
  readonly privateKeyPem: string;
  readonly expireTime: Date;
  /** When to ask for the next one: at half-life. */
  readonly renewTime: Date;
};

/** Signs certificates. */
export class Authority {
  readonly trustDomain: string;
  /** PEM of the root. */
  readonly certificatePem: string;
  /** DER of the roots that nodes trust. One root until a rotation is built. */
  readonly trustBundle: readonly Uint8Array<ArrayBuffer>[];
  /** sha256 of the root's DER, as enrollment tokens carry it. */
  readonly digestHex: string;
  readonly #root: x509.X509Certificate;
  readonly #rootForVerify: X509Certificate;
  readonly #signingKey: CryptoKey;
  readonly #privateKey: KeyObject;

  private constructor(root: x509.X509Certificate, signingKey: CryptoKey, privateKey: KeyObject, trustDomain: string) {
    const der = new Uint8Array(root.rawData);
    this.trustDomain = trustDomain;
    this.certificatePem = `${root.toString("pem")}\n`;
    this.trustBundle = [der];
    this.digestHex = createHash("sha256").update(der).digest("hex");
    this.#root = root;
    this.#rootForVerify = new X509Certificate(der);
    this.#signingKey = signingKey;
    this.#privateKey = privateKey;
  }

  /**
   * Takes an authority from PEM.
   *
   * @throws Error that says what is wrong: not a CA, not P-256, key and certificate not of one pair, out of time.
   */
  static async fromPem(
    certificatePem: string,
    privateKeyPem: string,
    trustDomain: string,
    now: Date,
  ): Promise<Authority> {
    checkTrustDomain(trustDomain);
    const root = parseRoot(certificatePem);
    const privateKey = parsePrivateKey(privateKeyPem);
    if (!new X509Certificate(new Uint8Array(root.rawData)).checkPrivateKey(privateKey)) {
      throw new Error("the CA's private key does not belong to its certificate: give the two of one pair");
    }
    if (!(await root.isSelfSigned())) throw new Error("the CA's certificate must be a self-signed root");
    if (now < root.notBefore || now >= root.notAfter) {
      throw new Error(
        `the CA's certificate is valid from ${root.notBefore.toISOString()} to ${root.notAfter.toISOString()} only`,
      );
    }
    const signingKey = await globalThis.crypto.subtle.importKey(
      "pkcs8",
      new Uint8Array(privateKey.export({ type: "pkcs8", format: "der" })),
      keyAlgorithm,
      false,
      ["sign"],
    );
    return new Authority(root, signingKey, privateKey, trustDomain);
  }

  /** Makes a new root. The private key comes back as PEM, to be stored; the authority itself is made by fromPem. */
  static async generate(now: Date): Promise<{ certificatePem: string; privateKeyPem: string }> {
    const keys = await globalThis.crypto.subtle.generateKey(keyAlgorithm, true, ["sign", "verify"]);
    const root = await x509.X509CertificateGenerator.createSelfSigned({
      serialNumber: newSerial(),
      // The random part tells installations apart where their roots lie side by side in a trust store.
      name: [{ O: ["Clodei"] }, { CN: [`Clodei CA ${randomBytes(4).toString("hex")}`] }],
      keys,
      notBefore: new Date(now.getTime() - listenerBackdateMs),
      notAfter: new Date(now.getTime() + rootLifetimeMs),
      signingAlgorithm: signatureAlgorithm,
      extensions: [
        new x509.BasicConstraintsExtension(true, 0, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
        await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
      ],
    });
    return { certificatePem: `${root.toString("pem")}\n`, privateKeyPem: await exportPrivateKeyPem(keys.privateKey) };
  }

  /** Makes a node's certificate for a key that the node proved to hold. Good for TLS clients, and nothing else. */
  async issueNodeCertificate(options: {
    readonly nodeId: NodeId;
    readonly location: NodeLocation;
    readonly publicKey: Uint8Array<ArrayBuffer>;
    readonly lifetimeMs: number;
    readonly now: Date;
  }): Promise<IssuedNodeCertificate> {
    const certificate = await x509.X509CertificateGenerator.create({
      serialNumber: newSerial(),
      subject: subjectOf(options.nodeId, options.location),
      issuer: this.#root.subjectName,
      publicKey: await importPublicKey(options.publicKey),
      signingKey: this.#signingKey,
      notBefore: new Date(options.now.getTime() - nodeBackdateMs),
      notAfter: wholeSecond(options.now.getTime() + options.lifetimeMs),
      signingAlgorithm: signatureAlgorithm,
      extensions: [
        new x509.BasicConstraintsExtension(false, undefined, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
        new x509.ExtendedKeyUsageExtension([clientAuth], true),
        new x509.SubjectAlternativeNameExtension([
          { type: "url", value: spiffeIdOf(this.trustDomain, options.nodeId) },
        ]),
        await x509.AuthorityKeyIdentifierExtension.create(this.#root.publicKey),
      ],
    });
    const der = new Uint8Array(certificate.rawData);
    const read = readNodeCertificate(der);
    if (read === undefined) throw new Error(`the certificate made for ${options.nodeId} cannot be read back`);
    return { ...read, der };
  }

  /**
   * Makes a listener's certificate, with a key of its own.
   *
   * @param names Host names and addresses by which the listener is reached; at least one.
   */
  async issueListenerCertificate(names: readonly string[], now: Date): Promise<KeyedCertificate> {
    const [first] = names;
    if (first === undefined) throw new Error("a listener's certificate needs at least one name");
    return this.#issueWithKey({
      commonName: first.slice(0, 64), // 64 characters are the most that X.520 allows; clients look at the SAN
      names: names.map((value) => (isIP(value) === 0 ? { type: "dns", value } : { type: "ip", value })),
      usages: [serverAuth],
      backdateMs: listenerBackdateMs,
      lifetimeMs: listenerLifetimeMs,
      now,
    });
  }

  /** Makes a replica's certificate, with a key of its own. Good for both ends of the link between replicas. */
  issueReplicaCertificate(replicaId: string, now: Date): Promise<KeyedCertificate> {
    return this.#issueWithKey({
      commonName: replicaId,
      names: [{ type: "url", value: replicaSpiffeIdOf(this.trustDomain, replicaId) }],
      usages: replicaUsages,
      // The replicas' clocks alone have to agree, as with nodes' certificates.
      backdateMs: nodeBackdateMs,
      lifetimeMs: replicaLifetimeMs,
      now,
    });
  }

  async #issueWithKey(options: {
    readonly commonName: string;
    readonly names: x509.JsonGeneralName[];
    readonly usages: readonly x509.ExtendedKeyUsage[];
    readonly backdateMs: number;
    readonly lifetimeMs: number;
    readonly now: Date;
  }): Promise<KeyedCertificate> {
    const { now } = options;
    const keys = await globalThis.crypto.subtle.generateKey(keyAlgorithm, true, ["sign", "verify"]);
    const expireTime = new Date(
      Math.min(wholeSecond(now.getTime() + options.lifetimeMs).getTime(), this.#root.notAfter.getTime()),
    );
    const certificate = await x509.X509CertificateGenerator.create({
      serialNumber: newSerial(),
      subject: [{ CN: [options.commonName] }],
      issuer: this.#root.subjectName,
      publicKey: keys.publicKey,
      signingKey: this.#signingKey,
      notBefore: new Date(now.getTime() - options.backdateMs),
      notAfter: expireTime,
      signingAlgorithm: signatureAlgorithm,
      extensions: [
        new x509.BasicConstraintsExtension(false, undefined, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
        new x509.ExtendedKeyUsageExtension([...options.usages]),
        new x509.SubjectAlternativeNameExtension(options.names),
        await x509.AuthorityKeyIdentifierExtension.create(this.#root.publicKey),
      ],
    });
    return {
      certificateChainPem: `${certificate.toString("pem")}\n${this.certificatePem}`,
      privateKeyPem: await exportPrivateKeyPem(keys.privateKey),
      expireTime,
      renewTime: new Date((now.getTime() + expireTime.getTime()) / 2),
    };
  }

  /**
   * The node certificate in this DER, where this authority signed it for its own trust domain. Says nothing about
   * expiry or revocation.
   */
  issued(der: Uint8Array): NodeCertificate | undefined {
    const read = readNodeCertificate(der);
    return read?.trustDomain === this.trustDomain && this.#signed(der, [clientAuth]) ? read : undefined;
  }

  /** The same for a replica's certificate. */
  issuedReplica(der: Uint8Array): ReplicaCertificate | undefined {
    const read = readReplicaCertificate(der);
    return read?.trustDomain === this.trustDomain && this.#signed(der, replicaUsages) ? read : undefined;
  }

  /** Whether this authority signed the certificate, for these uses and no others: no kind passes for another. */
  #signed(der: Uint8Array, usages: readonly x509.ExtendedKeyUsage[]): boolean {
    try {
      const own = new X509Certificate(der);
      if (!own.checkIssued(this.#rootForVerify) || !own.verify(this.#rootForVerify.publicKey)) return false;
    } catch {
      return false;
    }
    const found = parseCertificate(der)?.getExtension(x509.ExtendedKeyUsageExtension)?.usages ?? [];
    return found.length === usages.length && usages.every((usage) => found.includes(usage));
  }

  /**
   * A secret that all replicas share because they share this authority. Another purpose gives an unrelated secret.
   */
  deriveSecret(purpose: string): Uint8Array<ArrayBuffer> {
    // The scalar itself: PEM files of one key can differ in form, and replicas must agree.
    const { d = "" } = this.#privateKey.export({ format: "jwk" });
    if (d === "") throw new Error("the CA's private key has no scalar");
    return new Uint8Array(hkdfSync("sha256", Buffer.from(d, "base64url"), Buffer.alloc(0), purpose, 32));
  }
}

const replicaUsages = [clientAuth, serverAuth];

/** The trust domain stands in a URI that is matched byte by byte: lower case, as SPIFFE wants it. */
function checkTrustDomain(trustDomain: string): void {
  if (!/^[a-z0-9]([a-z0-9.-]{0,253}[a-z0-9])?$/.test(trustDomain)) {
    throw new Error(
      `the trust domain ${JSON.stringify(trustDomain)} must be a DNS name in lower case, for example clodei.com`,
    );
  }
}

function parseRoot(certificatePem: string): x509.X509Certificate {
  let root: x509.X509Certificate;
  try {
    root = new x509.X509Certificate(new Uint8Array(new X509Certificate(certificatePem).raw));
  } catch (cause) {
    throw new Error("the CA's certificate cannot be read: it must be one certificate in PEM", { cause });
  }
  if (root.getExtension(x509.BasicConstraintsExtension)?.ca !== true) {
    throw new Error("the CA's certificate is not a CA (basicConstraints CA:TRUE is missing)");
  }
  return root;
}

function parsePrivateKey(privateKeyPem: string): KeyObject {
  let key: KeyObject;
  try {
    key = createPrivateKey(privateKeyPem);
  } catch {
    throw new Error("the CA's private key cannot be read: it must be PEM without a passphrase"); // no cause: it could quote the key
  }
  if (key.asymmetricKeyType !== "ec" || key.asymmetricKeyDetails?.namedCurve !== "prime256v1") {
    throw new Error("the CA's private key must be an ECDSA key on P-256");
  }
  return key;
}

async function exportPrivateKeyPem(key: CryptoKey): Promise<string> {
  return x509.PemConverter.encode(await globalThis.crypto.subtle.exportKey("pkcs8", key), "PRIVATE KEY") + "\n";
}

function newSerial(): string {
  return randomBytes(serialBytes).toString("hex");
}

/** X.509 knows whole seconds only: rounded down, so that what we store is what the certificate says. */
function wholeSecond(timeMs: number): Date {
  return new Date(Math.floor(timeMs / 1000) * 1000);
}
