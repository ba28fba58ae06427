DROP TABLE api_keys;
DROP FUNCTION tell_api_key_change;
