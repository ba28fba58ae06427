CREATE TABLE api_keys (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name text NOT NULL,
    -- SHA-256 of the key: 256 random bits need no slow hash.
    key_hash bytea NOT NULL,
    -- Words of the application; they mean nothing here.
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
-- last_used_at is written again and again: room is left in each page, and it is in no index.
) WITH (fillfactor = 90);

CREATE UNIQUE INDEX api_keys_key_hash_key ON api_keys (key_hash);
CREATE INDEX api_keys_user_id_idx ON api_keys (user_id, id);
-- For the sweep.
CREATE INDEX api_keys_ended_idx ON api_keys (LEAST(revoked_at, expires_at))
    WHERE revoked_at IS NOT NULL OR expires_at IS NOT NULL;

-- As tell_change: `user ID` when a key stops being what it was. `api_keys` when there is a new one:
-- only the answer that there is none can contradict that, and such answers know no user.
CREATE FUNCTION tell_api_key_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM pg_notify('tollkeeper_changes', 'api_keys');
    ELSE
        PERFORM pg_notify('tollkeeper_changes', 'user ' || OLD.user_id);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER api_keys_added
    AFTER INSERT ON api_keys
    FOR EACH ROW EXECUTE FUNCTION tell_api_key_change();

-- All columns but last_used_at, which contradicts nothing.
CREATE TRIGGER api_keys_changed
    AFTER UPDATE OF id, user_id, name, key_hash, scopes, created_at, expires_at, revoked_at
    ON api_keys
    FOR EACH ROW EXECUTE FUNCTION tell_api_key_change();

-- Sweeping keys that have ended contradicts nothing.
CREATE TRIGGER api_keys_deleted
    AFTER DELETE ON api_keys
    FOR EACH ROW
    WHEN (OLD.revoked_at IS NULL AND (OLD.expires_at IS NULL OR OLD.expires_at > now()))
    EXECUTE FUNCTION tell_api_key_change();

CREATE TRIGGER api_keys_emptied AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
