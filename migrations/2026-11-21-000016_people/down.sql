DROP TABLE user_erasures;
DROP INDEX users_admin_idx;
DROP INDEX users_disabled_idx;
DROP INDEX users_username_prefix_idx;
DROP INDEX users_email_prefix_idx;
ALTER TABLE audit_events DROP COLUMN user_id;
DROP INDEX audit_events_actor_id_idx;
