-- What every batch of usage pays for each event. sum(bigint) goes through numeric, so that it cannot
-- overflow; ours stays with bigint, and an overflow is an error that the event is refused with.
CREATE AGGREGATE sum_bigint(bigint) (SFUNC = int8pl, STYPE = bigint, PARALLEL = SAFE);

-- A regular expression for each row that is written costs more than all other checks together. The
-- months come from usage_records, whose rows go to the partition of theirs.
ALTER TABLE monthly_usage
    DROP CONSTRAINT monthly_usage_month_check,
    ADD CONSTRAINT monthly_usage_month_check CHECK (length(month) = 7);
ALTER TABLE monthly_model_usage
    DROP CONSTRAINT monthly_model_usage_month_check,
    ADD CONSTRAINT monthly_model_usage_month_check CHECK (length(month) = 7);

-- The id leads the key: ids grow with time, so new keys meet at one end of the index however many
-- users there are, and not each in a page of its own.
ALTER TABLE usage_records
    DROP CONSTRAINT usage_records_pkey,
    ADD PRIMARY KEY (event_id, user_id, usage_month);
