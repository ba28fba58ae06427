-- Partitioned by month of occurred_at; the service makes partitions ahead.
CREATE TABLE audit_events (
    id uuid NOT NULL,
    occurred_at timestamptz NOT NULL DEFAULT now(),
    action text NOT NULL,
    actor_kind text NOT NULL CHECK (actor_kind IN ('anonymous', 'user', 'service', 'operator')),
    actor_id uuid,
    target_id uuid NOT NULL,
    request_id text NOT NULL,
    address text,
    user_agent text NOT NULL DEFAULT '',
    details jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (occurred_at, id)
) PARTITION BY RANGE (occurred_at);

CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT;

CREATE INDEX audit_events_target_id_idx ON audit_events (target_id, occurred_at DESC);
