DROP TABLE quota_notices;
DROP TABLE outbox;
