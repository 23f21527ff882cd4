-- Who may call: organizations, users of token issuers, platform operators, and API keys.
--
-- Authentication knows no tenant yet, so clodei_app reads none of these tables for it: it calls the definer
-- functions below, each of which answers for exactly the credential that it was given.

create table organizations (
  id text collate "C" primary key check (id ~ '^org_[0-7][0-9a-hjkmnp-tv-z]{25}$'),
  name text collate "C" not null check (char_length(name) between 1 and 128),
  create_time timestamptz not null default now()
);

-- A person, as an issuer names it. Holds ids alone: no address and no name.
create table users (
  id text collate "C" primary key check (id ~ '^usr_[0-7][0-9a-hjkmnp-tv-z]{25}$'),
  issuer text not null check (octet_length(issuer) between 1 and 512),
  subject text not null check (octet_length(subject) between 1 and 255),
  create_time timestamptz not null default now(),
  disable_time timestamptz,
  unique (issuer, subject)
);

-- Platform operators: an authority of its own, which no role in an organization implies.
create table operators (
  id text collate "C" primary key check (id ~ '^opr_[0-7][0-9a-hjkmnp-tv-z]{25}$'),
  name text collate "C" not null check (char_length(name) between 1 and 128),
  user_id text collate "C" unique references users (id),
  create_time timestamptz not null default now(),
  disable_time timestamptz
);

create table memberships (
  organization_id text collate "C" not null references organizations (id),
  user_id text collate "C" not null references users (id),
  roles text[] not null check (
    cardinality(roles) between 1 and 7
    and roles <@ array['viewer', 'member', 'operator', 'author', 'compliance_officer', 'manager', 'admin']
  ),
  create_time timestamptz not null default now(),
  primary key (organization_id, user_id)
);

create index memberships_user_id on memberships (user_id);

-- An API key speaks for an organization (with roles) or for a platform operator (with none).
create table api_keys (
  id text collate "C" primary key check (id ~ '^key_[0-7][0-9a-hjkmnp-tv-z]{25}$'),
  organization_id text collate "C" references organizations (id),
  operator_id text collate "C" references operators (id),
  name text collate "C" not null check (char_length(name) between 1 and 128),
  -- sha256 of the whole key. A key has 256 random bits, so a slow hash would protect nothing more.
  secret_hash bytea not null unique check (octet_length(secret_hash) = 32),
  roles text[] not null check (
    cardinality(roles) <= 7
    and roles <@ array['viewer', 'member', 'operator', 'author', 'compliance_officer', 'manager', 'admin']
  ),
  create_time timestamptz not null default now(),
  expire_time timestamptz,
  revoke_time timestamptz,
  check ((organization_id is null) <> (operator_id is null)),
  check ((operator_id is null) = (cardinality(roles) > 0))
);

create index api_keys_organization_id on api_keys (organization_id, id);

alter table organizations enable row level security;
alter table organizations force row level security;
alter table users enable row level security;
alter table users force row level security;
alter table operators enable row level security;
alter table operators force row level security;
alter table memberships enable row level security;
alter table memberships force row level security;
alter table api_keys enable row level security;
alter table api_keys force row level security;

create policy owner_all on organizations to clodei_owner using (true) with check (true);
create policy owner_all on users to clodei_owner using (true) with check (true);
create policy owner_all on operators to clodei_owner using (true) with check (true);
create policy owner_all on memberships to clodei_owner using (true) with check (true);
create policy owner_all on api_keys to clodei_owner using (true) with check (true);

create policy system_all on organizations to clodei_system using (true) with check (true);
create policy system_all on users to clodei_system using (true) with check (true);
create policy system_all on operators to clodei_system using (true) with check (true);
create policy system_all on memberships to clodei_system using (true) with check (true);
create policy system_all on api_keys to clodei_system using (true) with check (true);

-- The setting is '' after a transaction and null before the first: both mean that no row is seen.
create policy tenant on organizations for select to clodei_app
  using (id = nullif(current_setting('clodei.organization_id', true), ''));
create policy tenant on memberships for select to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));
create policy tenant on api_keys for select to clodei_app
  using (organization_id = nullif(current_setting('clodei.organization_id', true), ''));

grant select on organizations, memberships to clodei_app;
-- Not the hash: nothing that serves requests has to read it.
grant select (id, organization_id, name, roles, create_time, expire_time, revoke_time) on api_keys to clodei_app;

grant select, insert on organizations, users, operators, memberships, api_keys to clodei_system;
grant update (disable_time) on users to clodei_system;
grant update (disable_time) on operators to clodei_system;
grant update (roles) on memberships to clodei_system;
grant delete on memberships to clodei_system;
grant update (revoke_time) on api_keys to clodei_system;

-- The key with this id and hash, where it is good now. One row or none: why there is none is not said.
create function authenticate_api_key(p_id text, p_secret_hash bytea)
returns table (organization_id text, organization_name text, operator_id text, roles text[])
language sql stable security definer set search_path = public, pg_temp as $$
  select k.organization_id, o.name, k.operator_id, k.roles
  from api_keys k
  left join organizations o on o.id = k.organization_id
  left join operators p on p.id = k.operator_id
  where k.id = p_id
    and k.secret_hash = p_secret_hash
    and k.revoke_time is null
    and (k.expire_time is null or k.expire_time > now())
    and p.disable_time is null
$$;

-- The user that an issuer names, made at first sight. No row where the user is disabled.
create function authenticate_user(p_issuer text, p_subject text, p_new_id text)
returns table (user_id text, operator_id text)
language plpgsql volatile security definer set search_path = public, pg_temp as $$
begin
  -- Looked for first: an insert that conflicts would still write, for each request.
  if not exists (select 1 from users u where u.issuer = p_issuer and u.subject = p_subject) then
    insert into users (id, issuer, subject) values (p_new_id, p_issuer, p_subject) on conflict (issuer, subject) do nothing;
  end if;
  return query
    select u.id, p.id
    from users u
    left join operators p on p.user_id = u.id and p.disable_time is null
    where u.issuer = p_issuer and u.subject = p_subject and u.disable_time is null;
end
$$;

-- The organizations of one user, at most p_limit.
create function memberships_of_user(p_user_id text, p_limit integer)
returns table (organization_id text, organization_name text, roles text[])
language sql stable security definer set search_path = public, pg_temp as $$
  select m.organization_id, o.name, m.roles
  from memberships m
  join organizations o on o.id = m.organization_id
  where m.user_id = p_user_id
  order by m.organization_id
  limit least(p_limit, 101)
$$;

-- The one membership that a user names by the header.
create function membership_of_user(p_user_id text, p_organization_id text)
returns table (organization_id text, organization_name text, roles text[])
language sql stable security definer set search_path = public, pg_temp as $$
  select m.organization_id, o.name, m.roles
  from memberships m
  join organizations o on o.id = m.organization_id
  where m.user_id = p_user_id and m.organization_id = p_organization_id
$$;

-- Whether what an open stream was admitted by still holds: asked again and again while it is open.
create function caller_holds(p_caller_id text, p_organization_id text, p_roles text[])
returns boolean
language sql stable security definer set search_path = public, pg_temp as $$
  select case left(p_caller_id, 4)
    when 'key_' then exists (
      select 1
      from api_keys k
      left join operators p on p.id = k.operator_id
      where k.id = p_caller_id
        and k.organization_id is not distinct from p_organization_id
        and k.revoke_time is null
        and (k.expire_time is null or k.expire_time > now())
        and p.disable_time is null
    )
    when 'usr_' then exists (
      select 1
      from users u
      left join memberships m on m.user_id = u.id and m.organization_id = p_organization_id
      where u.id = p_caller_id
        and u.disable_time is null
        -- A role that was taken away ends the stream; one that was added does not.
        and (p_organization_id is null or m.roles @> p_roles)
    )
    when 'opr_' then exists (
      select 1
      from operators p
      left join users u on u.id = p.user_id
      where p.id = p_caller_id and p.disable_time is null and u.disable_time is null
    )
    else false
  end
$$;

revoke all on function authenticate_api_key(text, bytea) from public;
revoke all on function authenticate_user(text, text, text) from public;
revoke all on function memberships_of_user(text, integer) from public;
revoke all on function membership_of_user(text, text) from public;
revoke all on function caller_holds(text, text, text[]) from public;
grant execute on function authenticate_api_key(text, bytea) to clodei_app;
grant execute on function authenticate_user(text, text, text) to clodei_app;
grant execute on function memberships_of_user(text, integer) to clodei_app;
grant execute on function membership_of_user(text, text) to clodei_app;
grant execute on function caller_holds(text, text, text[]) to clodei_app;
