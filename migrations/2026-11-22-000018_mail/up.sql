-- A new table, and an index of a table that is short: gives up rather than have others queue behind it.
SET LOCAL lock_timeout = '2s';

-- What was mailed to people to prove that they read it: one of each purpose for a user, a newer one
-- takes the place of the older; gone once used. Of the token there is a hash alone. Without a foreign
-- key: for an address that nobody has, or a disabled user, there is one of nobody's, so that asking takes
-- as long for whomever.
CREATE TABLE one_time_tokens (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL,
    purpose text COLLATE "C" NOT NULL
        CHECK (purpose IN ('verify_email', 'change_email', 'reset_password')),
    -- SHA-256.
    token_hash bytea NOT NULL CHECK (octet_length(token_hash) = 32),
    -- Where it is mailed to, and all that it proves.
    email text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    UNIQUE (user_id, purpose)
);

-- For the sweep.
CREATE INDEX one_time_tokens_expires_at_idx ON one_time_tokens (expires_at);

-- For the end of a user.
CREATE INDEX outbox_mail_user_idx ON outbox ((payload ->> 'user_id')) WHERE kind = 'mail';
