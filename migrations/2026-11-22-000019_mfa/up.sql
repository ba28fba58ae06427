-- Catalogs only, and gives up rather than have others queue behind it.
SET LOCAL lock_timeout = '2s';

-- Whether a login needs a second factor. Beside the credentials themselves, for whoever reads a user
-- reads it along; both are written in one transaction, under the lock of this row.
ALTER TABLE users ADD COLUMN mfa_enabled boolean NOT NULL DEFAULT false;

-- Whether a second factor opened it.
ALTER TABLE sessions ADD COLUMN mfa boolean NOT NULL DEFAULT false;

-- One for each user: what an authenticator app was given.
CREATE TABLE totp_credentials (
    user_id uuid PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    -- Another with each enrolment: what was begun with one is not ended with another.
    id uuid NOT NULL,
    -- AES-256-GCM under a key that follows from the master key: nonce, ciphertext, tag. Bound to user_id
    -- and id.
    sealed_secret bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Until then it counts for nothing.
    confirmed_at timestamptz,
    -- The time step of the newest code that was used: no code of it or before counts again.
    last_step bigint NOT NULL DEFAULT 0
);

-- Those that were not used yet.
CREATE TABLE recovery_codes (
    user_id uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    -- SHA-256 of user and code: 120 random bits need no slow hash.
    code_hash bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, code_hash)
);

-- No session by password alone for whom a second factor is asked, whoever opens it: replicas of the version
-- before know of none.
CREATE FUNCTION require_mfa() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM users WHERE id = NEW.user_id AND mfa_enabled) THEN
        RAISE EXCEPTION 'a session of this user needs a second factor'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'sessions_mfa_required';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER sessions_mfa_required BEFORE INSERT ON sessions
    FOR EACH ROW WHEN (NOT NEW.mfa) EXECUTE FUNCTION require_mfa();
