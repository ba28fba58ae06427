-- Who admits from leases: one row for each start of a process. `docs/quota.md` says what follows from
-- these times.
CREATE TABLE replicas (
    id uuid PRIMARY KEY,
    -- It admits nothing from its leases after this, unless it is heard of again.
    expires_at timestamptz NOT NULL,
    -- None of its holds ends later.
    holds_until timestamptz NOT NULL,
    -- Nothing revives it: its leases are being taken away.
    is_dead boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50);

-- What a replica may admit on a meter. No foreign keys: they would cost each operation, and a replica's
-- row is locked by it and deleted after all of its leases.
CREATE TABLE quota_leases (
    user_id uuid NOT NULL,
    month text COLLATE "C" NOT NULL CHECK (length(month) = 7),
    model text COLLATE "C" NOT NULL,
    replica_id uuid NOT NULL,
    granted bigint NOT NULL CHECK (granted >= 0),
    -- Of the operation that was carried out last: none is carried out twice.
    operation bigint NOT NULL CHECK (operation > 0),
    operated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, month, model, replica_id)
) WITH (fillfactor = 70);

CREATE INDEX quota_leases_replica_id_idx ON quota_leases (replica_id);

-- How holds ended, where their owner has to learn it or has to find out who was first.
CREATE TABLE quota_settlements (
    -- The owner.
    replica_id uuid NOT NULL,
    hold_id bigint NOT NULL,
    kind text NOT NULL CHECK (kind IN ('committed', 'released', 'expired')),
    -- What a commit charged; 0 of all else.
    tokens bigint NOT NULL CHECK (tokens >= 0),
    PRIMARY KEY (replica_id, hold_id)
);
