// The node's private key: P-256, made here and never sent. What leaves is a certificate request, of which the control
// plane takes the public key alone.

import { createPrivateKey, sign } from "node:crypto";
import type { KeyObject } from "node:crypto";

/** A private key and its PEM form. */
export interface NodeKey {
  readonly privateKey: KeyObject;
  readonly pem: string;
}

const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" } as const;

/** Makes a key. */
export async function generateNodeKey(): Promise<NodeKey> {
  const { privateKey } = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  const der = Buffer.from(await crypto.subtle.exportKey("pkcs8", privateKey));
  const key = createPrivateKey({ key: der, format: "der", type: "pkcs8" });
  return { privateKey: key, pem: key.export({ format: "pem", type: "pkcs8" }).toString() };
}

/** Reads a key from PEM. Throws where it is no P-256 key. */
export function parseNodeKey(pem: string): NodeKey {
  const privateKey = createPrivateKey(pem);
  if (privateKey.asymmetricKeyType !== "ec" || privateKey.asymmetricKeyDetails?.namedCurve !== "prime256v1") {
    throw new Error("the node's key is no P-256 key");
  }
  return { privateKey, pem };
}

/** A PKCS #10 request in DER. Its subject says nothing: the control plane names the node. */
export async function certificateRequest(key: NodeKey): Promise<Uint8Array<ArrayBuffer>> {
  const der = key.privateKey.export({ format: "der", type: "pkcs8" });
  const privateKey = await crypto.subtle.importKey("pkcs8", new Uint8Array(der), algorithm, true, ["sign"]);
  const jwk = await crypto.subtle.exportKey("jwk", privateKey);
  const publicJwk = { kty: "EC", crv: "P-256", x: jwk.x ?? "", y: jwk.y ?? "" };
  const publicKey = await crypto.subtle.importKey("jwk", publicJwk, algorithm, true, ["verify"]);
  // Loaded when it is needed, twice a day: an agent at rest goes without its 3 MB.
  await import("reflect-metadata");
  const { Pkcs10CertificateRequestGenerator } = await import("@peculiar/x509");
  const request = await Pkcs10CertificateRequestGenerator.create({
    name: "CN=clodei-node",
    keys: { privateKey, publicKey },
    signingAlgorithm: algorithm,
  });
  return new Uint8Array(request.rawData);
}

/** ECDSA with SHA-256, in DER. */
export function signWithNodeKey(key: NodeKey, message: Uint8Array): Uint8Array<ArrayBuffer> {
  return new Uint8Array(sign("sha256", message, { key: key.privateKey, dsaEncoding: "der" }));
}
