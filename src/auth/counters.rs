//! What this room has done, for whoever watches.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts up from the start of the process.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub(super) fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What became of questions about credentials, and of changes heard of.
#[derive(Debug, Default)]
pub struct Counters {
    /// Access tokens and API keys that memory alone found good.
    pub hits: Count,
    /// Those that took more.
    pub misses: Count,
    /// Sessions, API keys and service keys read from the database.
    pub reads: Count,
    /// Answers from memory because the database was away.
    pub outage_answers: Count,
    /// Changes of users, sessions and API keys.
    pub user_changes: Count,
    /// Changes of service accounts and their keys.
    pub service_changes: Count,
    /// Times at which nothing known was believed any more: the change feed was made anew, or a table emptied.
    pub flushes: Count,
}
