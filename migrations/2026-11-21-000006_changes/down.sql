DROP TRIGGER service_keys_changed ON service_keys;
DROP TRIGGER service_accounts_changed ON service_accounts;
DROP TRIGGER sessions_deleted ON sessions;
DROP TRIGGER sessions_changed ON sessions;
DROP TRIGGER users_changed ON users;
DROP FUNCTION tell_change;
