-- A certificate as it was handed out, in DER, until one of its node's is used: a request that is repeated because its
-- answer was lost gets the same one, and so costs no further one.
alter table node_certificates add column certificate bytea;
grant update (certificate) on node_certificates to clodei_system;
