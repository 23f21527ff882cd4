// The node's identity on disk. All that changes together at a renewal or an enrollment stands in one file, node.json,
// whose rename is the moment of change; the key alone lies beside it. The new key lies ready as key.next.pem before
// anybody is asked to certify it. A crash before the rename leaves the old identity, a crash after it is completed at
// the next start.

import { X509Certificate, createPublicKey } from "node:crypto";
import { readFile, unlink } from "node:fs/promises";
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
  readonly #paths: Readonly<Record<"key" | "nextKey" | "node", string>>;
  /** Files of their own in folders of an earlier agent. Gone after the next change. */
  readonly #earlierPaths: Readonly<Record<"certificate" | "trust", string>>;

  constructor(folder: string) {
    this.#paths = {
      key: join(folder, "key.pem"),
      nextKey: join(folder, "key.next.pem"),
      node: join(folder, "node.json"),
    };
    this.#earlierPaths = { certificate: join(folder, "certificate.pem"), trust: join(folder, "trust.pem") };
  }

  /** The identity, or undefined where the node was never enrolled. Throws where files are there and do not fit. */
  async load(): Promise<Identity | undefined> {
    const record = await this.#read();
    if (record === undefined) return undefined;
    const description = parseDescription(record);
    const certificate = new X509Certificate(textOf(record, "certificate"));
    const key = await this.#keyOf(certificate);
    return { ...description, key, certificate, roots: parseRoots(textOf(record, "trust")) };
  }

  /** The node that the files name, also where they are of no use any more; undefined where they name none. */
  async nodeId(): Promise<NodeId | undefined> {
    const record = await this.#read().catch(() => undefined);
    const nodeId = record?.["nodeId"];
    return typeof nodeId === "string" ? parseId("nod", nodeId) : undefined;
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

  /** Forgets the waiting key: what it was certified for is not wanted. */
  async dropNextKey(): Promise<void> {
    await unlink(this.#paths.nextKey).catch(ignoreMissing);
  }

  /** Makes the waiting key with its certificate the node's identity. */
  async commit(identity: Identity): Promise<void> {
    const { nodeId, nodeName, location, controlPlaneUrl, nodeEndpoint, enrollmentId } = identity;
    const description: NodeDescription = { nodeId, nodeName, location, controlPlaneUrl, nodeEndpoint, enrollmentId };
    const certificate = identity.certificate.toString();
    const trust = identity.roots.map((root) => root.toString()).join("");
    await writeFileAtomically(
      this.#paths.node,
      `${JSON.stringify({ ...description, certificate, trust }, undefined, 2)}\n`,
    );
    await renameDurably(this.#paths.nextKey, this.#paths.key);
    for (const path of Object.values(this.#earlierPaths)) await unlink(path).catch(ignoreMissing);
  }

  async #read(): Promise<Fields | undefined> {
    const json = await readFile(this.#paths.node, "utf8").catch(ignoreMissing);
    if (json === undefined) return undefined;
    const value: unknown = JSON.parse(json);
    const record = typeof value === "object" && value !== null ? (value as Fields) : {};
    if ("certificate" in record) return record;
    const [certificate, trust] = await Promise.all(
      [this.#earlierPaths.certificate, this.#earlierPaths.trust].map((path) =>
        readFile(path, "utf8").catch(ignoreMissing),
      ),
    );
    // An earlier agent's enrollment that was cut off before its certificate was there.
    return certificate === undefined ? undefined : { ...record, certificate, trust };
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
    throw new StateFolderError(`the certificate in ${this.#paths.node} has no key beside it: enroll this node again`);
  }
}

type Fields = Readonly<Record<string, unknown>>;

function textOf(record: Fields, name: string): string {
  const text = record[name];
  if (typeof text !== "string") throw new StateFolderError(`node.json lacks ${name}: enroll this node again`);
  return text;
}

function parseDescription(record: Fields): NodeDescription {
  const nodeId = parseId("nod", textOf(record, "nodeId"));
  if (nodeId === undefined) throw new StateFolderError("node.json holds no node id: enroll this node again");
  return {
    nodeId,
    nodeName: textOf(record, "nodeName"),
    location: textOf(record, "location"),
    controlPlaneUrl: textOf(record, "controlPlaneUrl"),
    nodeEndpoint: textOf(record, "nodeEndpoint"),
    enrollmentId: textOf(record, "enrollmentId"),
  };
}

function parseRoots(pem: string): X509Certificate[] {
  const blocks = pem.match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  if (blocks.length === 0) throw new StateFolderError("node.json holds no root certificate: enroll this node again");
  return blocks.map((block) => new X509Certificate(block));
}
