/**
 * X.509 as the node link and the link between replicas use it: what is in a node's certificate and in a replica's, how
 * one is read, and how a certificate request is judged. Pure: keys and times are arguments.
 *
 * The location stands in the subject (C, ST, L, OU=tier-N) and the identity in a SPIFFE URI: both are attributes
 * that every tool prints, so no private extension is needed.
 */
import "reflect-metadata"; // before @peculiar/x509, which needs it at import
import { createHash } from "node:crypto";
import * as x509 from "@peculiar/x509";
import { type NodeId, parseId } from "@clodei/proto/ids";
import type { NodeLocation } from "./model.ts";

/** The only kind of key in this system: P-256, signed with ECDSA and SHA-256. */
export const keyAlgorithm = { name: "ECDSA", namedCurve: "P-256" } as const;
export const signatureAlgorithm = { name: "ECDSA", hash: "SHA-256" } as const;

/** TLS client authentication: all that a node's certificate may be used for. */
export const clientAuth = x509.ExtendedKeyUsage.clientAuth;
/** TLS server authentication: all that a listener's certificate may be used for. */
export const serverAuth = x509.ExtendedKeyUsage.serverAuth;

/** What a node's certificate says. */
export type NodeCertificate = {
  readonly nodeId: NodeId;
  readonly trustDomain: string;
  readonly location: NodeLocation;
  /** Hexadecimal, lower case, without leading zero octets: the form in which the database keys it. */
  readonly serial: string;
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** DER of the SubjectPublicKeyInfo. */
  readonly publicKey: Uint8Array<ArrayBuffer>;
};

/** What a replica's certificate says: the process that has it is this control plane. */
export type ReplicaCertificate = {
  /** A UUID that the process gave itself at its start. */
  readonly replicaId: string;
  readonly trustDomain: string;
  readonly notAfter: Date;
};

/** A public key that the bearer of a certificate request proved to hold. */
export type RequestedKey = {
  /** DER of the SubjectPublicKeyInfo. */
  readonly publicKey: Uint8Array<ArrayBuffer>;
  /** sha256 of it: names the key in the database. */
  readonly publicKeyHash: Uint8Array<ArrayBuffer>;
};

/** The SPIFFE ID of a node. */
export function spiffeIdOf(trustDomain: string, nodeId: NodeId): string {
  return `spiffe://${trustDomain}/node/${nodeId}`;
}

/** The SPIFFE ID of a replica. No node id can make it look like a node's: the path's first segment is another. */
export function replicaSpiffeIdOf(trustDomain: string, replicaId: string): string {
  return `spiffe://${trustDomain}/control-plane/${replicaId}`;
}

/** The subject of a node's certificate. */
export function subjectOf(nodeId: NodeId, location: NodeLocation): x509.JsonName {
  return [
    { C: [location.country] },
    { ST: [location.region] },
    { L: [location.datacenter] },
    { OU: [`tier-${location.tier}`] },
    { CN: [nodeId] },
  ];
}

/**
 * Reads a node's certificate from its DER. Undefined where it is not one: nothing is said about who signed it,
 * which TLS (or `Authority.issued`) has to say.
 */
export function readNodeCertificate(der: Uint8Array): NodeCertificate | undefined {
  const certificate = parseCertificate(der);
  if (certificate === undefined) return undefined;
  try {
    const match = /^spiffe:\/\/([a-z0-9.-]{1,255})\/node\/([a-z0-9_]{1,64})$/.exec(onlyUriOf(certificate));
    const nodeId = parseId("nod", match?.[2] ?? "");
    const location = readLocation(certificate.subjectName);
    if (match?.[1] === undefined || nodeId === undefined || location === undefined) return undefined;
    return {
      nodeId,
      trustDomain: match[1],
      location,
      serial: certificate.serialNumber,
      notBefore: certificate.notBefore,
      notAfter: certificate.notAfter,
      publicKey: new Uint8Array(certificate.publicKey.rawData),
    };
  } catch {
    return undefined; // an extension or a name that cannot be read
  }
}

/** The same for a replica's certificate. */
export function readReplicaCertificate(der: Uint8Array): ReplicaCertificate | undefined {
  const certificate = parseCertificate(der);
  if (certificate === undefined) return undefined;
  try {
    const match = /^spiffe:\/\/([a-z0-9.-]{1,255})\/control-plane\/([0-9a-f-]{36})$/.exec(onlyUriOf(certificate));
    const [, trustDomain, replicaId] = match ?? [];
    if (trustDomain === undefined || replicaId === undefined) return undefined;
    return { replicaId, trustDomain, notAfter: certificate.notAfter };
  } catch {
    return undefined; // an extension or a name that cannot be read
  }
}

/** A certificate from its DER; undefined where it is none. PEM and base64, which the library reads too, are none. */
export function parseCertificate(der: Uint8Array): x509.X509Certificate | undefined {
  if (!isDerSequence(der)) return undefined;
  try {
    return new x509.X509Certificate(new Uint8Array(der));
  } catch {
    return undefined;
  }
}

/**
 * The key of a PKCS #10 request, where the request is signed by that very key and the key is ECDSA P-256.
 * Everything else in it (subject, names, extensions) is ignored: the control plane says what a node is.
 */
export async function readCertificateRequest(der: Uint8Array): Promise<RequestedKey | undefined> {
  if (!isDerSequence(der)) return undefined;
  try {
    const request = new x509.Pkcs10CertificateRequest(new Uint8Array(der));
    const publicKey = new Uint8Array(request.publicKey.rawData);
    // Importing checks that the point is on P-256, whatever the request says of its algorithms.
    await importPublicKey(publicKey);
    if (!(await request.verify())) return undefined;
    return { publicKey, publicKeyHash: sha256(publicKey) };
  } catch {
    return undefined; // not a request, another kind of key, or a signature that cannot be read
  }
}

/** Imports a SubjectPublicKeyInfo, and throws where it is no point of P-256. */
export function importPublicKey(spki: Uint8Array<ArrayBuffer>): Promise<CryptoKey> {
  return globalThis.crypto.subtle.importKey("spki", spki, keyAlgorithm, true, ["verify"]);
}

/** sha256 of bytes or of the UTF-8 of a text. */
export function sha256(data: Uint8Array | string): Uint8Array<ArrayBuffer> {
  return new Uint8Array(createHash("sha256").update(data).digest());
}

/** The URI that is the certificate's one and only name, or "". */
function onlyUriOf(certificate: x509.X509Certificate): string {
  const names = certificate.getExtension(x509.SubjectAlternativeNameExtension)?.names.items ?? [];
  const [name] = names;
  return names.length === 1 && name?.type === "url" ? name.value : "";
}

function readLocation(subject: x509.Name): NodeLocation | undefined {
  const one = (field: string): string => {
    const values = subject.getField(field);
    return values.length === 1 ? (values[0] ?? "") : "";
  };
  const tier = /^tier-([1-4])$/.exec(one("OU"))?.[1];
  const [country, region, datacenter] = [one("C"), one("ST"), one("L")];
  if (tier === undefined || country === "" || region === "" || datacenter === "") return undefined;
  return { country, region, datacenter, tier: Number(tier) };
}

/**
 * Whether the bytes are one DER sequence and nothing after it, by its header: tag, and a definite length in its
 * shortest form. The library is lenient there, and would read PEM and base64 as well.
 */
function isDerSequence(der: Uint8Array): boolean {
  const [tag, first = 0, second = 0, third = 0] = der;
  if (tag !== 0x30) return false;
  if (first < 0x80) return der.length === 2 + first;
  if (first === 0x81) return second >= 0x80 && der.length === 3 + second;
  if (first === 0x82) return second > 0 && der.length === 4 + second * 256 + third;
  return false; // longer than any that a schema admits
}
