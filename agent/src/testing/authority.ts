// A certificate authority for tests: the real thing, only short-lived and without a database.

import "reflect-metadata";
import { createHash, createPublicKey, X509Certificate } from "node:crypto";
import * as x509 from "@peculiar/x509";

const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" } as const;
const hourMs = 3_600_000;

/** A certificate with its key, in PEM. */
export interface Issued {
  readonly certificatePem: string;
  readonly keyPem: string;
}

/** A root and what it issues. */
export class TestAuthority {
  readonly root: x509.X509Certificate;
  readonly #keys: CryptoKeyPair;

  private constructor(root: x509.X509Certificate, keys: CryptoKeyPair) {
    this.root = root;
    this.#keys = keys;
  }

  static async create(name = "Test CA"): Promise<TestAuthority> {
    const keys = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
    const root = await x509.X509CertificateGenerator.createSelfSigned({
      name: `CN=${name}`,
      keys,
      signingAlgorithm: algorithm,
      notBefore: new Date(Date.now() - hourMs),
      notAfter: new Date(Date.now() + hourMs),
      extensions: [
        new x509.BasicConstraintsExtension(true, 1, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign, true),
      ],
    });
    return new TestAuthority(root, keys);
  }

  /** The root in DER. */
  get rootDer(): Uint8Array<ArrayBuffer> {
    return new Uint8Array(this.root.rawData);
  }

  get rootPem(): string {
    return new X509Certificate(this.rootDer).toString();
  }

  /** sha256 of the root, as enrollment tokens carry it. */
  get digestHex(): string {
    return createHash("sha256").update(this.rootDer).digest("hex");
  }

  /** A listener's certificate for DNS names and addresses. Its chain includes the root. */
  async issueServer(names: readonly { readonly type: "dns" | "ip"; readonly value: string }[]): Promise<Issued> {
    const keys = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
    const certificate = await x509.X509CertificateGenerator.create({
      subject: "CN=listener",
      issuer: this.root.subject,
      publicKey: keys.publicKey,
      signingKey: this.#keys.privateKey,
      signingAlgorithm: algorithm,
      notBefore: new Date(Date.now() - hourMs),
      notAfter: new Date(Date.now() + hourMs),
      extensions: [
        new x509.SubjectAlternativeNameExtension([...names]),
        new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.serverAuth]),
      ],
    });
    const key = Buffer.from(await crypto.subtle.exportKey("pkcs8", keys.privateKey)).toString("base64");
    return {
      certificatePem: pemOf(certificate) + this.rootPem,
      keyPem: `-----BEGIN PRIVATE KEY-----\n${key}\n-----END PRIVATE KEY-----\n`,
    };
  }

  /** A node's certificate for the public key of a request. */
  async issueNode(
    request: Uint8Array,
    nodeId: string,
    life: { readonly fromMs: number; readonly toMs: number },
  ): Promise<Uint8Array<ArrayBuffer>> {
    const parsed = new x509.Pkcs10CertificateRequest(new Uint8Array(request));
    if (!(await parsed.verify())) throw new Error("the request is not signed by its key");
    const certificate = await x509.X509CertificateGenerator.create({
      subject: `CN=${nodeId}`,
      issuer: this.root.subject,
      publicKey: parsed.publicKey,
      signingKey: this.#keys.privateKey,
      signingAlgorithm: algorithm,
      notBefore: new Date(life.fromMs),
      notAfter: new Date(life.toMs),
      extensions: [
        new x509.SubjectAlternativeNameExtension([{ type: "url", value: `spiffe://clodei.com/node/${nodeId}` }]),
        new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.clientAuth]),
      ],
    });
    return new Uint8Array(certificate.rawData);
  }

  /** Another authority's root, signed by this one: how a successor is vouched for. */
  async crossSign(other: TestAuthority): Promise<Uint8Array<ArrayBuffer>> {
    const certificate = await x509.X509CertificateGenerator.create({
      subject: other.root.subject,
      issuer: this.root.subject,
      publicKey: await other.root.publicKey.export(),
      signingKey: this.#keys.privateKey,
      signingAlgorithm: algorithm,
      notBefore: new Date(Date.now() - hourMs),
      notAfter: new Date(Date.now() + hourMs),
      extensions: [new x509.BasicConstraintsExtension(true, 1, true)],
    });
    return new Uint8Array(certificate.rawData);
  }
}

/** The public key of a PKCS #10 request. */
export async function publicKeyOfRequest(request: Uint8Array): Promise<ReturnType<typeof createPublicKey>> {
  const parsed = new x509.Pkcs10CertificateRequest(new Uint8Array(request));
  return createPublicKey({ key: Buffer.from(parsed.publicKey.rawData), format: "der", type: "spki" });
}

function pemOf(certificate: x509.X509Certificate): string {
  return new X509Certificate(new Uint8Array(certificate.rawData)).toString();
}
