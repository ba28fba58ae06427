SET LOCAL lock_timeout = '2s';
-- Nobody could deliver them any more, and a replica from before would count them as waiting.
DELETE FROM outbox WHERE kind = 'mail';
DROP INDEX outbox_mail_user_idx;
DROP TABLE one_time_tokens;
