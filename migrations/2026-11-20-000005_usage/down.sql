DROP TABLE monthly_model_usage;
DROP TABLE monthly_usage;
DROP TABLE usage_records;
