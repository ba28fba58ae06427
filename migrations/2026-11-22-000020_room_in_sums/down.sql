SET LOCAL lock_timeout = '2s';
ALTER TABLE monthly_model_usage DROP COLUMN room, SET (fillfactor = 70);
