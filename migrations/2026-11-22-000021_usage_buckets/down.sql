SET LOCAL lock_timeout = '2s';
-- Before the other goes: meanwhile events are read, and not booked.
CREATE INDEX IF NOT EXISTS usage_records_user_id_idx
    ON usage_records (user_id, occurred_at DESC, event_id DESC);
DROP INDEX usage_records_bucket_idx;
-- And with it the statistics, and what was left of indexes half built, which the function is in.
DROP FUNCTION usage_bucket CASCADE;
