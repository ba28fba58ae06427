//! Notices: thresholds of the month's limit that users have reached.
//!
//! Whatever may have a threshold reached marks the user: usage that was booked, a limit that changed.
//! A task looks at those who are marked, and lets the database see to it that each is told once. Marks
//! are in memory only: what a crash or a full set forgets is found by a walk over all who have used
//! something, at the start, whenever changes may have been missed, and every hour.

use std::{
    collections::{BTreeSet, VecDeque},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::{sleep, timeout};
use tracing::{debug, error, warn};

use super::Usage;
use crate::{
    error::{Error, Result},
    model::{Period, QuotaNotice, Tiers, UserId},
};

/// Between looks while few are marked: how late a notice is.
const PERIOD: Duration = Duration::from_secs(1);

/// When many are marked, this task leaves the database alone for so many times as long as it took.
const REST: u32 = 19;

/// Users who are looked at together.
const BATCH: usize = 500;

/// Users who may be marked. Beyond that all are looked at.
const MAX_MARKED: usize = 100_000;

/// A month that is over is noticed for so long, since its last events may come late. Later nobody
/// has a use for it, and its limit may not be known as it was.
const GRACE: TimeDelta = TimeDelta::days(1);

/// At shutdown; what is not noticed by then the next walk finds.
const LAST_CHANCE: Duration = Duration::from_secs(1);

/// Users to be looked at. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Marks(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    marked: BTreeSet<(Period, UserId)>,
    /// Marked before; first, so that nobody is kept waiting by those who are marked over and over.
    batches: VecDeque<(Period, UserId)>,
    /// Another walk is due.
    all: bool,
    walk: Walk,
}

/// The months to be walked, and where in the first of them.
#[derive(Clone, Default)]
struct Walk {
    periods: Vec<Period>,
    after: Option<UserId>,
}

impl Marks {
    pub(super) fn add(&self, users: impl Iterator<Item = (Period, UserId)>) {
        let mut waiting = self.waiting();
        for user in users {
            if waiting.marked.len() < MAX_MARKED {
                waiting.marked.insert(user);
            } else if !waiting.marked.contains(&user) {
                waiting.all = true;
            }
        }
    }

    pub(super) fn add_all(&self) {
        self.waiting().all = true;
    }

    fn take_batch(&self) -> Vec<(Period, UserId)> {
        let mut waiting = self.waiting();
        if waiting.batches.is_empty() {
            waiting.batches = mem::take(&mut waiting.marked).into_iter().collect();
        }
        let some = waiting.batches.len().min(BATCH);
        waiting.batches.drain(..some).collect()
    }

    /// Where the walk goes on, if there is one.
    fn walk(&self, now: DateTime<Utc>) -> Option<(Period, Option<UserId>)> {
        let mut waiting = self.waiting();
        if waiting.walk.periods.is_empty() && mem::take(&mut waiting.all) {
            let mut periods = vec![Period::containing(now), Period::containing(now - GRACE)];
            periods.dedup();
            waiting.walk = Walk {
                periods,
                after: None,
            };
        }
        let walk = &waiting.walk;
        walk.periods.last().map(|period| (*period, walk.after))
    }

    /// The walk has come to this user, or to the end of the month.
    fn walked(&self, last: Option<UserId>) {
        let mut waiting = self.waiting();
        waiting.walk.after = last;
        if last.is_none() {
            waiting.walk.periods.pop();
        }
    }

    /// Whether there is more than what has been marked since the last look.
    fn is_behind(&self) -> bool {
        let waiting = self.waiting();
        !waiting.batches.is_empty() || waiting.all || !waiting.walk.periods.is_empty()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Usage {
    /// Puts notices into the outbox as they come due; runs until dropped.
    pub async fn notice(self) {
        let mut pause = PERIOD;
        loop {
            sleep(pause).await;
            let begun = Instant::now();
            let looked = self.look().await;
            pause = match looked {
                Ok(()) if self.marks.is_behind() => begun.elapsed() * REST,
                Ok(()) => PERIOD.max(begun.elapsed() * REST),
                Err(error) => {
                    warn!(
                        error = error.with_causes(),
                        "thresholds could not be looked at, to be tried again"
                    );
                    PERIOD
                }
            };
        }
    }

    /// Looks once more at those who are marked, when nothing is booked any more.
    pub async fn last_notices(&self) {
        if timeout(LAST_CHANCE, self.look()).await.is_err() {
            debug!("the last notices are left to the next walk");
        }
    }

    /// Has everybody looked at who has used something.
    pub fn notice_all(&self) {
        self.marks.add_all();
    }

    /// Looks at a batch of those who are marked, and at one of the walk.
    async fn look(&self) -> Result<()> {
        let (tiers, now) = (self.tiers(), Utc::now());
        let batch = self.marks.take_batch();
        let mut rest = &batch[..];
        while let Some((period, _)) = rest.first() {
            let (these, others) = rest.split_at(rest.partition_point(|(one, _)| one == period));
            let users: Vec<UserId> = these.iter().map(|(_, user_id)| *user_id).collect();
            if now < period.end() + GRACE
                && let Err(error) = self.notice_each(&users, *period, &tiers).await
            {
                self.marks.add(rest.iter().copied());
                return Err(error);
            }
            rest = others;
        }
        if let Some((period, after)) = self.marks.walk(now) {
            let users = if notices_something(&tiers) {
                let limit = i64::try_from(BATCH).unwrap_or(i64::MAX);
                self.store.usage_users(period, after, limit).await?
            } else {
                Vec::new()
            };
            self.notice_each(&users, period, &tiers).await?;
            self.marks.walked(users.last().copied());
        }
        Ok(())
    }

    /// What is wrong with one user's rows keeps none of the others waiting.
    ///
    /// # Errors
    /// `Unavailable`
    async fn notice_each(&self, users: &[UserId], period: Period, tiers: &Tiers) -> Result<()> {
        match self.notice_users(users, period, tiers).await {
            Ok(()) => return Ok(()),
            Err(error @ Error::Unavailable(_)) => return Err(error),
            Err(_) => {}
        }
        for user_id in users {
            match self.notice_users(&[*user_id], period, tiers).await {
                Err(error @ Error::Unavailable(_)) => return Err(error),
                Err(error) => {
                    error!(%user_id, error = error.with_causes(), "a user's thresholds cannot be looked at")
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    async fn notice_users(&self, users: &[UserId], period: Period, tiers: &Tiers) -> Result<()> {
        if users.is_empty() || !notices_something(tiers) {
            return Ok(());
        }
        let facts = self.store.quota_facts_of(users, period, tiers).await?;
        let due = facts.iter().flat_map(|one| QuotaNotice::due(one, tiers));
        let due: Vec<QuotaNotice> = due.collect();
        let noticed = self.store.quota_notices_insert(&due).await?;
        if noticed > 0 {
            debug!(noticed, "thresholds were reached");
        }
        Ok(())
    }
}

fn notices_something(tiers: &Tiers) -> bool {
    tiers.all.iter().any(|tier| !tier.thresholds.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("valid")
    }

    #[test]
    fn those_marked_first_are_looked_at_before_the_same_ones_again() {
        let marks = Marks::default();
        let period = Period::containing(now());
        let users: Vec<_> = (0..BATCH + 10).map(|_| (period, UserId::new())).collect();
        marks.add(users.iter().copied());
        marks.add(users.iter().copied());
        let first = marks.take_batch();
        assert_eq!(first, users[..BATCH]);
        marks.add(first.into_iter());
        assert!(marks.is_behind());
        assert_eq!(marks.take_batch(), users[BATCH..]);
        assert_eq!(marks.take_batch(), users[..BATCH]);
        assert!(marks.take_batch().is_empty() && !marks.is_behind());
    }

    #[test]
    fn more_than_can_be_marked_are_left_to_a_walk() {
        let marks = Marks::default();
        let period = Period::containing(now());
        let users: Vec<_> = (0..MAX_MARKED).map(|_| (period, UserId::new())).collect();
        marks.add(users.iter().copied());
        marks.add(users.iter().copied().take(1));
        assert_eq!(marks.walk(now()), None);
        marks.add([(period, UserId::new())].into_iter());
        assert_eq!(marks.waiting().marked.len(), MAX_MARKED);
        assert_eq!(marks.walk(now()), Some((period, None)));
    }

    #[test]
    fn a_walk_that_is_asked_for_meanwhile_comes_after_and_takes_the_last_month_in() {
        let marks = Marks::default();
        let this = Period::containing(now());
        let user = UserId::new();
        for first_hour in [true, false] {
            marks.add_all();
            let now = if first_hour { this.start() } else { now() };
            if first_hour {
                assert_eq!(marks.walk(now), Some((this.previous(), None)));
                marks.walked(None);
            }
            assert_eq!(marks.walk(now), Some((this, None)));
            marks.walked(Some(user));
            marks.add_all();
            assert_eq!(marks.walk(now), Some((this, Some(user))));
            marks.walked(None);
            assert!(marks.is_behind(), "another is due");
            while marks.walk(now).is_some() {
                marks.walked(None);
            }
            assert!(!marks.is_behind());
        }
    }
}
