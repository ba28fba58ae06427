-- Leases are looked up for one replica: by its own, and by whoever takes those of a dead one away. One
-- index serves both, so that no plan can choose the worse of two.
ALTER TABLE quota_leases DROP CONSTRAINT quota_leases_pkey;
DROP INDEX quota_leases_replica_id_idx;
ALTER TABLE quota_leases ADD PRIMARY KEY (replica_id, user_id, month, model);
