SET LOCAL lock_timeout = '2s';
DROP TRIGGER sessions_mfa_required ON sessions;
DROP FUNCTION require_mfa;
DROP TABLE recovery_codes;
DROP TABLE totp_credentials;
ALTER TABLE sessions DROP COLUMN mfa;
ALTER TABLE users DROP COLUMN mfa_enabled;
