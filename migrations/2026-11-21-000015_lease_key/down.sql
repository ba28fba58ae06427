ALTER TABLE quota_leases DROP CONSTRAINT quota_leases_pkey;
ALTER TABLE quota_leases ADD PRIMARY KEY (user_id, month, model, replica_id);
CREATE INDEX quota_leases_replica_id_idx ON quota_leases (replica_id);
