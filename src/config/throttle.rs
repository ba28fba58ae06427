use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::duration;

/// How guessing of passwords is slowed down.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleSettings {
    /// Wrong passwords for one account before each further one costs a wait; 0 turns it off. Codes of a
    /// second factor wait in any case, after five at the latest.
    pub account_failures: u32,
    /// Failed logins, and separately registrations, from one address before each further one costs a
    /// wait; ten a minute are forgiven. 0 turns it off: for where all calls come from one backend.
    pub address_failures: u32,
    /// Longest wait for an account. It begins with a second and doubles.
    #[serde(with = "duration")]
    pub max_delay: Duration,
}

impl Default for ThrottleSettings {
    fn default() -> Self {
        Self {
            account_failures: 5,
            address_failures: 100,
            max_delay: Duration::from_mins(15),
        }
    }
}
