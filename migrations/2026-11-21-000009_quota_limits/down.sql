DROP TABLE credit_grants;
DROP TABLE quota_overrides;
DROP TABLE quota_balances;
DROP FUNCTION tell_quota_change;
