use super::{Committed, Recorded, Reserved};
use crate::{
    error::{Error, Result},
    model::Count,
    store::UsageInsert,
};

/// What the ledger has done, and what became of those who asked to reserve.
#[derive(Debug, Default)]
pub struct Counters {
    /// Events booked.
    pub recorded: Count,
    /// Events that were booked before.
    pub duplicates: Count,
    /// Events whose id was booked before with another payload.
    pub conflicts: Count,
    /// Statements that wrote them.
    pub batches: Count,
    /// Reservations, those that were asked for again too, and looks that found enough.
    pub held: Count,
    /// The same, admitted by a tier's `open_tokens`.
    pub beyond_limit: Count,
    pub denied: Count,
    pub rate_limited: Count,
    /// Reservations that users, or this replica, may not have: too large, too many.
    pub oversized: Count,
    /// Commits taken while the database was away.
    pub accepted: Count,
    /// Commits that came after their reservation had expired.
    pub late: Count,
}

impl Counters {
    pub(super) fn count(&self, insert: UsageInsert) {
        match insert {
            UsageInsert::Recorded => self.recorded.add_one(),
            UsageInsert::Duplicate => self.duplicates.add_one(),
            UsageInsert::Conflict => self.conflicts.add_one(),
        }
    }
    pub(super) fn count_reserved(&self, reserved: &Result<Reserved>) {
        match reserved {
            Ok(reserved) if reserved.quota.is_none() => self.beyond_limit.add_one(),
            Ok(_) => self.held.add_one(),
            Err(Error::QuotaExceeded(_)) => self.denied.add_one(),
            Err(Error::RateLimited { .. }) => self.rate_limited.add_one(),
            Err(Error::RequestTooLarge { .. } | Error::TooManyReservations { .. }) => {
                self.oversized.add_one();
            }
            // Counted with the calls, by their codes.
            Err(_) => {}
        }
    }

    pub(super) fn count_committed(&self, committed: Committed, is_late: bool) {
        match committed {
            Committed::Booked(Recorded::Before) => return,
            Committed::Booked(Recorded::Now) => {}
            Committed::Accepted => self.accepted.add_one(),
        }
        if is_late {
            self.late.add_one();
        }
    }
}
