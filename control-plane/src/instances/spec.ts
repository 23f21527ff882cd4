// A specification as it is accepted: what cannot be enforced yet is refused, the image is written in full and inside
// the allowlist, and every default is filled in, so that what is stored says all that will run.
import { clone, create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { checkContainer, type PolicyViolation } from "@clodei/proto/container-policy";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { type InstanceSpec, InstanceSpecSchema, PullPolicy, RestartPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { LocationConstraintSchema } from "@clodei/proto/gen/clodei/v1/location";
import { formatImageReference, isImageAllowed, parseImageReference } from "@clodei/proto/image-reference";
import { isCountryAllowed } from "@clodei/proto/locations";
import { DomainError, type FieldViolation } from "../platform/errors.ts";
import type { PlacementRequest } from "../placement/service.ts";
import { pinnedNodeOf, type Instance } from "./model.ts";
import { toContainerSpec } from "./wire.ts";

const defaultCpuMillis = 1000;
const defaultMemoryMib = 1024;
const defaultPlacementTimeoutMs = 600_000;
const defaultStopGraceMs = 10_000;
// The schema's limits again: which node is large enough is a question of placement.
const maxCpuMillis = 256_000;
const maxMemoryMib = 4_194_304;
const maxStopGraceSeconds = 120;

/** What this installation allows. */
export type SpecPolicy = {
  /** See proto's image-reference.ts. */
  readonly imageAllowlist: readonly string[];
  /** Where nodes may stand. See proto's locations.ts. */
  readonly allowedCountries: readonly string[];
};

/**
 * Returns the specification as it is stored. The schema's rules were checked before.
 *
 * @throws DomainError NOT_SUPPORTED_YET, LOCATION_NOT_ALLOWED, IMAGE_NOT_ALLOWED, INVALID_ARGUMENT, each naming the
 * fields.
 */
export function acceptSpec(given: InstanceSpec, { imageAllowlist, allowedCountries }: SpecPolicy): InstanceSpec {
  refuseUnsupported(given);
  refuseJurisdiction(given.location?.country, allowedCountries);
  const spec = clone(InstanceSpecSchema, given);
  spec.image = acceptImage(given.image, imageAllowlist);
  spec.cpuMillis ??= defaultCpuMillis;
  spec.memoryMib ??= defaultMemoryMib;
  spec.placementTimeout ??= durationFromMs(defaultPlacementTimeoutMs);
  spec.stopGrace ??= durationFromMs(defaultStopGraceMs);
  if (spec.restartPolicy === RestartPolicy.UNSPECIFIED) spec.restartPolicy = RestartPolicy.NEVER;
  if (spec.pullPolicy === PullPolicy.UNSPECIFIED) spec.pullPolicy = PullPolicy.IF_NOT_PRESENT;
  // No GPUs are asked for in one way only.
  if (spec.gpu?.count === 0) delete spec.gpu;
  const violations = checkContainer(toContainerSpec(spec, []), {
    imageAllowlist,
    maxCpuMillis,
    maxMemoryMib,
    maxStopGraceSeconds,
    knownGpuUuids: new Set(),
  });
  if (violations.length > 0) throw invalid(violations.map(toFieldViolation));
  return spec;
}

/** A specification without what placement does not look at: of 10,000 that wait it would be gigabytes. */
export function forPlacement(spec: InstanceSpec): InstanceSpec {
  return { ...spec, command: [], args: [], env: {} };
}

/** What an instance asks of placement. */
export function placementRequestOf(instance: Pick<Instance, "spec" | "place">): PlacementRequest {
  const { gpu, cpuMillis, memoryMib, location } = instance.spec;
  const { country, region, datacenter } = location ?? create(LocationConstraintSchema);
  return {
    gpu: { model: gpu?.model ?? "", count: gpu?.count ?? 0, minMemoryMib: gpu?.minMemoryMib ?? 0 },
    cpuMillis: cpuMillis ?? defaultCpuMillis,
    memoryMib: memoryMib ?? defaultMemoryMib,
    location: { country, region, datacenter },
    pinnedNodeId: pinnedNodeOf(instance),
  };
}

function refuseUnsupported(spec: InstanceSpec): void {
  const fields = [
    ...(spec.diskMib === undefined ? [] : ["spec.disk_mib"]),
    ...(spec.workspaceMib === undefined ? [] : ["spec.workspace_mib"]),
    ...(spec.ports.length === 0 ? [] : ["spec.ports"]),
  ].map((field) => ({ field, rule: "not_supported_yet", message: "cannot be enforced yet: leave it out" }));
  if (fields.length === 0) return;
  const named = fields.map(({ field }) => field).join(", ");
  throw new DomainError(ErrorReason.NOT_SUPPORTED_YET, `not supported yet: ${named}`, { fields });
}

/** Where no node may ever stand there is nothing to wait for. */
function refuseJurisdiction(country: string | undefined, allowed: readonly string[]): void {
  if (country === undefined || isCountryAllowed(country, allowed)) return;
  const message = `no node may stand in ${country}; allowed are ${allowed.join(", ")}`;
  const fields = [{ field: "spec.location.country", rule: "allowed-jurisdiction", message }];
  throw new DomainError(ErrorReason.LOCATION_NOT_ALLOWED, `spec.location.country: ${message}`, { fields });
}

function acceptImage(image: string, allowlist: readonly string[]): string {
  const reference = parseImageReference(image);
  if (reference === undefined) {
    const message = `"${image}" is no image reference: write it as "owner/name:tag" or "registry.example/owner/name:tag"`;
    throw invalid([{ field: "spec.image", rule: "image_malformed", message }]);
  }
  if (!isImageAllowed(reference, allowlist)) {
    const message = `${formatImageReference(reference)} is outside the allowlist; allowed are ${allowlist.join(", ")}`;
    const fields = [{ field: "spec.image", rule: "image_allowed", message }];
    throw new DomainError(ErrorReason.IMAGE_NOT_ALLOWED, `spec.image: ${message}`, { fields });
  }
  return formatImageReference(reference);
}

function toFieldViolation({ field, rule, message }: PolicyViolation): FieldViolation {
  return { field: `spec.${field}`, rule, message };
}

function invalid(fields: readonly FieldViolation[]): DomainError {
  const text = fields.map(({ field, message }) => `${field}: ${message}`).join("; ");
  return new DomainError(ErrorReason.INVALID_ARGUMENT, text, { fields });
}
