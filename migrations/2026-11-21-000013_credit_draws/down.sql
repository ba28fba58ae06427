CREATE INDEX credit_grants_expires_at_idx ON credit_grants (expires_at)
    WHERE closed_at IS NULL AND expires_at IS NOT NULL;
DROP INDEX credit_grants_open_idx;
ALTER TABLE credit_grants
    DROP COLUMN settled_before,
    ALTER COLUMN drawn_tokens DROP NOT NULL,
    ALTER COLUMN drawn_tokens DROP DEFAULT;
UPDATE credit_grants SET drawn_tokens = NULL WHERE closed_at IS NULL;
ALTER TABLE credit_grants
    ADD CONSTRAINT credit_grants_check1 CHECK ((closed_at IS NULL) = (drawn_tokens IS NULL));
DROP TABLE credit_draws;
