-- One row for a user's month and model; model '' stands for all models together. Whoever decides about
-- the month's limit locks that row first. No foreign key to users, as usage has none.
CREATE TABLE quota_balances (
    user_id uuid NOT NULL,
    month text COLLATE "C" NOT NULL CHECK (length(month) = 7),
    model text COLLATE "C" NOT NULL,
    -- The month's limit without credits, as it was last decided about; 2^63 - 1: unlimited; null: not
    -- decided about yet. What is used beyond it is drawn from credits.
    base_limit bigint CHECK (base_limit >= 0),
    -- Sum of what replicas hold leases for.
    leased bigint NOT NULL DEFAULT 0 CHECK (leased >= 0),
    PRIMARY KEY (user_id, month, model)
) WITH (fillfactor = 70);

-- Takes the place of the tier's monthly tokens for one user.
CREATE TABLE quota_overrides (
    user_id uuid PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    -- Null: unlimited.
    monthly_tokens bigint CHECK (monthly_tokens >= 0),
    expires_at timestamptz,
    reason text NOT NULL,
    actor_kind text NOT NULL,
    actor_id uuid,
    set_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE credit_grants (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    tokens bigint NOT NULL CHECK (tokens > 0),
    -- Low ones are drawn first, then those that expire soonest.
    priority integer NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    voided_at timestamptz,
    -- From when on it gives nothing more, because it was voided or because it expired and that was
    -- noted; and what had been drawn by then.
    closed_at timestamptz,
    drawn_tokens bigint CHECK (drawn_tokens BETWEEN 0 AND tokens),
    reason text NOT NULL,
    -- Chosen by the caller: a repeated grant is the same one.
    request_id uuid NOT NULL,
    actor_kind text NOT NULL,
    actor_id uuid,
    CHECK ((closed_at IS NULL) = (drawn_tokens IS NULL)),
    CHECK (voided_at IS NULL OR closed_at IS NOT NULL)
);

CREATE UNIQUE INDEX credit_grants_request_id_key ON credit_grants (request_id);
CREATE INDEX credit_grants_user_id_idx ON credit_grants (user_id, id);
-- For closing what has expired.
CREATE INDEX credit_grants_expires_at_idx ON credit_grants (expires_at)
    WHERE closed_at IS NULL AND expires_at IS NOT NULL;

-- As tell_change, `quota ID`: what a user may use is another amount now. It contradicts no answer about
-- credentials, so it is a word of its own.
CREATE FUNCTION tell_quota_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM pg_notify('tollkeeper_changes', 'quota ' || NEW.user_id);
    ELSE
        PERFORM pg_notify('tollkeeper_changes', 'quota ' || OLD.user_id);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER quota_overrides_changed
    AFTER INSERT OR DELETE OR UPDATE ON quota_overrides
    FOR EACH ROW EXECUTE FUNCTION tell_quota_change();

-- That an expiry was noted changes nothing: everybody knew the time.
CREATE TRIGGER credit_grants_changed
    AFTER INSERT OR DELETE OR UPDATE OF user_id, tokens, priority, granted_at, expires_at, voided_at
    ON credit_grants
    FOR EACH ROW EXECUTE FUNCTION tell_quota_change();

CREATE TRIGGER quota_overrides_emptied AFTER TRUNCATE ON quota_overrides
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
CREATE TRIGGER credit_grants_emptied AFTER TRUNCATE ON credit_grants
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
