// What an operator watches about the node link and the link between replicas. Labels are few and fixed: never a node, an instance or a customer.
import { Counter, Gauge, type Registry } from "prom-client";

/** The metrics of dispatch. */
export type DispatchMetrics = {
  readonly sessions: Gauge;
  readonly sessionsEnded: Counter<"reason">;
  readonly foreignReports: Counter<"kind">;
  readonly reportEntries: Counter<"kind" | "outcome">;
  readonly reportGaps: Counter;
  readonly agentsDropped: Counter<"why">;
  readonly connectionsRefused: Counter;
  readonly proxyConnectionsRefused: Counter<"why">;
  readonly logStreams: Gauge;
  readonly logBytes: Counter;
  /** "serves": for another process; "asks": of another process. */
  readonly replicaStreams: Gauge<"side">;
  readonly replicaLogBytes: Counter;
  readonly replicaConnections: Gauge;
  readonly replicaConnectionsFailed: Counter;
  readonly replicaConnectionsRefused: Counter;
};

/** Registers the metrics. Once a registry. */
export function createDispatchMetrics(registry: Registry): DispatchMetrics {
  const registers = [registry];
  return {
    sessions: new Gauge({
      name: "clodei_node_sessions",
      help: "Sessions of nodes that this process holds.",
      registers,
    }),
    sessionsEnded: new Counter({
      name: "clodei_node_sessions_ended_total",
      help: "Sessions that ended, by the reason of the Goodbye, or DISCONNECTED.",
      labelNames: ["reason"],
      registers,
    }),
    foreignReports: new Counter({
      name: "clodei_node_foreign_reports_total",
      help: "Entries of reports that spoke of an instance which is not the node's. Ignored; look at the log.",
      labelNames: ["kind"],
      registers,
    }),
    reportEntries: new Counter({
      name: "clodei_node_report_entries_total",
      help: "Entries of reports, by kind (status, usage) and outcome (applied, replayed).",
      labelNames: ["kind", "outcome"],
      registers,
    }),
    reportGaps: new Counter({
      name: "clodei_node_report_gaps_total",
      help: "Reports that did not continue the journal and were asked for again.",
      registers,
    }),
    agentsDropped: new Counter({
      name: "clodei_node_agents_dropped_total",
      help: "Agents that were dropped because they did not read.",
      labelNames: ["why"],
      registers,
    }),
    connectionsRefused: new Counter({
      name: "clodei_node_connections_refused_total",
      help: "Connections of the node listener that were cut because their address had too many.",
      registers,
    }),
    proxyConnectionsRefused: new Counter({
      name: "clodei_node_proxy_connections_refused_total",
      help: "Connections of the node listener that were cut because they did not begin as a trusted proxy's must.",
      labelNames: ["why"],
      registers,
    }),
    logStreams: new Gauge({ name: "clodei_log_streams", help: "Log streams that this process relays.", registers }),
    logBytes: new Counter({ name: "clodei_log_bytes_total", help: "Bytes of output that were relayed.", registers }),
    replicaStreams: new Gauge({
      name: "clodei_replica_log_streams",
      help: "Log streams between this process and other control planes, by what it does: it serves them, or asks for them.",
      labelNames: ["side"],
      registers,
    }),
    replicaLogBytes: new Counter({
      name: "clodei_replica_log_bytes_total",
      help: "Bytes of output that other control planes relayed to this process.",
      registers,
    }),
    replicaConnections: new Gauge({
      name: "clodei_replica_connections",
      help: "Connections of this process to other control planes, open or opening.",
      registers,
    }),
    replicaConnectionsFailed: new Counter({
      name: "clodei_replica_connections_failed_total",
      help: "Connections to other control planes that could not be opened. Look at the log.",
      registers,
    }),
    replicaConnectionsRefused: new Counter({
      name: "clodei_replica_connections_refused_total",
      help: "Connections of the replica listener that were cut because their address had too many.",
      registers,
    }),
  };
}
