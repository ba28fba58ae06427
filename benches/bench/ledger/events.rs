//! Usage as a client tells of it: new ids, the present time, of many users or of one.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use chrono::{DateTime, Utc};
use prost::Message as _;
use tollkeeper::proto::tollkeeper::usage::v1::{RecordUsageRequest, TokenCounts, UsageEvent};
use uuid::{Builder, Uuid};

use crate::load::{Calls, scattered};

pub(crate) const RECORD_USAGE: &str = "/tollkeeper.usage.v1.UsageService/RecordUsage";

/// What every user uses.
pub(crate) const MODELS: [&str; 3] = ["large-2026-05", "medium-2026-05", "small-2026-05"];
pub(crate) const LABEL: (&str, &str) = ("feature", "chat");

/// Whose usage it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Users {
    /// Each equally often, without pattern
    Uniform,
    /// One after the other
    InTurn,
    /// Always the same one
    Hot,
}

/// A source of events that never repeats itself. Clones draw from the same.
#[derive(Clone)]
pub(crate) struct Events {
    people: Arc<[Uuid]>,
    users: Users,
    next: Arc<AtomicUsize>,
    /// Others of the same time have other ids.
    source: [u8; 4],
}

/// One event.
pub(crate) struct Event {
    pub(crate) id: Uuid,
    pub(crate) occurred_at: DateTime<Utc>,
    pub(crate) user: Uuid,
    pub(crate) model: &'static str,
    pub(crate) input: i64,
    pub(crate) output: i64,
    pub(crate) cached_input: i64,
    pub(crate) request_id: String,
}

impl Events {
    pub(crate) fn of(people: &Arc<[Uuid]>, users: Users) -> Self {
        Self {
            people: people.clone(),
            users,
            next: Arc::default(),
            source: (RandomState::new().hash_one(()) as u32).to_be_bytes(),
        }
    }

    pub(crate) fn next(&self) -> Event {
        self.event(self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn event(&self, number: usize) -> Event {
        let scattered = scattered(number);
        let user = match self.users {
            Users::Uniform => scattered % self.people.len(),
            Users::InTurn => number % self.people.len(),
            Users::Hot => 0,
        };
        let occurred_at = Utc::now();
        // Time-ordered, as our documents recommend: the index grows at one end. Without a system call for
        // each: the load shares the cores with what is measured.
        let id = self.id(occurred_at, number);
        let digits = &mut Uuid::encode_buffer();
        let digits = &*id.simple().encode_lower(digits);
        Event {
            id,
            occurred_at,
            user: self.people[user],
            // Bits that the choice of the user does not use.
            model: MODELS[(scattered >> 40) % MODELS.len()],
            input: 400 + (scattered >> 20 & 0xff) as i64,
            output: 120 + (scattered >> 28 & 0x3f) as i64,
            cached_input: 1024,
            request_id: ["req-", &digits[16..]].concat(),
        }
    }

    fn id(&self, time: DateTime<Utc>, number: usize) -> Uuid {
        let millis = time.timestamp_millis().unsigned_abs();
        let mut bytes = [0; 10];
        bytes[..4].copy_from_slice(&self.source);
        bytes[4..].copy_from_slice(&(number as u64).to_be_bytes()[2..]);
        Builder::from_unix_timestamp_millis(millis, &bytes).into_uuid()
    }

    /// `RecordUsage` for each of them in turn, without end.
    pub(crate) fn calls(&self, caller: &str) -> Calls {
        let events = self.clone();
        let message = move |_| {
            let event = Some(events.next().into_message());
            RecordUsageRequest { event }.encode_to_vec()
        };
        Calls::fresh(RECORD_USAGE, Some(caller), message, tonic::Code::Ok)
    }
}

impl Event {
    pub(crate) fn into_message(self) -> UsageEvent {
        let nanos = self.occurred_at.timestamp_subsec_nanos();
        UsageEvent {
            event_id: self.id.to_string(),
            occurred_at: Some(prost_types::Timestamp {
                seconds: self.occurred_at.timestamp(),
                nanos: i32::try_from(nanos).unwrap_or_default(),
            }),
            user_id: self.user.to_string(),
            model: self.model.to_owned(),
            tokens: Some(TokenCounts {
                input: self.input,
                output: self.output,
                cached_input: self.cached_input,
                ..TokenCounts::default()
            }),
            request_id: self.request_id,
            labels: [(LABEL.0.to_owned(), LABEL.1.to_owned())].into(),
        }
    }
}
