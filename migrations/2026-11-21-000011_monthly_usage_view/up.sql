-- A month is the sum of its models: to keep it as well would cost every event a third of what
-- Postgres does for it, and could differ. What no bigint can hold is shown as the largest.
DROP TABLE monthly_usage;
CREATE VIEW monthly_usage AS
SELECT
    user_id,
    month,
    least(sum(input_tokens), 9223372036854775807)::bigint AS input_tokens,
    least(sum(output_tokens), 9223372036854775807)::bigint AS output_tokens,
    least(sum(cached_input_tokens), 9223372036854775807)::bigint AS cached_input_tokens,
    least(sum(cache_write_tokens), 9223372036854775807)::bigint AS cache_write_tokens,
    least(sum(reasoning_tokens), 9223372036854775807)::bigint AS reasoning_tokens,
    least(sum(request_count), 9223372036854775807)::bigint AS request_count
FROM monthly_model_usage
GROUP BY user_id, month;
