//! What this room has done, for whoever watches.

use crate::model::Count;

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
