-- Where other replicas reach the process that holds the stream, "host:port": they ask it for output of the node. Null where
-- it does not listen for them. Whether it is that process which answers there, its certificate says.
alter table node_sessions add column replica_endpoint text;
