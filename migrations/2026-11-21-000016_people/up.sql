-- What follows changes catalogs only, and gives up rather than have others queue behind it. Indexes of
-- large tables are built beside those who write, by `src/store/indexes.rs`; rows are brought up to date
-- by upkeep.
SET LOCAL lock_timeout = '2s';

-- Whom an act concerns: all that happened to somebody is found by it, whatever was acted on. Rows from
-- before, and of replicas from before, have none until upkeep comes by.
ALTER TABLE audit_events ADD COLUMN user_id uuid;

-- Whom an act concerned of which that was not written down yet.
CREATE FUNCTION audit_user(action text, target_id uuid, details jsonb) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN details ->> 'user_id' ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
            THEN (details ->> 'user_id')::uuid
        WHEN action ~ '^(user|password)[.]' OR action ~ '^quota[.]override_' THEN target_id
    END
$$;

-- Of the parent alone: partitions get theirs one by one.
CREATE INDEX audit_events_user_id_idx ON ONLY audit_events (user_id, occurred_at DESC, id DESC);
CREATE INDEX audit_events_actor_id_idx ON ONLY audit_events (actor_id, occurred_at DESC, id DESC);
CREATE INDEX audit_events_action_idx
    ON ONLY audit_events (action COLLATE "C", occurred_at DESC, id DESC);
-- What is left to be brought up to date: soon nothing.
CREATE INDEX audit_events_unattributed_idx ON ONLY audit_events (occurred_at)
    WHERE user_id IS NULL AND audit_user(action, target_id, details) IS NOT NULL;

-- Where names are looked up and compared, lower() is that of the collation C: in some locales the
-- database's own takes I for another letter than i. A small table.
DROP INDEX service_accounts_name_key;
CREATE UNIQUE INDEX service_accounts_name_key ON service_accounts (lower(name COLLATE "C"));

-- Users who were deleted and of whom traces may still be there: looked for at due_at, for as long as
-- anything of theirs may still be booked.
CREATE TABLE user_erasures (
    user_id uuid PRIMARY KEY,
    deleted_at timestamptz NOT NULL DEFAULT now(),
    due_at timestamptz NOT NULL DEFAULT now(),
    -- Where the search goes on that is under way: what is looked through, and behind which row.
    step text NOT NULL DEFAULT 'trail_about' 
        CHECK (step IN ('trail_about', 'trail_by', 'usage', 'usage_end')),
    after_at timestamptz,
    after_id uuid,
    CHECK ((after_at IS NULL) = (after_id IS NULL))
);

CREATE INDEX user_erasures_due_at_idx ON user_erasures (due_at);
