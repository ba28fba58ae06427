ALTER VIEW monthly_usage RENAME TO monthly_usage_view;
CREATE TABLE monthly_usage (
    user_id uuid NOT NULL,
    month text COLLATE "C" NOT NULL CHECK (length(month) = 7),
    input_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    cached_input_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    request_count bigint NOT NULL,
    PRIMARY KEY (user_id, month)
) WITH (fillfactor = 70);
INSERT INTO monthly_usage SELECT * FROM monthly_usage_view;
DROP VIEW monthly_usage_view;
