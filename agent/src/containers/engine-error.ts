// Everything that can go wrong with a container, sorted by what the caller does about it.
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";

/**
 * - `away`: the engine does not answer. Nothing is known of the call's effect; look again when it is back.
 * - `image_not_found`, `unauthorized`, `unreachable`, `interrupted`, `stalled`, `damaged`, `pull_failed`: the image
 *   cannot be had: there is none, the registry refuses it, is out of reach, broke off again and again, went silent, sent
 *   something else, or anything else.
 * - `start_failed`: the engine refuses to create or start it. Trying again gives the same answer.
 * - `start_unknown`: the engine was killed during the start, and the program may have run.
 * - `policy`: the isolation is not what it must be. The container was killed.
 * - `not_found`: there is no such container.
 * - `failed`: anything else, an error of the node.
 */
export type EngineErrorKind =
  | "away"
  | "image_not_found"
  | "unauthorized"
  | "unreachable"
  | "interrupted"
  | "stalled"
  | "damaged"
  | "pull_failed"
  | "start_failed"
  | "start_unknown"
  | "policy"
  | "not_found"
  | "failed";

const reasons: Readonly<Record<EngineErrorKind, InstanceReason>> = {
  away: InstanceReason.NODE_ERROR,
  image_not_found: InstanceReason.IMAGE_NOT_FOUND,
  unauthorized: InstanceReason.PULL_UNAUTHORIZED,
  unreachable: InstanceReason.REGISTRY_UNREACHABLE,
  interrupted: InstanceReason.PULL_INTERRUPTED,
  stalled: InstanceReason.PULL_STALLED,
  damaged: InstanceReason.IMAGE_DAMAGED,
  pull_failed: InstanceReason.PULL_FAILED,
  start_failed: InstanceReason.START_FAILED,
  start_unknown: InstanceReason.NODE_ERROR,
  policy: InstanceReason.POLICY_VIOLATION,
  not_found: InstanceReason.NODE_ERROR,
  failed: InstanceReason.NODE_ERROR,
};

/** A call to the container engine failed. The message is for the customer. */
export class EngineError extends Error {
  override readonly name = "EngineError";
  readonly kind: EngineErrorKind;

  constructor(kind: EngineErrorKind, message: string, options?: ErrorOptions) {
    super(message, options);
    this.kind = kind;
  }

  /** The reason with which an attempt ends because of it. */
  get reason(): InstanceReason {
    return reasons[this.kind];
  }
}
