/** @clodei/sdk: a typed client for the Clodei GPU cloud. */
export { type ClientOptions, type ClodeiClient, createClient, type ServiceClients } from "./client.ts";
export type { CallOptions, MutationOptions } from "./calls.ts";
export type { RetryPolicy } from "./backoff.ts";
export type { Catalog, ListOffersOptions } from "./catalog.ts";
export {
  ClodeiError,
  type ClodeiErrorOptions,
  type FieldViolation,
  InstanceEndedError,
  type Reason,
  type StatusCode,
} from "./errors.ts";
export type { Identity } from "./identity.ts";
export type { InstanceHandle, WaitOptions } from "./instance-handle.ts";
export type { InstanceFilter, Instances, ListInstancesOptions, WatchInstancesOptions } from "./instances.ts";
export type { InstanceLogs, LogChunk, LogLine, LogOptions } from "./logs.ts";
export type { EnrollmentTokenSpec, ListNodesOptions, NewEnrollmentToken, Nodes, NodeStateName } from "./nodes.ts";
export type { ListOptions, Page, Paginated } from "./pagination.ts";
export type { InstanceStateName, LocationConstraint, RunSpec } from "./spec.ts";
export type { WatchEvent, WatchOptions } from "./watch.ts";
export { type Availability, type ImagePolicy, type Offer } from "@clodei/proto/gen/clodei/v1/catalog_service";
export { type WhoAmIResponse } from "@clodei/proto/gen/clodei/v1/identity_service";
export {
  type AllocatedGpu,
  type Instance,
  type InstanceEvent,
  InstanceReason,
  type InstanceSpec,
  InstanceState,
} from "@clodei/proto/gen/clodei/v1/instance";
export { type Gpu, GpuHealth, type NodeInventory } from "@clodei/proto/gen/clodei/v1/inventory";
export { type Location } from "@clodei/proto/gen/clodei/v1/location";
export { type EnrollmentToken, type Node, NodeState } from "@clodei/proto/gen/clodei/v1/node_service";
