// What a node brings to its enrollment, for tests: a key of its own and a certificate request.
import "reflect-metadata"; // before @peculiar/x509, which needs it at import
import { createPrivateKey, sign } from "node:crypto";
import * as x509 from "@peculiar/x509";
import { renewalSignatureMessage } from "@clodei/proto/node-link";
import { keyAlgorithm, signatureAlgorithm } from "./certificates.ts";

/** A node's key, and its request. */
export type NodeKey = {
  /** DER of the SubjectPublicKeyInfo. */
  readonly publicKey: Uint8Array<ArrayBuffer>;
  readonly privateKeyPem: string;
  /** PKCS #10 in DER. */
  readonly certificateRequest: Uint8Array<ArrayBuffer>;
};

/** Makes a key and a request. Another algorithm makes one that must be refused. */
export async function createNodeKey(
  subject = "CN=node",
  algorithm: EcKeyGenParams | (RsaHashedKeyGenParams & { hash: string }) = { ...keyAlgorithm, ...signatureAlgorithm },
): Promise<NodeKey> {
  const generated = await globalThis.crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  if (!("privateKey" in generated)) throw new TypeError("not an algorithm of key pairs");
  const request = await x509.Pkcs10CertificateRequestGenerator.create({
    name: subject,
    keys: generated,
    signingAlgorithm: algorithm,
  });
  const privateKey = await globalThis.crypto.subtle.exportKey("pkcs8", generated.privateKey);
  return {
    publicKey: new Uint8Array(request.publicKey.rawData),
    privateKeyPem: x509.PemConverter.encode(privateKey, "PRIVATE KEY"),
    certificateRequest: new Uint8Array(request.rawData),
  };
}

/** Signs a renewal after expiry, as an agent does. */
export function signRenewal(
  privateKeyPem: string,
  challenge: Uint8Array,
  certificateRequest: Uint8Array,
): Uint8Array<ArrayBuffer> {
  const key = createPrivateKey(privateKeyPem);
  const message = renewalSignatureMessage(challenge, certificateRequest);
  return new Uint8Array(sign("sha256", message, { key, dsaEncoding: "der" }));
}

/** DER as PEM. */
export function pemOf(der: Uint8Array, label: string): string {
  return x509.PemConverter.encode(new Uint8Array(der), label);
}

/** A private key's PEM in another of its forms. */
export function rewritePrivateKey(privateKeyPem: string, type: "pkcs8" | "sec1"): string {
  return createPrivateKey(privateKeyPem).export({ type, format: "pem" }).toString();
}
