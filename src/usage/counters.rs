use crate::{model::Count, store::UsageInsert};

/// What the ledger has done.
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
}

impl Counters {
    pub(super) fn count(&self, insert: UsageInsert) {
        match insert {
            UsageInsert::Recorded => self.recorded.add_one(),
            UsageInsert::Duplicate => self.duplicates.add_one(),
            UsageInsert::Conflict => self.conflicts.add_one(),
        }
    }
}
