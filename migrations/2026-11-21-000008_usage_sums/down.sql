ALTER TABLE usage_records
    DROP CONSTRAINT usage_records_pkey,
    ADD PRIMARY KEY (usage_month, user_id, event_id);
ALTER TABLE monthly_model_usage
    DROP CONSTRAINT monthly_model_usage_month_check,
    ADD CONSTRAINT monthly_model_usage_month_check CHECK (month ~ '^\d{4}-(0[1-9]|1[0-2])$');
ALTER TABLE monthly_usage
    DROP CONSTRAINT monthly_usage_month_check,
    ADD CONSTRAINT monthly_usage_month_check CHECK (month ~ '^\d{4}-(0[1-9]|1[0-2])$');
DROP AGGREGATE sum_bigint(bigint);
