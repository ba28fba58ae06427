-- Catalogs only, and gives up rather than have others queue behind it.
SET LOCAL lock_timeout = '2s';

-- Sums are updated in place again and again, and Postgres tidies a page that is fuller than its fillfactor
-- each time that it is looked at: with 70 that was at every update, a tenth of what an event costs. So a
-- row comes with bytes that its first update takes away. A page then has room for as many versions as it
-- has rows, and is tidied once that is used up. Rows that are there, or that are
-- restored, stay as they are: theirs is the room of their month.
ALTER TABLE monthly_model_usage ADD COLUMN room bytea NOT NULL DEFAULT '';
ALTER TABLE monthly_model_usage
    ALTER COLUMN room SET DEFAULT decode(repeat('00', 120), 'hex'),
    SET (fillfactor = 90);
