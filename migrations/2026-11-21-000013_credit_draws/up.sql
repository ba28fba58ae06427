-- What a month drew from a credit, written when the credit is closed: from then on it is neither more nor
-- less, whatever is booked for that month afterwards. Read with the months of its user, and kept without
-- a foreign key to the grant, which nothing deletes but its user's end.
CREATE TABLE credit_draws (
    user_id uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    month text COLLATE "C" NOT NULL CHECK (length(month) = 7),
    credit_id uuid NOT NULL,
    tokens bigint NOT NULL CHECK (tokens > 0),
    PRIMARY KEY (user_id, month, credit_id)
);

-- Which month drew it was not kept.
INSERT INTO credit_draws (user_id, month, credit_id, tokens)
SELECT user_id, to_char(closed_at AT TIME ZONE 'UTC', 'YYYY-MM'), id, drawn_tokens
FROM credit_grants
WHERE drawn_tokens > 0;

-- What the months before `settled_before` drew: they take no late use any more, and are not read again.
-- Once it is closed, what all months drew.
ALTER TABLE credit_grants DROP CONSTRAINT credit_grants_check1;
UPDATE credit_grants SET drawn_tokens = 0 WHERE drawn_tokens IS NULL;
ALTER TABLE credit_grants
    ALTER COLUMN drawn_tokens SET DEFAULT 0,
    ALTER COLUMN drawn_tokens SET NOT NULL,
    ADD COLUMN settled_before text COLLATE "C" CHECK (length(settled_before) = 7);

-- Every decision reads those that are open; those that have expired are found among them.
CREATE INDEX credit_grants_open_idx ON credit_grants (user_id) WHERE closed_at IS NULL;
DROP INDEX credit_grants_expires_at_idx;
