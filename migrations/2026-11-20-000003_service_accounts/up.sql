CREATE TABLE service_accounts (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    scopes text[] NOT NULL,
    is_active boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE UNIQUE INDEX service_accounts_name_key ON service_accounts (lower(name));

-- Beside the account, so that keys can be rotated with an overlap.
CREATE TABLE service_keys (
    id uuid PRIMARY KEY,
    service_account_id uuid NOT NULL REFERENCES service_accounts (id) ON DELETE CASCADE,
    -- SHA-256 of the key: 256 random bits need no slow hash.
    key_hash bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);

CREATE UNIQUE INDEX service_keys_key_hash_key ON service_keys (key_hash);
CREATE INDEX service_keys_service_account_id_idx ON service_keys (service_account_id);
