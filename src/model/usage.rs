use std::{collections::BTreeMap, iter::Sum, ops::AddAssign};

use chrono::{DateTime, Utc};

use super::{Cursor, EventId, HoldName, ModelName, Period, UserId};

/// One use of a model, as the client reports it. Immutable once recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct UsageEvent {
    pub event_id: EventId,
    /// To the microsecond, as the database keeps it: a replay must compare equal.
    pub occurred_at: DateTime<Utc>,
    pub user_id: UserId,
    pub model: ModelName,
    pub tokens: TokenCounts,
    /// The client's own id of the request; empty when it has none.
    pub request_id: String,
    pub labels: Labels,
}

impl UsageEvent {
    /// The month it is charged to.
    pub fn period(&self) -> Period {
        Period::containing(self.occurred_at)
    }

    /// About how many bytes it takes in a message, rather more than fewer.
    pub fn bytes(&self) -> usize {
        let labels = self.labels.iter();
        let labels = labels.map(|(key, value)| 16 + key.len() + value.len());
        256 + self.model.as_str().len() + self.request_id.len() + labels.sum::<usize>()
    }

    /// What is kept of it once its user is deleted.
    fn blanked(&self) -> Self {
        Self {
            request_id: String::new(),
            labels: Labels::new(),
            ..self.clone()
        }
    }
}

/// An event to book.
#[derive(Clone, Debug, PartialEq)]
pub struct Booking {
    pub event: UsageEvent,
    pub origin: BookingOrigin,
}

/// Where an event to book comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BookingOrigin {
    Client,
    /// The commit of a reservation. A request that reserved twice has two times of reservation, and is
    /// booked once, whichever is committed. `settles` is the hold, unless it is this replica's own:
    /// its owner is told, in the same statement.
    Commit {
        settles: Option<HoldName>,
    },
}

impl Booking {
    /// Whether what is booked under the same key is this: a replay, then, and no conflict.
    pub fn is_booked_as(&self, booked: &UsageEvent) -> bool {
        match self.origin {
            BookingOrigin::Client => self.event == *booked,
            BookingOrigin::Commit { .. } => {
                let occurred_at = self.event.occurred_at;
                let booked = booked.clone();
                self.event
                    == UsageEvent {
                        occurred_at,
                        ..booked
                    }
            }
        }
    }

    /// As [`Booking::is_booked_as`], for a user who was deleted: request ids and labels are blanked.
    pub fn is_booked_as_blanked(&self, booked: &UsageEvent) -> bool {
        let blanked = Self {
            event: self.event.blanked(),
            ..*self
        };
        blanked.is_booked_as(&booked.blanked())
    }

    /// The hold of another replica that it settles.
    pub fn settles(&self) -> Option<HoldName> {
        match self.origin {
            BookingOrigin::Client => None,
            BookingOrigin::Commit { settles } => settles,
        }
    }
}

impl From<UsageEvent> for Booking {
    fn from(event: UsageEvent) -> Self {
        Self {
            event,
            origin: BookingOrigin::Client,
        }
    }
}

/// Free labels of an event.
pub type Labels = BTreeMap<String, String>;

/// Tokens by dimension; the dimensions are disjoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenCounts {
    pub input: i64,
    pub output: i64,
    pub cached_input: i64,
    pub cache_write: i64,
    pub reasoning: i64,
}

impl TokenCounts {
    /// The most tokens one dimension of one event may hold. A sum of nine million such events still
    /// fits the aggregates.
    pub const MAX: i64 = 1_000_000_000_000;

    /// All dimensions together; saturates.
    pub fn total(self) -> i64 {
        let dimensions = self.dimensions().into_iter();
        dimensions.fold(0, i64::saturating_add)
    }

    /// In the order of their columns.
    pub fn dimensions(self) -> [i64; 5] {
        [
            self.input,
            self.output,
            self.cached_input,
            self.cache_write,
            self.reasoning,
        ]
    }
}

impl AddAssign for TokenCounts {
    fn add_assign(&mut self, other: Self) {
        self.input = self.input.saturating_add(other.input);
        self.output = self.output.saturating_add(other.output);
        self.cached_input = self.cached_input.saturating_add(other.cached_input);
        self.cache_write = self.cache_write.saturating_add(other.cache_write);
        self.reasoning = self.reasoning.saturating_add(other.reasoning);
    }
}

/// An event as booked.
#[derive(Clone, Debug)]
pub struct UsageRecord {
    pub event: UsageEvent,
    pub recorded_at: DateTime<Utc>,
}

/// The place of a record in a user's list, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageCursor {
    pub occurred_at: DateTime<Utc>,
    pub event_id: EventId,
}

impl Cursor for UsageCursor {
    fn to_bytes(&self) -> Vec<u8> {
        (self.occurred_at, self.event_id.0).to_bytes()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (occurred_at, event_id) = Cursor::from_bytes(bytes)?;
        Some(Self {
            occurred_at,
            event_id: EventId(event_id),
        })
    }
}

/// Sums over events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageTotals {
    pub tokens: TokenCounts,
    pub request_count: i64,
}

impl Sum for UsageTotals {
    fn sum<I: Iterator<Item = Self>>(totals: I) -> Self {
        totals.fold(Self::default(), |mut sum, totals| {
            sum.tokens += totals.tokens;
            sum.request_count = sum.request_count.saturating_add(totals.request_count);
            sum
        })
    }
}

/// A user's month.
#[derive(Clone, Debug)]
pub struct MonthlyUsage {
    pub user_id: UserId,
    pub period: Period,
    pub totals: UsageTotals,
    /// By name of the model.
    pub models: Vec<ModelUsage>,
}

#[derive(Clone, Debug)]
pub struct ModelUsage {
    pub model: ModelName,
    pub totals: UsageTotals,
}
