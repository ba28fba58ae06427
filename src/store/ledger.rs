//! Booking events, one or many at once: each once, and with the sums.

mod new_events;
mod statements;

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    result::{DatabaseErrorKind, Error as DieselError},
    sql_types::{Array, BigInt, Jsonb, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use tokio::time::{error::Elapsed, timeout};
use uuid::Uuid;

use super::{Store, prepared::prepared, schema::user_erasures, usage::UsageRow};
use crate::{
    error::{Error, Result},
    model::{Booking, Period, UsageEvent, UsageRecord},
};
use new_events::InsertNew;
use statements::{InsertAndSettle, InsertEvent, InsertEvents, Month, Settlements};

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageInsert {
    /// Booked, and added to the sums.
    Recorded,
    /// Booked before with the same payload; counted once.
    Duplicate,
    /// Booked before with another payload; nothing was done.
    Conflict,
}

/// What makes an event the same event.
type Key = (Period, Uuid, Uuid);

impl Store {
    /// Books events, each with the sums of its month, and says what became of each, in their order.
    ///
    /// All that are recorded are durable when it returns, in one transaction. Any number of calls
    /// with one event count once; events that are in `bookings` twice as well. The owners of holds
    /// that are settled are told in the same transaction.
    ///
    /// # Errors
    /// `Unavailable`: perhaps all are booked, perhaps none; it is safe to repeat · `TotalOutOfRange`,
    /// `Internal`: none is
    pub async fn usage_insert(&self, bookings: &[&Booking]) -> Result<Vec<UsageInsert>> {
        let batch = Batch::of(bookings);
        let mut conn = self.conn().await?;
        let inserted = self.insert(&batch, &mut conn).await;
        let inserted = self.answered(conn, inserted);
        if matches!(inserted, Err(Error::Unavailable(_))) {
            // It may be booked, and whoever sent it sends it again.
            self.replays.expect(Instant::now());
        }
        inserted.map_err(|error| match error {
            Error::Internal(cause) if is_overflow(&*cause) => Error::TotalOutOfRange,
            error => error,
        })
    }

    /// Takes the events of a batch for new ones, and if that was wrong, of which nothing is left, looks
    /// each of them up. Either statement is waited for by itself.
    async fn insert(
        &self,
        batch: &Batch<'_>,
        conn: &mut AsyncPgConnection,
    ) -> Result<Result<Vec<UsageInsert>>, Elapsed> {
        let patience = self.patience();
        if !self.replays.are_expected(Instant::now())
            && let Some(insert) = batch.as_new()
        {
            match timeout(patience, insert.run(conn)).await? {
                Ok(_) => return Ok(Ok(batch.all_recorded())),
                Err(DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _)) => {
                    self.replays.expect(Instant::now());
                }
                Err(error) => return Ok(Err(error.into())),
            }
        }
        timeout(patience, batch.insert(conn)).await
    }
}

/// Whether a sum grew beyond its column. The driver does not hand the SQLSTATE on.
fn is_overflow(cause: &(dyn std::error::Error + 'static)) -> bool {
    matches!(
        cause.downcast_ref(),
        Some(DieselError::DatabaseError(_, info)) if info.message() == "bigint out of range"
    )
}

/// Events to book.
struct Batch<'a> {
    bookings: &'a [&'a Booking],
    keys: Vec<Key>,
    /// The first of each key, in the order of the keys.
    order: Vec<usize>,
}

impl<'a> Batch<'a> {
    fn of(bookings: &'a [&'a Booking]) -> Self {
        let keys: Vec<Key> = bookings.iter().map(|one| key_of(&one.event)).collect();
        let mut order: Vec<usize> = (0..bookings.len()).collect();
        // Stable: of events with one key the first one counts.
        order.sort_by(|&a, &b| keys[a].cmp(&keys[b]));
        order.dedup_by(|&mut later, &mut first| keys[later] == keys[first]);
        Self {
            bookings,
            keys,
            order,
        }
    }

    fn firsts(&self) -> Vec<&'a UsageEvent> {
        let event = |&index: &usize| &self.bookings[index].event;
        self.order.iter().map(event).collect()
    }

    fn all_recorded(&self) -> Vec<UsageInsert> {
        vec![UsageInsert::Recorded; self.bookings.len()]
    }

    /// As many events none of which was there. `None`: that is more than is known of them, or no cheaper.
    fn as_new(&self) -> Option<InsertNew<'a>> {
        let are_many = self.order.len() > 1 && self.order.len() == self.bookings.len();
        let settle = || self.bookings.iter().any(|one| one.settles().is_some());
        (are_many && !settle()).then(|| InsertNew::of(&self.firsts()))?
    }

    /// Books those that are not there yet, and compares the others with what is.
    async fn insert(&self, conn: &mut AsyncPgConnection) -> Result<Vec<UsageInsert>> {
        let Self {
            bookings,
            keys,
            order,
        } = self;
        let firsts = self.firsts();
        let settlements = Settlements::of(bookings);
        let known: Vec<i64> = match firsts[..] {
            _ if !settlements.is_empty() => {
                let events = InsertEvents::new(&firsts);
                let insert = InsertAndSettle {
                    events,
                    settlements,
                };
                insert.load(conn).await?
            }
            // It adds to one sum, unless the event was there.
            [event] => match InsertEvent::new(event).execute(conn).await? {
                0 => vec![1],
                _ => Vec::new(),
            },
            _ => InsertEvents::new(&firsts).load(conn).await?,
        };
        if known.is_empty() && firsts.len() == bookings.len() {
            return Ok(self.all_recorded());
        }
        let known: Vec<&UsageEvent> = known
            .into_iter()
            .map(|place| {
                let place = usize::try_from(place - 1).ok();
                let event = place.and_then(|place| firsts.get(place)).copied();
                event.ok_or_else(|| Error::internal("an event that was not sent is known"))
            })
            .collect::<Result<_>>()?;
        // A statement of its own: its snapshot sees what the insert stumbled over.
        let booked = match known.is_empty() {
            true => HashMap::new(),
            false => booked(&known, conn).await?,
        };
        let known_keys: HashSet<Key> = known.iter().map(|event| key_of(event)).collect();
        let firsts: HashMap<&Key, usize> =
            order.iter().map(|&index| (&keys[index], index)).collect();
        let outcome = |index: usize| {
            let (booking, key) = (bookings[index], &keys[index]);
            let first = firsts[key];
            let is_known = known_keys.contains(key);
            if !is_known && first == index {
                return UsageInsert::Recorded;
            }
            let before = match is_known {
                true => booked.get(key),
                false => Some(&bookings[first].event),
            };
            if before.is_some_and(|before| booking.is_booked_as(before)) {
                UsageInsert::Duplicate
            } else {
                UsageInsert::Conflict
            }
        };
        let mut outcomes: Vec<UsageInsert> = (0..bookings.len()).map(outcome).collect();
        let differ = |(index, outcome): (usize, &UsageInsert)| {
            let is_known = *outcome == UsageInsert::Conflict && known_keys.contains(&keys[index]);
            is_known.then_some(index)
        };
        let conflicts: Vec<usize> = outcomes.iter().enumerate().filter_map(differ).collect();
        if !conflicts.is_empty() {
            let users: Vec<Uuid> = conflicts.iter().map(|&index| keys[index].1).collect();
            let erased = erased_among(&users, conn).await?;
            for index in conflicts {
                let before = booked.get(&keys[index]);
                if erased.contains(&keys[index].1)
                    && before.is_some_and(|before| bookings[index].is_booked_as_blanked(before))
                {
                    outcomes[index] = UsageInsert::Duplicate;
                }
            }
        }
        Ok(outcomes)
    }
}

/// Whether events are likely to be there already. Replays come in bursts, and each that was not expected
/// costs a statement, and some lines in the log of Postgres.
///
/// Those that are found while they are expected do not prolong it: a client that always sends some events
/// twice would have all events looked up for ever.
#[derive(Debug, Default)]
pub(super) struct Replays(Mutex<Option<Instant>>);

/// So long after one others are expected.
const REPLAYS_LAST: Duration = Duration::from_secs(10);

impl Replays {
    fn expect(&self, now: Instant) {
        *self.last() = Some(now);
    }

    fn are_expected(&self, now: Instant) -> bool {
        self.last()
            .is_some_and(|last| now.saturating_duration_since(last) < REPLAYS_LAST)
    }

    fn last(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which of these users were deleted: of their events not all is kept that would tell two apart.
async fn erased_among(users: &[Uuid], conn: &mut AsyncPgConnection) -> Result<HashSet<Uuid>> {
    let erased: Vec<Uuid> = user_erasures::table
        .filter(user_erasures::user_id.eq_any(users))
        .select(user_erasures::user_id)
        .load(conn)
        .await?;
    Ok(erased.into_iter().collect())
}

/// The events that are booked under the keys of `events`.
async fn booked(
    events: &[&UsageEvent],
    conn: &mut AsyncPgConnection,
) -> Result<HashMap<Key, UsageEvent>> {
    let rows: Vec<UsageRow> = BookedEvents::under(events).load(conn).await?;
    rows.into_iter()
        .map(|row| {
            let event = UsageRecord::try_from(row)?.event;
            Ok((key_of(&event), event))
        })
        .collect()
}

fn key_of(event: &UsageEvent) -> Key {
    (event.period(), event.user_id.0, event.event_id.0)
}

/// Looks events up by their keys, row by row: as lists of months, users and ids, Postgres would look
/// for every combination of them.
struct BookedEvents {
    months: Vec<Month>,
    user_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
}

impl BookedEvents {
    fn under(events: &[&UsageEvent]) -> Self {
        Self {
            months: events.iter().map(|event| Month(event.period())).collect(),
            user_ids: events.iter().map(|event| event.user_id.0).collect(),
            event_ids: events.iter().map(|event| event.event_id.0).collect(),
        }
    }
}

impl QueryFragment<Pg> for BookedEvents {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT r.user_id, r.event_id, r.occurred_at, r.model, r.input_tokens, r.output_tokens,
                 r.cached_input_tokens, r.cache_write_tokens, r.reasoning_tokens, r.request_id,
                 r.labels, r.recorded_at
             FROM unnest(",
        );
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        for ids in [&self.user_ids, &self.event_ids] {
            out.push_sql(", ");
            out.push_bind_param::<Array<SqlUuid>, _>(ids)?;
        }
        out.push_sql(
            ") AS k (usage_month, user_id, event_id)
             JOIN usage_records AS r USING (usage_month, user_id, event_id)",
        );
        Ok(())
    }
}

prepared! {
    BookedEvents => UsageRowTypes = Self;
}

/// The types of the columns of [`UsageRow`].
pub(super) type UsageRowTypes = (
    SqlUuid,
    SqlUuid,
    Timestamptz,
    Text,
    BigInt,
    BigInt,
    BigInt,
    BigInt,
    BigInt,
    Text,
    Jsonb,
    Timestamptz,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replays_are_expected_for_a_while_after_one() {
        let (replays, begun) = (Replays::default(), Instant::now());
        let is_expected_after = |seconds| {
            let now = begun + Duration::from_secs_f64(seconds);
            replays.are_expected(now)
        };
        assert!(!is_expected_after(0.0));
        replays.expect(begun);
        assert!(is_expected_after(0.0) && is_expected_after(9.9));
        assert!(!is_expected_after(10.0));
        // Of a thread that looked at the clock before.
        replays.expect(begun + Duration::from_secs(5));
        assert!(is_expected_after(4.0) && is_expected_after(14.9));
    }
}
