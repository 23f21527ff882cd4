/**
 * Image references, and the allowlist over them. Both the control plane and the agent judge an image by its
 * normalized form alone, and hand that form alone to Docker: what was judged is what is pulled.
 *
 * The grammar is the one of https://github.com/distribution/reference, narrowed: no upper case before the tag
 * (Docker itself reads `GHCR.io/x` as a registry and `Pytorch/x` as either, by version), no IPv6 registries,
 * digests by sha256 only, and no name of 64 hexadecimal digits, which Docker takes for an image's id.
 */

/** An image reference, normalized: registry and repository are always there. */
export type ImageReference = {
  /** Host and port: "docker.io", "ghcr.io", "localhost:5000". */
  readonly registry: string;
  /** Path within the registry: "library/busybox". */
  readonly repository: string;
  /** "latest" where neither tag nor digest was written. */
  readonly tag: string | undefined;
  /** "sha256:…". Where there is one, Docker goes by it, and the tag is for the reader. */
  readonly digest: string | undefined;
};

/** The images that may run where nothing else is configured. */
export const defaultImageAllowlist: readonly string[] = [
  "aitorgarmen/",
  "ghcr.io/clodei/",
  "library/",
  "pytorch/",
  "nvidia/",
  "nvcr.io/",
  "tensorflow/",
];

const dockerHub = "docker.io";
/** The old name of Docker Hub's index, which Docker takes for docker.io. */
const dockerHubIndex = "index.docker.io";
/** Docker's limit for registry and repository together. */
const maxNameLength = 255;

const label = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?";
const registryPattern = new RegExp(`^${label}(?:\\.${label})*(?::([1-9][0-9]{0,4}))?$`);
const pathPartPattern = /^[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*$/;
const tagPattern = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;
const digestPattern = /^sha256:[0-9a-f]{64}$/;
const imageIdPattern = /^[0-9a-f]{64}$/;

/**
 * Reads an image reference; undefined where it is malformed.
 *
 * @example parseImageReference("busybox") // docker.io, library/busybox, latest
 */
export function parseImageReference(text: string): ImageReference | undefined {
  // Docker takes these two for an image's id, whatever registry they were meant for.
  if (imageIdPattern.test(text) || digestPattern.test(text)) return undefined;
  const [beforeDigest = "", digest, ...more] = text.split("@");
  if (more.length > 0 || (digest !== undefined && !digestPattern.test(digest))) return undefined;
  // A colon after the last slash begins the tag; one before it belongs to the registry's port.
  const colon = beforeDigest.indexOf(":", beforeDigest.lastIndexOf("/") + 1);
  const name = colon < 0 ? beforeDigest : beforeDigest.slice(0, colon);
  const tag = colon < 0 ? undefined : beforeDigest.slice(colon + 1);
  if (tag !== undefined && !tagPattern.test(tag)) return undefined;
  if (imageIdPattern.test(name)) return undefined;
  const full = parseName(name);
  if (full === undefined) return undefined;
  return { ...full, tag: tag ?? (digest === undefined ? "latest" : undefined), digest };
}

/**
 * Writes a reference in its normalized form, which parses to the same reference.
 *
 * @example formatImageReference(ref) // "docker.io/library/busybox:latest"
 */
export function formatImageReference(reference: ImageReference): string {
  const tag = reference.tag === undefined ? "" : `:${reference.tag}`;
  const digest = reference.digest === undefined ? "" : `@${reference.digest}`;
  return `${reference.registry}/${reference.repository}${tag}${digest}`;
}

/**
 * Writes an allowlist's entry in full. An entry that ends in a slash admits every repository below it
 * ("pytorch/" is "docker.io/pytorch/", "nvcr.io/" is the whole registry); one that does not admits that
 * repository alone ("library/busybox" is "docker.io/library/busybox").
 *
 * @throws RangeError where the entry is malformed. Call it on configuration at start.
 */
export function normalizeAllowlistEntry(prefix: string): string {
  const wholeFolder = prefix.endsWith("/");
  const entry = wholeFolder ? prefix.slice(0, -1) : prefix;
  const [first = "", ...rest] = entry.split("/");
  if (rest.length === 0 && isRegistry(first)) {
    const registry = first === dockerHubIndex ? dockerHub : first;
    if (wholeFolder && isRegistryWellFormed(registry)) return `${registry}/`;
  } else {
    // "pytorch/" names a folder of Docker Hub, where the name "pytorch" alone would mean "library/pytorch".
    const name = parseName(entry, wholeFolder);
    if (name !== undefined) return `${name.registry}/${name.repository}${wholeFolder ? "/" : ""}`;
  }
  throw new RangeError(
    `"${prefix}" is no entry of an image allowlist: write "registry.example/" or "owner/" or "owner/image"`,
  );
}

/** Whether an allowlist admits an image. Tag and digest do not matter. */
export function isImageAllowed(reference: ImageReference, allowlist: readonly string[]): boolean {
  const name = `${reference.registry}/${reference.repository}`;
  return allowlist.some((prefix) => {
    const entry = normalizeAllowlistEntry(prefix);
    return entry.endsWith("/") ? name.startsWith(entry) : name === entry;
  });
}

/** Whether the first part of a name is a registry: Docker's rule is a dot, a colon, or localhost. */
function isRegistry(first: string): boolean {
  return first.includes(".") || first.includes(":") || first === "localhost";
}

function isRegistryWellFormed(registry: string): boolean {
  const match = registryPattern.exec(registry);
  return match !== null && Number(match[1] ?? 1) <= 65535;
}

/** Reads registry and repository. A folder of Docker Hub is not in "library/", as an image of one part is. */
function parseName(name: string, isFolder = false): { registry: string; repository: string } | undefined {
  const parts = name.split("/");
  const [first = ""] = parts;
  const named = parts.length > 1 && isRegistry(first);
  const registry = named && first !== dockerHubIndex ? first : dockerHub;
  const path = named ? parts.slice(1) : parts;
  if (!isRegistryWellFormed(registry) || !path.every((part) => pathPartPattern.test(part))) return undefined;
  if (registry === dockerHub && path.length === 1 && !isFolder) path.unshift("library");
  const repository = path.join("/");
  return registry.length + 1 + repository.length <= maxNameLength ? { registry, repository } : undefined;
}
