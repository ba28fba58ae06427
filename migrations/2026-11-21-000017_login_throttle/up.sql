-- Failed attempts, by what they count against; src/auth/throttle.rs says how that is named. No e-mail
-- address or username of anybody is in it. Without a foreign key: names that nobody has count as well.
CREATE TABLE login_throttle (
    subject text COLLATE "C" PRIMARY KEY,
    -- As of last_failed_at: they are forgiven one by one.
    failures integer NOT NULL CHECK (failures >= 0),
    last_failed_at timestamptz NOT NULL,
    blocked_until timestamptz NOT NULL
-- Written by every failure: room is left in each page.
) WITH (fillfactor = 70);

-- For the sweep.
CREATE INDEX login_throttle_blocked_until_idx ON login_throttle (blocked_until);
