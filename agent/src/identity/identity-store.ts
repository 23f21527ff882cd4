// The node's identity on disk. Several files change together at a renewal, so one of them decides: the new key lies
// ready as key.next.pem before anybody is asked to certify it, and the rename of certificate.pem is the moment of
// change. A crash before it leaves the old identity, a crash after it is completed at the next start.

import { X509Certificate, createPublicKey } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseId } from "@clodei/proto/ids";
import type { NodeId } from "@clodei/proto/ids";
import { generateNodeKey, parseNodeKey } from "./key.ts";
import type { NodeKey } from "./key.ts";
import {
  assertPrivateFile,
  ignoreMissing,
  renameDurably,
  StateFolderError,
  writeFileAtomically,
} from "./state-folder.ts";

/** What a node is told about itself, and what it may show others. */
export interface NodeDescription {
  readonly nodeId: NodeId;
  readonly nodeName: string;
  /** Country, region, datacenter and tier, as the enrollment token said. For people: the control plane knows its own. */
  readonly location: string;
  readonly controlPlaneUrl: string;
  /** "host:port" of the node listener. */
  readonly nodeEndpoint: string;
  /** Names this enrollment: renewals keep it, a new enrollment makes a new one. */
  readonly enrollmentId: string;
}

/** Who this node is, with the means to show it. */
export interface Identity extends NodeDescription {
  readonly key: NodeKey;
  readonly certificate: X509Certificate;
  readonly roots: readonly X509Certificate[];
}

/** Public key of a private one, as SubjectPublicKeyInfo. */
export function publicKeyDer(key: NodeKey): Buffer {
  return createPublicKey(key.privateKey).export({ format: "der", type: "spki" });
}

/** The files under `identity/` of a state folder. The state folder's lock must be held. */
export class IdentityStore {
  readonly #paths: Readonly<Record<"key" | "nextKey" | "certificate" | "trust" | "node", string>>;

  constructor(folder: string) {
    this.#paths = {
      key: join(folder, "key.pem"),
      nextKey: join(folder, "key.next.pem"),
      certificate: join(folder, "certificate.pem"),
      trust: join(folder, "trust.pem"),
      node: join(folder, "node.json"),
    };
  }

  /** The identity, or undefined where the node was never enrolled. Throws where files are there and do not fit. */
  async load(): Promise<Identity | undefined> {
    const certificatePem = await readFile(this.#paths.certificate, "utf8").catch(ignoreMissing);
    if (certificatePem === undefined) return undefined;
    const certificate = new X509Certificate(certificatePem);
    const key = await this.#keyOf(certificate);
    const description = parseDescription(await readFile(this.#paths.node, "utf8"));
    const roots = parseRoots(await readFile(this.#paths.trust, "utf8"));
    return { ...description, key, certificate, roots };
  }

  /** The key that waits for its certificate. Kept until there is one, so that a lost answer can be asked for again. */
  async nextKey(): Promise<NodeKey> {
    const kept = await readFile(this.#paths.nextKey, "utf8").catch(ignoreMissing);
    if (kept !== undefined) {
      await assertPrivateFile(this.#paths.nextKey);
      return parseNodeKey(kept);
    }
    const key = await generateNodeKey();
    await writeFileAtomically(this.#paths.nextKey, key.pem);
    return key;
  }

  /** Makes the waiting key with its certificate the node's identity. */
  async commit(identity: Identity): Promise<void> {
    const { nodeId, nodeName, location, controlPlaneUrl, nodeEndpoint, enrollmentId } = identity;
    const description: NodeDescription = { nodeId, nodeName, location, controlPlaneUrl, nodeEndpoint, enrollmentId };
    await writeFileAtomically(this.#paths.trust, identity.roots.map((root) => root.toString()).join(""));
    await writeFileAtomically(this.#paths.node, `${JSON.stringify(description, undefined, 2)}\n`);
    await writeFileAtomically(this.#paths.certificate, identity.certificate.toString());
    await renameDurably(this.#paths.nextKey, this.#paths.key);
  }

  async #keyOf(certificate: X509Certificate): Promise<NodeKey> {
    for (const path of [this.#paths.key, this.#paths.nextKey]) {
      const pem = await readFile(path, "utf8").catch(ignoreMissing);
      if (pem === undefined) continue;
      await assertPrivateFile(path);
      const key = parseNodeKey(pem);
      if (!certificate.checkPrivateKey(key.privateKey)) continue;
      if (path === this.#paths.nextKey) await renameDurably(this.#paths.nextKey, this.#paths.key);
      return key;
    }
    throw new StateFolderError(
      `the certificate in ${this.#paths.certificate} has no key beside it: enroll this node again`,
    );
  }
}

function parseDescription(json: string): NodeDescription {
  const value: unknown = JSON.parse(json);
  const record = typeof value === "object" && value !== null ? (value as Readonly<Record<string, unknown>>) : {};
  const field = (name: string): string => {
    const text = record[name];
    if (typeof text !== "string") throw new StateFolderError(`node.json lacks ${name}: enroll this node again`);
    return text;
  };
  const nodeId = parseId("nod", field("nodeId"));
  if (nodeId === undefined) throw new StateFolderError("node.json holds no node id: enroll this node again");
  return {
    nodeId,
    nodeName: field("nodeName"),
    location: field("location"),
    controlPlaneUrl: field("controlPlaneUrl"),
    nodeEndpoint: field("nodeEndpoint"),
    enrollmentId: field("enrollmentId"),
  };
}

function parseRoots(pem: string): X509Certificate[] {
  const blocks = pem.match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  if (blocks.length === 0) throw new StateFolderError("trust.pem holds no certificate: enroll this node again");
  return blocks.map((block) => new X509Certificate(block));
}
