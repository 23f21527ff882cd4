-- What every slice stands on: the identity of the database, idempotency records, and the feed of changes.
-- Runs as clodei_owner. FORCE ROW LEVEL SECURITY binds the owner too, so it has a policy of its own.

revoke all on all tables in schema public from public;
grant select on schema_migrations to public;

-- Tells this database from every other, so that a cursor of one is not taken for a cursor of another.
create table database_identity (
  singleton boolean primary key default true check (singleton),
  id uuid not null default gen_random_uuid(),
  create_time timestamptz not null default now()
);
insert into database_identity default values;
grant select on database_identity to clodei_app, clodei_system;

-- One row for each request that carried an idempotency key, written in the request's own transaction.
-- organization_id is '' for callers of the platform, which clodei_app therefore never sees.
create table idempotency_records (
  organization_id text not null,
  caller_id text not null,
  method text not null,
  key text not null check (length(key) between 1 and 64),
  request_sha256 bytea not null check (length(request_sha256) = 32),
  -- Null only inside the transaction that works on the request.
  response bytea,
  -- The answer held a secret, which is not in `response`.
  redacted boolean not null default false,
  create_time timestamptz not null default now(),
  primary key (organization_id, caller_id, method, key)
);
create index idempotency_records_by_time on idempotency_records (create_time);
alter table idempotency_records enable row level security;
alter table idempotency_records force row level security;
create policy owner_all on idempotency_records to clodei_owner using (true);
create policy system_all on idempotency_records to clodei_system using (true);
create policy tenant_own on idempotency_records to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
grant select, insert on idempotency_records to clodei_app;
grant update (response, redacted) on idempotency_records to clodei_app;
grant select, insert, delete on idempotency_records to clodei_system;
grant update (response, redacted) on idempotency_records to clodei_system;

-- What watchers are told. `xid` makes the order of commits visible: a reader's position is a snapshot, and its
-- next batch is what its new snapshot shows and the old one did not, whatever the numbers are.
-- `payload` is the object after the change, as its protobuf message. organization_id is '' for the fleet's own.
create table changes (
  revision bigint generated always as identity primary key,
  xid xid8 not null default pg_current_xact_id(),
  organization_id text not null,
  kind text not null check (kind in ('instance', 'node')),
  subject_id text not null,
  payload bytea not null,
  create_time timestamptz not null default now()
);
create index changes_by_feed on changes (kind, organization_id, xid);
create index changes_by_time on changes (create_time);
alter table changes enable row level security;
alter table changes force row level security;
create policy owner_all on changes to clodei_owner using (true);
create policy system_all on changes to clodei_system using (true);
create policy tenant_own on changes to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
grant select on changes to clodei_app;
grant insert (organization_id, kind, subject_id, payload) on changes to clodei_app;
grant select, delete on changes to clodei_system;
grant insert (organization_id, kind, subject_id, payload) on changes to clodei_system;

-- The newest transaction whose changes were pruned from a feed: an older cursor may have missed some.
create table change_horizons (
  organization_id text not null,
  kind text not null,
  pruned_xid xid8 not null,
  primary key (organization_id, kind)
);
alter table change_horizons enable row level security;
alter table change_horizons force row level security;
create policy owner_all on change_horizons to clodei_owner using (true);
create policy system_all on change_horizons to clodei_system using (true);
create policy tenant_own on change_horizons to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
grant select on change_horizons to clodei_app;
grant select, insert, update on change_horizons to clodei_system;
