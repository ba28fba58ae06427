-- What others are to be told, written in the transaction that has it happen, delivered later. Whoever
-- delivers moves available_at ahead first: should it not come to an end, it is tried again then.
CREATE TABLE outbox (
    id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind <> ''),
    payload jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    last_error text,
    delivered_at timestamptz
);

CREATE INDEX outbox_due_idx ON outbox (kind, available_at) WHERE delivered_at IS NULL;
CREATE INDEX outbox_pending_idx ON outbox (created_at) WHERE delivered_at IS NULL;
CREATE INDEX outbox_delivered_idx ON outbox (delivered_at) WHERE delivered_at IS NOT NULL;

-- Thresholds that were noticed: each once for a user and a month. By the month first, since old months
-- are deleted together; without a foreign key, since nothing is left of them soon.
CREATE TABLE quota_notices (
    month text COLLATE "C" NOT NULL CHECK (length(month) = 7),
    user_id uuid NOT NULL,
    threshold integer NOT NULL CHECK (threshold BETWEEN 1 AND 100),
    PRIMARY KEY (month, user_id, threshold)
);
