/** The journal's tables. A change is a new version with a step from the one before. */
export const schemaVersion = 1;

export const schema = `
create table facts (name text primary key, value text not null) strict, without rowid;
create table entries (
  sequence integer primary key,
  kind text not null check (kind in ('status', 'usage')),
  instance_id text not null,
  attempt integer not null,
  payload blob not null
) strict;
create index entries_by_attempt on entries (instance_id, attempt, kind, sequence);
create table desired_set (id integer primary key check (id = 1), payload blob not null) strict;
create table attempts (
  instance_id text not null,
  attempt integer not null,
  phase text not null check (phase in ('preparing', 'starting', 'running', 'ended', 'removed')),
  stop_reason text not null,
  stop_time_ms integer not null,
  spec blob not null,
  boot_id text not null,
  metered_ms integer not null,
  started_ms integer not null,
  report_sequence integer not null,
  primary key (instance_id, attempt)
) strict, without rowid
`;
