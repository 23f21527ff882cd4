// What Docker's API answers, as far as it is read here. An engine is part of the node, and believed.

/** GET /containers/{id}/json. */
export interface ContainerDetails {
  readonly Id: string;
  /** The image's id. */
  readonly Image: string;
  readonly Config: { readonly User: string; readonly Labels: Readonly<Record<string, string>> };
  readonly State: {
    readonly Running: boolean;
    readonly Pid: number;
    readonly ExitCode: number;
    readonly OOMKilled: boolean;
    /** In ISO 8601; in the year 1 where it never did. */
    readonly StartedAt: string;
    readonly FinishedAt: string;
  };
  readonly HostConfig: { readonly NetworkMode?: string };
}

/** One of GET /containers/json. */
export interface ListedContainer {
  readonly Id: string;
  readonly HostConfig: { readonly NetworkMode: string };
}

/** One of GET /networks, and GET /networks/{name}. */
export interface NetworkDetails {
  readonly Name: string;
  readonly Labels?: Readonly<Record<string, string>> | null;
}

/** GET /images/{name}/json. */
export interface ImageDetails {
  readonly Id: string;
  readonly RepoDigests?: readonly string[] | null;
  readonly Config: { readonly User?: string };
}
