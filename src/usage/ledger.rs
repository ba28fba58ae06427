//! Booking and reading usage.

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    Usage,
    writer::{Booked, NotBooked, WhenFull},
};
use crate::{
    error::{Error, Result},
    model::{
        Booking, MonthlyUsage, Page, PageRequest, Period, UsageCursor, UsageEvent, UsageFilter,
        UsageRecord, UserId, Violation,
    },
    store::UsageInsert,
};

/// How old an event may be: late batches count, years-old ones are a mistake.
const MAX_AGE: TimeDelta = TimeDelta::days(35);

/// How far a client's clock may be ahead.
const MAX_AHEAD: TimeDelta = TimeDelta::minutes(5);

/// What became of an event that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Booked now.
    Now,
    /// Booked before; counted once.
    Before,
}

impl Usage {
    /// Books an event once, however often it is sent.
    ///
    /// The caller has checked the event's time and that its user exists. Durable when it returns; a
    /// dropped future leaves it behind to be booked.
    ///
    /// # Errors
    /// `EventConflict` · `TotalOutOfRange` · `Overloaded` · `Unavailable` · `Internal`
    pub async fn record(&self, event: UsageEvent) -> Result<Recorded> {
        let booked = self.record_all(vec![event], WhenFull::Refuse).await?.pop();
        booked.ok_or_else(left_out)?
    }

    /// Books the commit of a reservation, as [`Usage::record`] does.
    pub(super) async fn book(&self, booking: Booking, when_full: WhenFull) -> Result<Recorded> {
        let booked = self.writers.insert(vec![booking], when_full);
        let booked = booked.await?.pop();
        settled(booked.ok_or_else(left_out)?)?
    }

    /// Books events as [`Usage::record`] does, and says what became of each, in their order.
    ///
    /// # Errors
    /// `Overloaded`: nothing was done · `Unavailable`, `Internal`: some may be booked, repeat all.
    /// Those of an event are in its place: `EventConflict` · `TotalOutOfRange` · `Internal`: Postgres
    /// refused just this one
    pub async fn record_all(
        &self,
        events: Vec<UsageEvent>,
        when_full: WhenFull,
    ) -> Result<Vec<Result<Recorded>>> {
        if events.is_empty() {
            return Ok(Vec::new());
        }
        let charges = self.keeper.charges_of(&events);
        let bookings = events.into_iter().map(Booking::from).collect();
        let booked = self.writers.insert(bookings, when_full).await?;
        let recorded: Vec<Result<Recorded>> =
            booked.into_iter().map(settled).collect::<Result<_>>()?;
        let new = charges.iter().zip(&recorded);
        for (charge, _) in new.filter(|(_, recorded)| matches!(recorded, Ok(Recorded::Now))) {
            self.keeper.charge(charge);
        }
        Ok(recorded)
    }

    /// A user's month; zeroes when nothing was used.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn month(&self, user_id: UserId, period: Period) -> Result<MonthlyUsage> {
        self.store.usage_month(user_id, period).await
    }

    /// Whether anything was ever booked for this id, whether or not its user is still there.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn has_sums(&self, user_id: UserId) -> Result<bool> {
        self.store.usage_any_month(user_id).await
    }

    /// A user's events that `filter` leaves, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn records(
        &self,
        user_id: UserId,
        filter: &UsageFilter,
        page: &PageRequest<UsageCursor>,
    ) -> Result<Page<UsageRecord>> {
        self.store.usage_list(user_id, filter, page).await
    }
}

/// What an outcome means for the event and, outside, for those beside it.
pub(super) fn settled(booked: Booked) -> Result<Result<Recorded>> {
    match booked {
        Ok(UsageInsert::Recorded) => Ok(Ok(Recorded::Now)),
        Ok(UsageInsert::Duplicate) => Ok(Ok(Recorded::Before)),
        Ok(UsageInsert::Conflict) => Ok(Err(Error::EventConflict)),
        Err(NotBooked::Refused(error)) => Ok(Err(shared(error))),
        Err(NotBooked::Failed(error)) => Err(shared(error)),
    }
}

fn left_out() -> Error {
    Error::internal("an event was left out")
}

/// The error of a batch, for one of those that were in it.
fn shared(error: Arc<Error>) -> Error {
    match *error {
        Error::Unavailable(_) => Error::Unavailable(error.into()),
        Error::TotalOutOfRange => Error::TotalOutOfRange,
        _ => Error::Internal(error.into()),
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
