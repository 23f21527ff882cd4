-- Instances that show an unhealthy GPU: few, and looked for every second. First, because everybody locks instances before nodes.
create index instances_gpu_trouble on instances (id) where gpus @? '$[*].trouble';

-- The GPUs of nodes apart from their inventories, so that who is ill, and who is reported twice, is a cheap question.
create table node_gpus (
  node_id text collate "C" not null references nodes (id),
  gpu_uuid text not null,
  -- Whether the node's last inventory had it. One that is gone keeps its row: whoever holds it is to hear of that.
  reported boolean not null,
  -- Why it is not healthy; '' where it is.
  trouble text not null,
  primary key (node_id, gpu_uuid)
);
create index node_gpus_in_trouble on node_gpus (node_id) where trouble <> '';
alter table node_gpus enable row level security;
alter table node_gpus force row level security;
create policy owner_all on node_gpus to clodei_owner using (true) with check (true);
create policy system_all on node_gpus to clodei_system using (true) with check (true);
grant select, insert, delete on node_gpus to clodei_system;
grant update (reported, trouble) on node_gpus to clodei_system;

-- Which of its GPUs other nodes report as well, for an operator; '' where none.
alter table nodes add column shared_gpus_message text not null default '';
grant update (shared_gpus_message) on nodes to clodei_system;
