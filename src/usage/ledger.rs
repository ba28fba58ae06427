//! Booking and reading usage.

use chrono::{DateTime, TimeDelta, Utc};

use super::Usage;
use crate::{
    error::{Error, Result},
    model::{
        MonthlyUsage, Page, PageRequest, Period, UsageCursor, UsageEvent, UsageRecord, UserId,
        Violation,
    },
    store::UsageInsert,
};

/// How old an event may be: late batches count, years-old ones are a mistake.
const MAX_AGE: TimeDelta = TimeDelta::days(35);

/// How far a client's clock may be ahead.
const MAX_AHEAD: TimeDelta = TimeDelta::minutes(5);

impl Usage {
    /// Books an event once, however often it is sent. Returns whether it was booked now.
    ///
    /// The caller has checked that the user exists. Durable when it returns; a dropped future leaves it
    /// booked as a whole or not at all.
    ///
    /// # Errors
    /// `Invalid` (outside the window) · `EventConflict` · `Unavailable`
    pub async fn record(&self, event: &UsageEvent, now: DateTime<Utc>) -> Result<bool> {
        check_occurred_at(event.occurred_at, now)
            .map_err(|violation| Error::invalid("event.occurred_at", violation))?;
        match self.store.usage_insert(event).await? {
            UsageInsert::Recorded => Ok(true),
            UsageInsert::Duplicate => Ok(false),
            UsageInsert::Conflict => Err(Error::EventConflict),
        }
    }

    /// A user's month; zeroes when nothing was used.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn month(&self, user_id: UserId, period: Period) -> Result<MonthlyUsage> {
        self.store.usage_month(user_id, period).await
    }

    /// A user's events, newest first; of one month or of all.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn records(
        &self,
        user_id: UserId,
        period: Option<Period>,
        page: &PageRequest<UsageCursor>,
    ) -> Result<Page<UsageRecord>> {
        self.store.usage_list(user_id, period, page).await
    }
}

/// Whether an event of this time is booked; asked ahead to name it beside the other wrong fields.
///
/// # Errors
/// What is wrong with it.
pub fn check_occurred_at(occurred_at: DateTime<Utc>, now: DateTime<Utc>) -> Result<(), Violation> {
    if in_window(occurred_at, now) {
        Ok(())
    } else {
        Err("must be at most 35 days old and at most 5 minutes ahead".into())
    }
}

fn in_window(occurred_at: DateTime<Utc>, now: DateTime<Utc>) -> bool {
    now - MAX_AGE <= occurred_at && occurred_at <= now + MAX_AHEAD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_includes_its_ends() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("valid");
        let tick = TimeDelta::microseconds(1);
        assert!(in_window(now - MAX_AGE, now) && in_window(now + MAX_AHEAD, now));
        assert!(!in_window(now - MAX_AGE - tick, now) && !in_window(now + MAX_AHEAD + tick, now));
    }
}
