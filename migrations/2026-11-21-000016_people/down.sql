SET LOCAL lock_timeout = '2s';
DROP TABLE user_erasures;
DROP INDEX service_accounts_name_key;
CREATE UNIQUE INDEX service_accounts_name_key ON service_accounts (lower(name));
-- Built by `src/store/indexes.rs`.
DROP INDEX IF EXISTS users_admin_idx;
DROP INDEX IF EXISTS users_disabled_idx;
DROP INDEX IF EXISTS users_username_lower_key;
DROP INDEX IF EXISTS users_email_lower_key;
DROP INDEX audit_events_unattributed_idx;
DROP INDEX audit_events_action_idx;
DROP INDEX audit_events_actor_id_idx;
DROP INDEX audit_events_user_id_idx;
-- And with it what was left of indexes half built, which the function is in.
ALTER TABLE audit_events DROP COLUMN user_id;
DROP FUNCTION audit_user;
