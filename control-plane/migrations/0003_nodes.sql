-- The fleet: nodes, how they prove who they are, and how they are let in.
--
-- These are the platform's tables: clodei_app reads none of them. It has three definer functions: one says
-- whether an enrollment token or a certificate request deserves work at all, one moves a node's desired set on.

create table nodes (
  id text collate "C" primary key check (id ~ '^nod_[0-7][0-9a-hjkmnp-tv-z]{25}$'),
  name text collate "C" not null check (name ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
  country text not null check (country ~ '^[A-Z]{2}$'),
  region text not null,
  datacenter text not null,
  tier integer not null check (tier between 1 and 4),
  state text not null check (state in ('enrolled', 'ready', 'unreachable', 'quarantined', 'revoked')),
  message text not null default '',
  cordoned boolean not null default false,
  connected boolean not null default false,
  -- Counts enrollments under this id. What an earlier one left behind enrolls nothing any more.
  enrollment_epoch integer not null default 1,
  agent_version text not null default '',
  -- clodei.v1.NodeInventory. Bytes, because placement reads whole inventories and SQL no part of one.
  inventory bytea,
  accepting_work boolean not null default false,
  accepting_work_message text not null default '',
  -- Digest of what the last heartbeat said, '' after anything else changed: an equal one only extends the lease.
  heartbeat_digest text not null default '',
  heartbeat_time timestamptz,
  lease_expire_time timestamptz,
  desired_generation bigint not null default 0,
  observed_generation bigint not null default 0,
  version bigint not null default 1,
  create_time timestamptz not null default now(),
  update_time timestamptz not null default now(),
  revoke_time timestamptz,
  check ((state = 'revoked') = (revoke_time is not null)),
  check (not connected or state in ('ready', 'quarantined'))
);

-- Unique among the nodes that are there: a revoked node's name may be given to its successor.
create unique index nodes_name on nodes (name) where state <> 'revoked';
create index nodes_name_id on nodes (name, id);
-- Leases are looked for every second; a fleet that is well has few rows at the front.
create index nodes_lease_expire_time on nodes (lease_expire_time) where state = 'ready' or connected;

create table enrollment_tokens (
  id text collate "C" primary key check (id ~ '^ent_[0-7][0-9a-hjkmnp-tv-z]{25}$'),
  secret_hash bytea not null check (octet_length(secret_hash) = 32),
  country text not null check (country ~ '^[A-Z]{2}$'),
  region text not null,
  datacenter text not null,
  tier integer not null check (tier between 1 and 4),
  node_name text not null default '',
  max_uses integer not null check (max_uses between 1 and 1000),
  uses integer not null default 0,
  reenrolls_node_id text collate "C" references nodes (id),
  creator_id text not null,
  create_time timestamptz not null default now(),
  expire_time timestamptz not null,
  revoke_time timestamptz,
  check (uses between 0 and max_uses),
  check (node_name = '' or max_uses = 1),
  check (reenrolls_node_id is null or max_uses = 1)
);

create index enrollment_tokens_reenrolls on enrollment_tokens (reenrolls_node_id) where reenrolls_node_id is not null;

-- Who used a token: the same token and key again is the same node, because a lost answer must not burn the token.
create table enrollments (
  enrollment_token_id text collate "C" not null references enrollment_tokens (id),
  public_key_hash bytea not null check (octet_length(public_key_hash) = 32),
  node_id text collate "C" not null references nodes (id),
  enrollment_epoch integer not null,
  create_time timestamptz not null default now(),
  primary key (enrollment_token_id, public_key_hash)
);

create table node_certificates (
  -- The serial number in hexadecimal, without leading zero octets.
  serial text collate "C" primary key check (serial ~ '^[0-9a-f]{2,40}$'),
  node_id text collate "C" not null references nodes (id),
  -- The order in which they were issued: time could stand still between two.
  issue_order bigint generated always as identity,
  public_key_hash bytea not null check (octet_length(public_key_hash) = 32),
  -- active until a newer one is used (superseded) or the node is revoked or enrolled again (ended).
  state text not null check (state in ('active', 'superseded', 'ended')),
  create_time timestamptz not null,
  expire_time timestamptz not null,
  first_use_time timestamptz
);

create index node_certificates_node_id on node_certificates (node_id, issue_order desc);

-- Challenges of RenewExpired that were used. The challenges themselves are not stored: they carry a MAC.
create table used_renewal_challenges (
  challenge_hash bytea primary key check (octet_length(challenge_hash) = 32),
  expire_time timestamptz not null
);

create index used_renewal_challenges_expire_time on used_renewal_challenges (expire_time);

alter table nodes enable row level security;
alter table nodes force row level security;
alter table enrollment_tokens enable row level security;
alter table enrollment_tokens force row level security;
alter table enrollments enable row level security;
alter table enrollments force row level security;
alter table node_certificates enable row level security;
alter table node_certificates force row level security;
alter table used_renewal_challenges enable row level security;
alter table used_renewal_challenges force row level security;

create policy owner_all on nodes to clodei_owner using (true) with check (true);
create policy owner_all on enrollment_tokens to clodei_owner using (true) with check (true);
create policy owner_all on enrollments to clodei_owner using (true) with check (true);
create policy owner_all on node_certificates to clodei_owner using (true) with check (true);
create policy owner_all on used_renewal_challenges to clodei_owner using (true) with check (true);

create policy system_all on nodes to clodei_system using (true) with check (true);
create policy system_all on enrollment_tokens to clodei_system using (true) with check (true);
create policy system_all on enrollments to clodei_system using (true) with check (true);
create policy system_all on node_certificates to clodei_system using (true) with check (true);
create policy system_all on used_renewal_challenges to clodei_system using (true) with check (true);

-- Rows of nodes, tokens and certificates are never deleted: they are the record of who was let in.
grant select, insert on nodes, enrollment_tokens, node_certificates to clodei_system;
-- Not the location: it stands in the node's certificate, and cannot change without a new enrollment.
grant update (
  state, message, cordoned, connected, enrollment_epoch, agent_version, inventory, accepting_work,
  accepting_work_message, heartbeat_digest, heartbeat_time, lease_expire_time, desired_generation, observed_generation,
  version, update_time, revoke_time
) on nodes to clodei_system;
grant update (uses, revoke_time) on enrollment_tokens to clodei_system;
grant update (state, first_use_time) on node_certificates to clodei_system;
grant select, insert on enrollments to clodei_system;
grant select, insert, delete on used_renewal_challenges to clodei_system;

-- Whether a token with this id and hash exists at all. Keeps strangers off the system's connections.
create function enrollment_token_exists(p_id text, p_secret_hash bytea)
returns boolean
language sql stable security definer set search_path = public, pg_temp as $$
  select exists (select 1 from enrollment_tokens t where t.id = p_id and t.secret_hash = p_secret_hash)
$$;

-- A node's desired set changed: its generation moves on, in the transaction that changed it. The new generation,
-- or null where there is no such node.
create function bump_desired_generation(p_node_id text)
returns bigint
language plpgsql volatile security definer set search_path = public, pg_temp as $$
declare
  v_generation bigint;
begin
  update nodes
  set desired_generation = desired_generation + 1, version = version + 1, update_time = now()
  where id = p_node_id
  returning desired_generation into v_generation;
  if found then
    insert into changes (organization_id, kind, subject_id, payload) values ('', 'node', p_node_id, '');
  end if;
  return v_generation;
end
$$;

revoke all on function enrollment_token_exists(text, bytea) from public;
revoke all on function bump_desired_generation(text) from public;
grant execute on function enrollment_token_exists(text, bytea) to clodei_app;
grant execute on function bump_desired_generation(text) to clodei_app, clodei_system;
