/** Every bound of the node link and of the link between replicas, by name. A test may lower one; nothing may lift one. */
export const dispatchLimits = {
  /** The largest message that is read. The schema's own rules stay below it. */
  maxMessageBytes: 4 * 1024 * 1024,
  /** Bytes that may wait for one agent to read them. Past it the agent is dropped: it reconnects and takes the whole state again. */
  maxQueuedBytes: 1024 * 1024,
  /** How long one message may wait for the agent to read it, as long as a lease. */
  maxQueuedMs: 30_000,
  /** A connection that does not say Hello, or which log stream it uploads, within this time is none of ours. */
  firstMessageTimeoutMs: 10_000,
  /** A TLS handshake takes two round trips; one that does not end holds memory for nothing. */
  handshakeTimeoutMs: 10_000,
  /** A proxy sends its header with the connection's first packet; one that is lost comes again after three seconds. */
  proxyHeaderTimeoutMs: 5_000,
  /** Connections a process, just below the 20,000 descriptors that some machines allow. */
  maxConnections: 18_000,
  /** Streams of one agent's connection: its session, its log uploads, a renewal, and what a reconnect overlaps. */
  maxStreamsPerConnection: 100,
  /** Session streams of one node that stand at once: its session, and reconnects that follow each other fast. */
  maxSessionStreamsPerNode: 8,
  /** How long the session that stands may take to answer a Probe. Longer than a slow link, shorter than a heartbeat. */
  probeTimeoutMs: 5_000,
  /** How long a newcomer must stay after the older session answered: a Hello that was only late is followed by its connection's end. */
  cloneGraceMs: 1_000,
  /**
   * Log streams of one node, in this process. The agent has a limit of its own. An organization holds at most as many
   * of them as it leaves free.
   */
  maxLogStreamsPerNode: 64,
  /** Log streams of one caller, in this process. */
  maxLogStreamsPerCaller: 32,
  /** How long an agent may take from OpenLogs to the first message of UploadLogs. */
  logsOpenTimeoutMs: 10_000,
  /** How long a certificate's state is believed without asking the database again. */
  certificateCacheMs: 900,
  /**
   * Between two looks at all sessions, at most: they come before what is remembered of certificates ends. Else each
   * message that comes in between asks by itself.
   */
  sessionLookMs: 800,
  /** Certificates whose state is remembered at once: twice the connections. */
  maxCachedCertificates: 40_000,
  /** Heartbeats are recorded together, at most so often: an agent's lease is sixty times as long. */
  heartbeatBatchMs: 500,
  /** Journals of one node that are remembered. A node begins a new one only when its state folder was lost. */
  maxJournalsPerNode: 16,
  /** How long a stream may take to end by itself after Goodbye. */
  goodbyeTimeoutMs: 1_000,
  /** How long a caller shall wait before it asks again for a node that is away: the time of a reconnect. */
  nodeUnreachableRetryMs: 2_000,
  /** Connections of other control planes to this one, and of this one to others: more than there will be of either. */
  maxReplicaConnections: 256,
  /** The same of one address: replicas on one machine or behind one NAT, and those that they replaced just now. */
  maxReplicaConnectionsPerAddress: 64,
  /** Log streams on a connection from one control plane to another. */
  maxStreamsPerReplica: 1_000,
  /** Log streams that this process relays to others. One whose reader does not read holds about 100 KiB. */
  maxReplicaStreams: 2_000,
  /** How long a connection to another control plane may take. */
  replicaConnectTimeoutMs: 5_000,
  /** How long it may take to say that it asks the node: a look at the database. */
  replicaAnswerTimeoutMs: 10_000,
  /** How long a connection to another control plane is kept that nobody uses. */
  replicaIdleMs: 60_000,
  /** Between two tries to reach a control plane that could not be reached. */
  replicaRetryMs: 1_000,
} as const;

/** The bounds, so that tests can hand in smaller ones. */
export type DispatchLimits = { readonly [K in keyof typeof dispatchLimits]: number };
