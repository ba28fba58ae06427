-- Whom an act concerns: all that happened to somebody is found by it, whatever was acted on.
ALTER TABLE audit_events ADD COLUMN user_id uuid;

UPDATE audit_events SET user_id = CASE
    WHEN details ? 'user_id' THEN (details ->> 'user_id')::uuid
    WHEN action ~ '^(user|password)\.' OR action LIKE 'quota.override\_%' THEN target_id
END;

CREATE INDEX audit_events_user_id_idx ON audit_events (user_id, occurred_at DESC, id DESC);
CREATE INDEX audit_events_actor_id_idx ON audit_events (actor_id, occurred_at DESC, id DESC);

-- For lists of users. The indexes that keep names unique order as the database's locale does, which
-- puts names of one prefix in several places.
CREATE INDEX users_email_prefix_idx ON users (lower(email) COLLATE "C");
CREATE INDEX users_username_prefix_idx ON users (lower(username) COLLATE "C");
CREATE INDEX users_disabled_idx ON users (id) WHERE NOT is_active;
CREATE INDEX users_admin_idx ON users (id) WHERE role = 'admin';

-- Users who were deleted and of whom single usage records may still be there.
CREATE TABLE user_erasures (
    user_id uuid PRIMARY KEY,
    deleted_at timestamptz NOT NULL DEFAULT now()
);
