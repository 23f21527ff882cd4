-- Dispatch: the session that each node holds, how far each journal is committed, and the intervals in which
-- containers ran.

-- One row a node: the session that is the node's now, or its last. A newer session replaces it in place, so that
-- any replica sees who holds the node. Secrets are stored as sha256.
create table node_sessions (
  node_id text primary key,
  session_id text not null,
  -- The process that holds the stream. Another process reads it to know that the stream is not its own.
  replica_id text not null,
  secret_hash bytea not null check (octet_length(secret_hash) = 32),
  -- What the agent showed when the session began. Good as well until the first heartbeat, because a Welcome that
  -- never reached the agent's disk must not make a clone of it.
  previous_secret_hash bytea check (octet_length(previous_secret_hash) = 32),
  begin_time timestamptz not null,
  heartbeat_time timestamptz not null,
  end_time timestamptz,
  -- Asked by whoever holds a Hello of the same node without the secret; answered by the holder of the stream.
  probe_nonce bytea check (octet_length(probe_nonce) = 16),
  probe_time timestamptz,
  probe_reply_time timestamptz,
  -- The boot whose containers were compared with the instances last. Kept from session to session.
  reconciled_boot_id text
);

-- Up to which sequence number a journal is committed, without a hole. A node whose state folder was lost begins a
-- new journal.
create table node_journals (
  node_id text not null,
  journal_id text not null,
  watermark bigint not null check (watermark >= 0),
  update_time timestamptz not null,
  primary key (node_id, journal_id)
);

-- The intervals in which containers ran, as agents journaled them. The evidence of every bill: rows are added and
-- never changed.
create table usage_intervals (
  node_id text not null,
  journal_id text not null,
  sequence bigint not null check (sequence >= 1),
  organization_id text not null,
  instance_id text not null,
  attempt integer not null check (attempt >= 1),
  boot_id text not null,
  -- On the boot's monotonic clock: the only measure of the duration.
  begin_monotonic_ms bigint not null check (begin_monotonic_ms >= 0),
  end_monotonic_ms bigint not null check (end_monotonic_ms >= begin_monotonic_ms),
  -- On the agent's wall clock: anchors the interval and never measures it.
  begin_time timestamptz,
  -- On our clock: when it was committed.
  receive_time timestamptz not null,
  -- A resent interval is the same row. A duplicate can never be billed twice.
  primary key (node_id, journal_id, sequence)
);
create index usage_intervals_by_instance on usage_intervals (organization_id, instance_id, attempt);

create function refuse_usage_interval_change() returns trigger
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'usage intervals are never changed' using errcode = 'restrict_violation';
end
$$;

create trigger usage_intervals_append_only
  before update or delete on usage_intervals
  for each row execute function refuse_usage_interval_change();
create trigger usage_intervals_no_truncate
  before truncate on usage_intervals
  for each statement execute function refuse_usage_interval_change();
-- "always": else a session with session_replication_role = replica would slip past.
alter table usage_intervals enable always trigger usage_intervals_append_only;
alter table usage_intervals enable always trigger usage_intervals_no_truncate;

alter table usage_intervals enable row level security;
alter table usage_intervals force row level security;
create policy usage_intervals_tenant on usage_intervals for select to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
create policy usage_intervals_owner on usage_intervals to clodei_owner using (true) with check (true);
create policy usage_intervals_system on usage_intervals to clodei_system using (true) with check (true);

grant select, insert, update on node_sessions to clodei_system;
grant select, insert, update, delete on node_journals to clodei_system;
-- Neither role may do more than add: the triggers are the second guard.
grant select, insert on usage_intervals to clodei_system;
grant select on usage_intervals to clodei_app;
