// Images on the node: found, or pulled as the pull policy says.
import { PullPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { type ImageReference, parseImageReference } from "@clodei/proto/image-reference";
import { type DockerClient, isMissing } from "./docker-client.ts";
import type { ImageDetails } from "./engine-answers.ts";
import { EngineError } from "./engine-error.ts";
import type { PullBytes } from "./pull-progress.ts";
import { defaultPullSilenceMs, type PullActivity, pullImage } from "./pull.ts";
import { type RegistryAuth, RegistryAuthError, type RegistryCredentials } from "./registry-auth.ts";

/** An image that is on the node. */
export interface LocalImage {
  /** The image's id. What is created from it is this, wherever its tag moves meanwhile. */
  readonly imageId: string;
  /** Digest of the manifest, where it came by a registry. */
  readonly digest: string | undefined;
  /** USER, as the image's maker wrote it. */
  readonly user: string;
}

/** The node's images. */
export class Images {
  readonly #client: DockerClient;
  readonly #auth: RegistryAuth | undefined;
  readonly #silenceMs: number;
  readonly #activity: PullActivity = { heardMs: 0 };

  constructor(client: DockerClient, auth: RegistryAuth | undefined, silenceMs = defaultPullSilenceMs) {
    this.#client = client;
    this.#auth = auth;
    this.#silenceMs = silenceMs;
  }

  async ensure(
    image: string,
    policy: PullPolicy,
    onProgress: (bytes: PullBytes) => void,
    signal: AbortSignal,
  ): Promise<LocalImage> {
    const reference = parseImageReference(image);
    if (reference === undefined) throw new EngineError("image_not_found", `"${image}" is no image reference`);
    if (policy !== PullPolicy.ALWAYS) {
      const found = await this.#find(reference, signal);
      if (found !== undefined) return localImage(found, reference, undefined);
      if (policy === PullPolicy.NEVER) {
        throw new EngineError("image_not_found", `the node does not hold ${image}, and its pull policy is NEVER`);
      }
    }
    const credentials = await this.#credentials(reference.registry);
    const digest = await pullImage(this.#client, {
      reference,
      credentials,
      silenceMs: this.#silenceMs,
      activity: this.#activity,
      onProgress,
      signal,
    });
    const pulled = await this.#find(reference, signal);
    if (pulled === undefined) throw new EngineError("pull_failed", `${image} was pulled and is not there`);
    return localImage(pulled, reference, digest);
  }

  async #find(reference: ImageReference, signal: AbortSignal): Promise<ImageDetails | undefined> {
    const name = `${reference.registry}/${reference.repository}`;
    const suffix = reference.digest === undefined ? `:${reference.tag ?? "latest"}` : `@${reference.digest}`;
    try {
      const path = `/images/${name}${suffix}/json`;
      return (await this.#client.get("look at the image", path, signal)) as ImageDetails;
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  async #credentials(registry: string): Promise<RegistryCredentials | undefined> {
    try {
      return await this.#auth?.credentialsFor(registry);
    } catch (error) {
      if (error instanceof RegistryAuthError)
        throw new EngineError("unauthorized", "this node's registry credentials cannot be read", { cause: error });
      throw error;
    }
  }
}

function localImage(image: ImageDetails, reference: ImageReference, digest: string | undefined): LocalImage {
  return {
    imageId: image.Id,
    digest: digest ?? reference.digest ?? digestFrom(image, reference),
    user: image.Config.User ?? "",
  };
}

/** The digest under which the image came from that repository. */
function digestFrom(image: ImageDetails, reference: ImageReference): string | undefined {
  for (const text of image.RepoDigests ?? []) {
    const from = parseImageReference(text);
    if (from?.registry === reference.registry && from.repository === reference.repository) return from.digest;
  }
  return undefined;
}
