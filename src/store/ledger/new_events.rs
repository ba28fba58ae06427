//! Booking events as if none of them had been booked before, which is nearly always so.
//!
//! Then Postgres need not look each of them up first, and nothing of it depends on what was there: the
//! sums are made here. One that was there fails the whole statement, and nothing was done.

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Integer, Jsonb, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::{
    super::prepared::prepared,
    statements::{ADDED, InsertEvents, LabelsJson, Month, NEW_RECORDS, NEXT_COLUMN, TO_SUMS},
};
use crate::model::{Period, UsageEvent};

/// Inserts events, and fails if one of them is there.
pub(super) struct InsertNew<'a> {
    events: InsertEvents<'a>,
    /// `None`: too many are different.
    labels: Option<LabelSets<'a>>,
    sums: Sums<'a>,
}

impl<'a> InsertNew<'a> {
    /// Of events in the order of their keys. `None`: what they add to a sum is more than it can hold.
    pub(super) fn of(events: &[&'a UsageEvent]) -> Option<Self> {
        Some(Self {
            sums: Sums::of(events)?,
            labels: LabelSets::of(events),
            events: InsertEvents::new(events),
        })
    }

    pub(super) async fn run(&self, conn: &mut AsyncPgConnection) -> QueryResult<usize> {
        match &self.labels {
            Some(labels) => WithLabelSets(self, labels).execute(conn).await,
            None => WithLabels(self).execute(conn).await,
        }
    }

    fn walk<'b>(
        &'b self,
        mut out: AstPass<'_, 'b, Pg>,
        events: impl FnOnce(&mut AstPass<'_, 'b, Pg>) -> QueryResult<()>,
    ) -> QueryResult<()> {
        let sums = &self.sums;
        out.push_sql(NEW_RECORDS);
        out.push_sql("SELECT unnest(");
        events(&mut out)?;
        out.push_sql(" RETURNING 1)");
        out.push_sql(TO_SUMS);
        out.push_sql("SELECT unnest(");
        out.push_bind_param::<Array<SqlUuid>, _>(&sums.user_ids)?;
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Text>, _>(&sums.months)?;
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Text>, _>(&sums.models)?;
        for column in sums.tokens.iter().chain([&sums.requests]) {
            out.push_sql(NEXT_COLUMN);
            out.push_bind_param::<Array<BigInt>, _>(column)?;
        }
        // Always true, and not to be known before the events are in: all lock those first. No trigger may
        // leave one out.
        out.push_sql(") WHERE (SELECT count(*) FROM new) >= 0");
        out.push_sql(ADDED);
        Ok(())
    }
}

/// Each event with its labels.
struct WithLabels<'a>(&'a InsertNew<'a>);

impl QueryFragment<Pg> for WithLabels<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let Self(insert) = self;
        insert.walk(out, |out| {
            insert.events.bind(out)?;
            out.push_sql(")");
            Ok(())
        })
    }
}

/// Each event with the place of its labels among those that there are.
struct WithLabelSets<'a>(&'a InsertNew<'a>, &'a LabelSets<'a>);

impl QueryFragment<Pg> for WithLabelSets<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let Self(insert, labels) = self;
        insert.walk(out, |out| {
            insert.events.bind_but_labels(out)?;
            out.push_sql("), ");
            out.push_bind_param::<Array<Jsonb>, _>(&labels.sets)?;
            out.push_sql("[unnest(");
            out.push_bind_param::<Array<Integer>, _>(&labels.places)?;
            out.push_sql(")]");
            Ok(())
        })
    }
}

prepared! {
    WithLabels<'a> => () = WithLabels<'static>;
    WithLabelSets<'a> => () = WithLabelSets<'static>;
}

/// The labels of events, most of which are those of others: Postgres parses each once.
#[derive(Debug)]
struct LabelSets<'a> {
    sets: Vec<LabelsJson<'a>>,
    /// Of each event, from 1 on.
    places: Vec<i32>,
}

impl<'a> LabelSets<'a> {
    /// Postgres goes through an array from its beginning to find a place in it.
    const MAX_SETS: usize = 16;

    fn of(events: &[&'a UsageEvent]) -> Option<Self> {
        let mut sets: Vec<LabelsJson<'a>> = Vec::new();
        let mut places = Vec::with_capacity(events.len());
        for event in events {
            let place = sets
                .iter()
                .position(|LabelsJson(set)| **set == event.labels);
            let place = match place {
                Some(place) => place,
                None if sets.len() == Self::MAX_SETS => return None,
                None => {
                    sets.push(LabelsJson(&event.labels));
                    sets.len() - 1
                }
            };
            places.push(i32::try_from(place + 1).ok()?);
        }
        Some(Self { sets, places })
    }
}

/// What events add to the months of the models of users, in the order of the sums' keys.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sums<'a> {
    user_ids: Vec<Uuid>,
    months: Vec<Month>,
    models: Vec<&'a str>,
    /// Of each dimension, and how many events.
    tokens: [Vec<i64>; 5],
    requests: Vec<i64>,
}

impl<'a> Sums<'a> {
    fn of(events: &[&'a UsageEvent]) -> Option<Self> {
        let mut by_sum: Vec<_> = events.iter().map(|event| (sum_of(event), event)).collect();
        by_sum.sort_unstable_by_key(|(sum, _)| *sum);
        let mut sums = Self::default();
        for group in by_sum.chunk_by(|(one, _), (other, _)| one == other) {
            let mut tokens = [0_i64; 5];
            for (_, event) in group {
                for (sum, more) in tokens.iter_mut().zip(event.tokens.dimensions()) {
                    *sum = sum.checked_add(more)?;
                }
            }
            let (user_id, period, model) = group.first()?.0;
            sums.user_ids.push(user_id);
            sums.months.push(Month(period));
            sums.models.push(model);
            for (column, sum) in sums.tokens.iter_mut().zip(tokens) {
                column.push(sum);
            }
            sums.requests.push(i64::try_from(group.len()).ok()?);
        }
        Some(sums)
    }
}

/// The key of the sum that an event is added to. As text, months have the order that they have as times.
fn sum_of(event: &UsageEvent) -> (Uuid, Period, &str) {
    (event.user_id.0, event.period(), event.model.as_str())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::model::{EventId, TokenCounts, UserId};

    fn event(user: u8, month: i64, model: &str, amount: i64) -> UsageEvent {
        UsageEvent {
            event_id: EventId::new(),
            occurred_at: DateTime::from_timestamp(1_800_000_000 + month * 31 * 86_400, 0)
                .expect("in range"),
            user_id: UserId(Uuid::from_bytes([user; 16])),
            model: model.parse().expect("valid"),
            tokens: TokenCounts {
                input: amount,
                reasoning: 1,
                ..TokenCounts::default()
            },
            request_id: String::new(),
            labels: BTreeMap::new(),
        }
    }

    proptest! {
        #[test]
        fn each_event_is_in_one_sum_and_the_sums_are_in_order(
            shapes in vec((0..3_u8, 0..2_i64, "[aAb]", 0..1000_i64), 0..50),
        ) {
            let events: Vec<UsageEvent> = shapes
                .iter()
                .map(|(user, month, model, amount)| event(*user, *month, model, *amount))
                .collect();
            let mut expected: BTreeMap<_, [i64; 2]> = BTreeMap::new();
            for event in &events {
                let [input, count] = expected.entry(sum_of(event)).or_default();
                (*input, *count) = (*input + event.tokens.input, *count + 1);
            }
            let sums = Sums::of(&events.iter().collect::<Vec<_>>()).expect("they fit");
            let rows = expected.into_iter().enumerate();
            for (at, ((user_id, period, model), [input, count])) in rows {
                prop_assert_eq!(sums.user_ids[at], user_id);
                prop_assert_eq!(sums.months[at], Month(period));
                prop_assert_eq!(sums.models[at], model);
                prop_assert_eq!(sums.tokens.each_ref().map(|column| column[at]), [input, 0, 0, 0, count]);
                prop_assert_eq!(sums.requests[at], count);
            }
            prop_assert_eq!(sums.requests.iter().sum::<i64>(), events.len() as i64);
        }
    }

    #[test]
    fn each_event_has_the_place_of_its_labels_unless_too_many_are_different() {
        let labelled = |feature: usize| {
            let mut event = event(0, 0, "m", 1);
            event.labels = [("feature".to_owned(), feature.to_string())].into();
            event
        };
        let max = LabelSets::MAX_SETS;
        let events: Vec<UsageEvent> = (0..100).map(|n| labelled(n % max)).collect();
        let events: Vec<_> = events.iter().collect();
        let labels = LabelSets::of(&events).expect("they are few");
        assert_eq!(labels.sets.len(), max);
        for (event, place) in events.iter().zip(&labels.places) {
            assert_eq!(labels.sets[*place as usize - 1].0, &event.labels);
        }
        let another = labelled(max);
        let events = [&events[..], &[&another]].concat();
        assert!(LabelSets::of(&events).is_none());
    }

    #[test]
    fn a_sum_that_no_column_holds_is_left_to_postgres() {
        let [one, other] = [event(0, 0, "m", i64::MAX), event(0, 0, "m", 1)];
        assert!(Sums::of(&[&one, &other]).is_none());
        let elsewhere = event(0, 0, "n", 1);
        assert!(Sums::of(&[&one, &elsewhere]).is_some());
    }
}
