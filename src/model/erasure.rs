use std::str::FromStr;

use chrono::TimeDelta;

use super::Violation;

/// What is looked through for traces of a user who was deleted, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErasureStep {
    /// What happened to them.
    TrailAbout,
    /// What they did.
    TrailBy,
    /// What they used.
    Usage,
    /// The same, once nothing can come any more.
    UsageEnd,
}

impl ErasureStep {
    pub const FIRST: Self = Self::TrailAbout;

    pub fn as_str(self) -> &'static str {
        match self {
            Self::TrailAbout => "trail_about",
            Self::TrailBy => "trail_by",
            Self::Usage => "usage",
            Self::UsageEnd => "usage_end",
        }
    }

    /// What comes then; the last search has an end of its own.
    pub fn next(self, is_last: bool) -> Option<Self> {
        match self {
            Self::TrailAbout => Some(Self::TrailBy),
            Self::TrailBy => Some(Self::Usage),
            Self::Usage if is_last => Some(Self::UsageEnd),
            Self::Usage | Self::UsageEnd => None,
        }
    }

    /// In how long a user who was deleted so long ago is looked for again: most of what comes late
    /// comes soon.
    pub fn again_in(deleted_ago: TimeDelta) -> TimeDelta {
        deleted_ago.clamp(TimeDelta::hours(1), TimeDelta::days(1))
    }
}

impl FromStr for ErasureStep {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let all = [Self::TrailAbout, Self::TrailBy, Self::Usage, Self::UsageEnd];
        let known = all.into_iter().find(|step| step.as_str() == text);
        known.ok_or_else(|| "must be a step of an erasure".into())
    }
}
