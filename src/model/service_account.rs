use std::time::Duration;

use chrono::{DateTime, Utc};

use super::{ScopeSet, ServiceAccountId, ServiceName, Violation};

/// A program that calls this service.
#[derive(Clone, Debug)]
pub struct ServiceAccount {
    pub id: ServiceAccountId,
    pub name: ServiceName,
    pub scopes: ScopeSet,
    pub is_active: bool,
    pub created_at: DateTime<Utc>,
}

/// How long old keys of a service account go on working once there is a new one: at most 30 days.
/// Zero: not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyOverlap(Duration);

impl KeyOverlap {
    /// Enough to bring the new key out everywhere within a working day.
    pub const DEFAULT: Self = Self(Duration::from_hours(24));
    pub const MAX: Self = Self(Duration::from_hours(30 * 24));

    pub fn get(self) -> Duration {
        self.0
    }

    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

impl TryFrom<Duration> for KeyOverlap {
    type Error = Violation;

    fn try_from(overlap: Duration) -> Result<Self, Violation> {
        if overlap <= Self::MAX.0 {
            Ok(Self(overlap))
        } else {
            Err("must be 0 to 30 days".into())
        }
    }
}
