-- Placement and instances. Runs as clodei_owner; FORCE ROW LEVEL SECURITY binds the owner too, so it has a policy.

-- Which GPU is whose. A row is live until it is released; the partial unique index is what makes it impossible
-- that one GPU is given to two instances, whatever the replicas believe. Tenants have no access: what is theirs
-- stands on their instance.
create table gpu_allocations (
  id bigint generated always as identity primary key,
  organization_id text not null,
  instance_id text collate "C" not null,
  attempt integer not null check (attempt >= 1),
  node_id text collate "C" not null,
  gpu_uuid text not null,
  create_time timestamptz not null,
  release_time timestamptz check (release_time >= create_time)
);
create unique index gpu_allocations_live on gpu_allocations (gpu_uuid) where release_time is null;
create index gpu_allocations_by_instance on gpu_allocations (instance_id) where release_time is null;
create index gpu_allocations_released on gpu_allocations (release_time) where release_time is not null;
alter table gpu_allocations enable row level security;
alter table gpu_allocations force row level security;
create policy owner_all on gpu_allocations to clodei_owner using (true);
create policy system_all on gpu_allocations to clodei_system using (true);
grant select, insert, delete on gpu_allocations to clodei_system;
grant update (release_time) on gpu_allocations to clodei_system;

-- CPU and memory of each instance that is placed. One live row an instance.
create table resource_allocations (
  id bigint generated always as identity primary key,
  organization_id text not null,
  instance_id text collate "C" not null,
  attempt integer not null check (attempt >= 1),
  node_id text collate "C" not null,
  cpu_millis integer not null check (cpu_millis > 0),
  memory_mib integer not null check (memory_mib > 0),
  create_time timestamptz not null,
  release_time timestamptz check (release_time >= create_time)
);
create unique index resource_allocations_live on resource_allocations (instance_id) where release_time is null;
create index resource_allocations_by_node on resource_allocations (node_id) where release_time is null;
create index resource_allocations_released on resource_allocations (release_time) where release_time is not null;
alter table resource_allocations enable row level security;
alter table resource_allocations force row level security;
create policy owner_all on resource_allocations to clodei_owner using (true);
create policy system_all on resource_allocations to clodei_system using (true);
grant select, insert, delete on resource_allocations to clodei_system;
grant update (release_time) on resource_allocations to clodei_system;

-- Instances: the wish and what became of it. The states are those of instances/model.ts.
create table instances (
  id text collate "C" primary key,
  organization_id text not null,
  -- InstanceSpec as its protobuf message, defaults filled in. Never changes.
  spec bytea not null,
  -- Taken from the spec, for filters.
  labels jsonb not null,
  gpu_model text not null,
  created_by text not null,
  create_time timestamptz not null,
  update_time timestamptz not null,
  -- Counts the changes, from 1, without gaps.
  version bigint not null check (version >= 1),
  -- Counts the events, from 1, without gaps.
  event_count bigint not null check (event_count >= 1),
  attempt integer not null check (attempt >= 1),
  restart_count integer not null check (restart_count >= 0),

  state text not null check (state in
    ('PENDING', 'SCHEDULED', 'PULLING', 'CREATING', 'RUNNING', 'STOPPING', 'STOPPED', 'FAILED', 'DELETED')),
  reason text not null,
  message text not null,
  -- PENDING: since when it waits, which is its place in the queue, and until when.
  queue_time timestamptz,
  placement_deadline timestamptz,
  -- SCHEDULED by the restart policy: not started before.
  not_before_time timestamptz,
  -- PULLING.
  pull_bytes_done bigint,
  pull_bytes_total bigint,
  -- STOPPING: what follows ('end': what the node says), and whether the attempt has ended on its node.
  stop_then text check (stop_then in ('stop', 'start', 'delete', 'end')),
  attempt_ended boolean,
  delete_time timestamptz,

  start_time timestamptz,
  finish_time timestamptz,
  exit_code integer,
  image_digest text not null default '',
  image_id text not null default '',
  -- What the node's kernel really applies, as the agent read it back.
  isolation jsonb,

  -- Where it was placed last; its workspace is there unless node_lost. placed_attempt is the attempt that was.
  node_id text collate "C",
  placed_attempt integer,
  node_lost boolean not null default false,
  node_reachable boolean,
  country text,
  region text,
  datacenter text,
  tier integer,
  -- The GPUs that are the instance's now, as gpu_allocations has them.
  gpus jsonb not null default '[]',

  check ((node_id is null) = (placed_attempt is null)),
  check ((state = 'PENDING') = (queue_time is not null)),
  check ((state = 'STOPPING') = (stop_then is not null)),
  check ((state = 'DELETED') = (delete_time is not null)),
  check (placed_attempt <= attempt)
);
create index instances_by_organization on instances (organization_id, id);
create index instances_pending on instances (queue_time, id) where state = 'PENDING';
create index instances_by_node on instances (node_id, id) include (node_reachable, node_lost) where state <> 'DELETED';
create index instances_deleted on instances (delete_time) where state = 'DELETED';
alter table instances enable row level security;
alter table instances force row level security;
create policy owner_all on instances to clodei_owner using (true);
create policy system_all on instances to clodei_system using (true);
create policy tenant_own on instances to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
grant select on instances to clodei_app, clodei_system;
-- A new instance waits in PENDING: it has no node and no GPUs that its customer could name.
grant insert (id, organization_id, spec, labels, gpu_model, created_by, create_time, update_time, version, event_count,
  attempt, restart_count, state, reason, message, queue_time, placement_deadline) on instances to clodei_app;
-- What a customer's request can change; where the instance runs and what it holds is not among it.
grant update (update_time, version, event_count, attempt, restart_count, state, reason, message, queue_time,
  placement_deadline, not_before_time, pull_bytes_done, pull_bytes_total, stop_then, attempt_ended, delete_time,
  start_time, finish_time, exit_code) on instances to clodei_app;
grant update (update_time, version, event_count, attempt, restart_count, state, reason, message, queue_time,
  placement_deadline, not_before_time, pull_bytes_done, pull_bytes_total, stop_then, attempt_ended, delete_time,
  start_time, finish_time, exit_code, image_digest, image_id, isolation, node_id, placed_attempt, node_lost,
  node_reachable, country, region, datacenter, tier, gpus) on instances to clodei_system;

-- What happened to an instance. Only ever added to; gone with the instance.
create table instance_events (
  instance_id text collate "C" not null,
  sequence bigint not null check (sequence >= 1),
  organization_id text not null,
  event_time timestamptz not null,
  actor_kind text not null check (actor_kind in ('CUSTOMER', 'PLATFORM', 'NODE', 'SYSTEM')),
  actor_id text not null,
  attempt integer not null,
  state text not null,
  reason text not null,
  message text not null,
  primary key (instance_id, sequence)
);
alter table instance_events enable row level security;
alter table instance_events force row level security;
create policy owner_all on instance_events to clodei_owner using (true);
create policy system_all on instance_events to clodei_system using (true);
create policy tenant_own on instance_events to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
grant select, insert on instance_events to clodei_app, clodei_system;

-- The grants above keep the logins from changing events; this keeps the owner from it as well. Events leave only
-- with their instance, 30 days after it was deleted.
create function refuse_instance_event_change() returns trigger
language plpgsql set search_path = pg_catalog, public as $$
begin
  if tg_op = 'DELETE' and exists (
    select 1 from public.instances
    where id = old.instance_id and state = 'DELETED' and delete_time < now() - interval '30 days'
  ) then
    return old;
  end if;
  raise exception 'events of an instance are never changed' using errcode = 'insufficient_privilege';
end
$$;
create trigger instance_events_append_only before update or delete on instance_events
  for each row execute function refuse_instance_event_change();
create trigger instance_events_no_truncate before truncate on instance_events
  for each statement execute function refuse_instance_event_change();
-- "always": session_replication_role must not slip past.
alter table instance_events enable always trigger instance_events_append_only;
alter table instance_events enable always trigger instance_events_no_truncate;

-- Removes instances that were deleted before the time given, and in any case only after 30 days, with their events.
create function purge_deleted_instances(deleted_before timestamptz, max_rows integer) returns integer
language plpgsql security definer set search_path = pg_catalog, public as $$
declare
  doomed text[];
begin
  select coalesce(array_agg(id), '{}') into doomed from (
    select id from public.instances
    where state = 'DELETED' and delete_time < least(deleted_before, now() - interval '30 days')
    order by delete_time limit max_rows for update skip locked
  ) as old_instances;
  delete from public.instance_events where instance_id = any (doomed);
  delete from public.instances where id = any (doomed);
  return cardinality(doomed);
end
$$;
revoke all on function purge_deleted_instances(timestamptz, integer) from public;
grant execute on function purge_deleted_instances(timestamptz, integer) to clodei_system;
