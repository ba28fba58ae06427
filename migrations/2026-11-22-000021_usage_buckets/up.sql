-- Catalogs only, and gives up rather than have others queue behind it. The index is built and put in the
-- place of usage_records_user_id_idx afterwards, partition by partition, beside those who write.
SET LOCAL lock_timeout = '2s';

-- Users in 1,024 buckets. With a place in the index for each user, every event of a batch meets a page of
-- its own, and the more events there are, the fewer of these pages are at hand. Events of a bucket meet
-- where its latest are, however many came before. Whoever reads a user's passes over what others of the
-- bucket have: a thousandth of all, in the index alone. No two entries are the same, so a full page is not
-- searched for such. The hash is the one of hash indexes, which stay as they are from one Postgres to the next.
CREATE FUNCTION usage_bucket(user_id uuid) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN uuid_hash(user_id) & 1023;

CREATE INDEX usage_records_bucket_idx ON ONLY usage_records
    (usage_bucket(user_id), occurred_at DESC, event_id DESC, user_id DESC)
    WITH (deduplicate_items = off);

-- Who is known is in a known bucket: without this Postgres would expect a thousandth of the rows that a
-- user has, and read and sort all of them for a page. Each partition has its own.
CREATE STATISTICS usage_records_bucket_stats (dependencies)
    ON usage_bucket(user_id), user_id FROM usage_records;
