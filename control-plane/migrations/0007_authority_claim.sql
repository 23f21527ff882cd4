-- The CA of whoever serves this database. Two replicas that each made their own would give nodes certificates that the
-- other refuses: the second one is refused at its start.
create table authority_claim (
  singleton boolean primary key default true check (singleton),
  ca_sha256 text not null check (ca_sha256 ~ '^[0-9a-f]{64}$'),
  create_time timestamptz not null default now()
);
alter table authority_claim enable row level security;
alter table authority_claim force row level security;
create policy owner_all on authority_claim to clodei_owner using (true) with check (true);
create policy system_all on authority_claim to clodei_system using (true) with check (true);
grant select, insert, delete on authority_claim to clodei_system;
