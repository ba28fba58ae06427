-- Whatever contradicts an answer that a replica may still hold in memory is told to all replicas,
-- in the transaction that makes it, whoever makes it: also an operator with psql.
--
-- Payloads: `user ID` for a user's state or sessions, `services` for any service account or key,
-- `all` when a table is emptied;
-- Postgres tells equal ones of a transaction once. No usage table takes part: a NOTIFY in every such transaction would cost three
-- quarters of the ingest rate.
CREATE FUNCTION tell_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    what text := 'services';
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        what := 'all';
    ELSIF TG_TABLE_NAME = 'users' THEN
        what := 'user ' || OLD.id;
    ELSIF TG_TABLE_NAME = 'sessions' THEN
        what := 'user ' || OLD.user_id;
    END IF;
    PERFORM pg_notify('tollkeeper_changes', what);
    RETURN NULL;
END
$$;

CREATE TRIGGER users_changed
    AFTER DELETE OR UPDATE OF email, username, role, tier, is_active, auth_epoch ON users
    FOR EACH ROW EXECUTE FUNCTION tell_change();

CREATE TRIGGER sessions_changed
    AFTER UPDATE OF revoked_at, absolute_expires_at ON sessions
    FOR EACH ROW EXECUTE FUNCTION tell_change();

-- Sweeping sessions that have ended contradicts nothing.
CREATE TRIGGER sessions_deleted
    AFTER DELETE ON sessions
    FOR EACH ROW WHEN (OLD.revoked_at IS NULL AND OLD.absolute_expires_at > now())
    EXECUTE FUNCTION tell_change();

CREATE TRIGGER service_accounts_changed
    AFTER DELETE OR UPDATE OF name, scopes, is_active ON service_accounts
    FOR EACH ROW EXECUTE FUNCTION tell_change();

CREATE TRIGGER service_keys_changed
    AFTER INSERT OR DELETE OR UPDATE OF expires_at, revoked_at ON service_keys
    FOR EACH ROW EXECUTE FUNCTION tell_change();

CREATE TRIGGER users_emptied AFTER TRUNCATE ON users
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
CREATE TRIGGER sessions_emptied AFTER TRUNCATE ON sessions
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
CREATE TRIGGER service_accounts_emptied AFTER TRUNCATE ON service_accounts
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
CREATE TRIGGER service_keys_emptied AFTER TRUNCATE ON service_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tell_change();
