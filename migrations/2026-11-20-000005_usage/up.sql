-- One row per event, partitioned by the UTC month of occurred_at; the service makes partitions
-- ahead. No foreign key to users: checking it would cost a third of the ingest rate, and sums
-- outlive the person. The client's immutable occurred_at gives the month, so a replay meets the
-- same key.
CREATE TABLE usage_records (
    usage_month text COLLATE "C" NOT NULL,
    user_id uuid NOT NULL,
    event_id uuid NOT NULL,
    occurred_at timestamptz NOT NULL,
    model text NOT NULL,
    input_tokens bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
    cached_input_tokens bigint NOT NULL CHECK (cached_input_tokens >= 0),
    cache_write_tokens bigint NOT NULL CHECK (cache_write_tokens >= 0),
    reasoning_tokens bigint NOT NULL CHECK (reasoning_tokens >= 0),
    request_id text NOT NULL DEFAULT '',
    labels jsonb NOT NULL DEFAULT '{}',
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (usage_month, user_id, event_id)
) PARTITION BY LIST (usage_month);

CREATE TABLE usage_records_default PARTITION OF usage_records DEFAULT;

CREATE INDEX usage_records_user_id_idx ON usage_records (user_id, occurred_at DESC, event_id DESC);

-- What enforcement reads. Updated in place by every batch: room is left in each page, and only
-- the key is indexed, so updates stay within their page.
CREATE TABLE monthly_usage (
    user_id uuid NOT NULL,
    month text COLLATE "C" NOT NULL CHECK (month ~ '^\d{4}-(0[1-9]|1[0-2])$'),
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    request_count bigint NOT NULL,
    PRIMARY KEY (user_id, month)
) WITH (fillfactor = 70);

CREATE TABLE monthly_model_usage (
    user_id uuid NOT NULL,
    month text COLLATE "C" NOT NULL CHECK (month ~ '^\d{4}-(0[1-9]|1[0-2])$'),
    model text COLLATE "C" NOT NULL,
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    request_count bigint NOT NULL,
    PRIMARY KEY (user_id, month, model)
) WITH (fillfactor = 70);
