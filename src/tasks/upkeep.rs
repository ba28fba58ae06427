use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use crate::{
    error::Result,
    model::{Count, Period},
    store::{Partitioned, Store},
    usage::Usage,
};

const PERIOD: Duration = Duration::from_hours(1);

/// Events of 35 days ago are accepted, so two months back may still be written to.
const MONTHS_BACK: u32 = 2;

/// A service that cannot make partitions for so long has louder problems.
const MONTHS_AHEAD: u32 = 3;

/// Sessions are kept for a while after their end, to tell a replay from a forgery.
const SESSION_RETENTION: TimeDelta = TimeDelta::days(30);
const SWEEP_BATCH: i64 = 5_000;

/// Of months that are over for as long nothing is noticed any more.
const NOTICE_MONTHS: u32 = 2;

/// Events are kept for a while after they were delivered.
const EVENT_RETENTION: TimeDelta = TimeDelta::days(7);

/// API keys are listed for a while after their end.
const API_KEY_RETENTION: TimeDelta = TimeDelta::days(90);

/// By then as good as all are forgiven.
const THROTTLE_RETENTION: TimeDelta = TimeDelta::days(2);

/// For so long after a user was deleted traces are looked for: what they had reserved may be committed
/// for 35 days, and sent again.
const ERASURE_WAIT: TimeDelta = TimeDelta::days(36);
const ERASURE_BATCH: i64 = 2_000;
const ATTRIBUTION_BATCH: i64 = 2_000;

/// Makes partitions ahead, drops those of old usage records and acts, deletes sessions and API keys long
/// ended, and writes down what has become of users' months by itself.
pub struct Upkeep {
    store: Store,
    usage: Usage,
    retention: Retention,
    status: Arc<UpkeepStatus>,
}

/// How many full months are kept beside the running one; 0 keeps all.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    pub usage_months: u32,
    pub audit_months: u32,
}

/// What upkeep has seen and done, for whoever watches.
#[derive(Debug, Default)]
pub struct UpkeepStatus {
    /// Runs that did all of it.
    pub succeeded: Count,
    /// Runs that left something to the next one.
    pub failed: Count,
    /// Partitions dropped by this replica.
    pub dropped: Count,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    succeeded_at: Option<Instant>,
    /// Months that have a partition.
    months: Vec<Period>,
    default_rows: u64,
}

impl UpkeepStatus {
    /// Since it was last done, all of it.
    pub fn age(&self) -> Option<Duration> {
        self.seen().succeeded_at.map(|at| at.elapsed())
    }

    /// How many of the months after this one have a partition, up to the first that has none.
    pub fn months_ahead(&self, now: DateTime<Utc>) -> u64 {
        let current = Period::containing(now);
        let seen = self.seen();
        let ahead = (1..).take_while(|n| seen.months.contains(&current.plus_months(*n)));
        ahead.map(|_| 1).sum()
    }

    /// Rows that no monthly partition took; 1,000 of a table stand for more.
    pub fn default_rows(&self) -> u64 {
        self.seen().default_rows
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upkeep {
    pub fn new(store: Store, usage: Usage, retention: Retention) -> Self {
        Self {
            store,
            usage,
            retention,
            status: Arc::default(),
        }
    }

    pub fn status(&self) -> Arc<UpkeepStatus> {
        self.status.clone()
    }

    /// Runs until dropped.
    pub async fn run(self) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match self.once(Utc::now()).await {
                Ok(()) => {
                    self.status.succeeded.add_one();
                    self.status.seen().succeeded_at = Some(Instant::now());
                    debug!("upkeep done");
                }
                Err(error) => {
                    self.status.failed.add_one();
                    warn!(
                        error = error.with_causes(),
                        "upkeep failed, to be tried again"
                    );
                }
            }
        }
    }

    async fn once(&self, now: DateTime<Utc>) -> Result<()> {
        let made = make_partitions(&self.store, now).await;
        self.look().await?;
        made?;
        let (store, before) = (&self.store, now - SESSION_RETENTION);
        sweep("sessions", || store.session_sweep(before, SWEEP_BATCH)).await?;
        let before = now - API_KEY_RETENTION;
        sweep("API keys", || store.api_key_sweep(before, SWEEP_BATCH)).await?;
        let before = Period::containing(now).minus_months(NOTICE_MONTHS);
        sweep("notices", || store.quota_notices_sweep(before, SWEEP_BATCH)).await?;
        let before = now - EVENT_RETENTION;
        sweep("delivered events", || {
            store.outbox_sweep(before, SWEEP_BATCH)
        })
        .await?;
        sweep("mailed tokens", || store.token_sweep(SWEEP_BATCH)).await?;
        // Before the search for traces, which goes by it.
        let attributed = self.attribute().await;
        let erased = self.erase().await;
        let before = now - THROTTLE_RETENTION;
        sweep("failed attempts", || {
            store.throttle_sweep(before, SWEEP_BATCH)
        })
        .await?;
        // By another task, and later: these are many.
        self.usage.notice_all();
        let settled = self.usage.settle(now).await;
        // Last: it gives way to whoever reads for long, and nothing else is to wait for that.
        self.drop_old().await?;
        settled?;
        attributed?;
        erased
    }

    /// Writes down whom older acts concerned.
    async fn attribute(&self) -> Result<()> {
        let (mut from, mut all) = (DateTime::UNIX_EPOCH, 0);
        while let (attributed, Some(last)) =
            self.store.audit_attribute(from, ATTRIBUTION_BATCH).await?
        {
            from = last;
            all += attributed;
        }
        if all > 0 {
            info!(attributed = all, "wrote down whom older acts concerned");
        }
        Ok(())
    }

    /// Looks for traces of deleted users.
    async fn erase(&self) -> Result<()> {
        let batch = || self.store.user_erase(ERASURE_WAIT, ERASURE_BATCH);
        let searched = repeat(batch).await?;
        if searched > 0 {
            info!(searched, "looked for traces of deleted users");
        }
        Ok(())
    }

    async fn look(&self) -> Result<()> {
        let months = self.store.usage_partitions().await?;
        let stray = self.store.partitions_default_rows().await?;
        if stray > 0 {
            error!(
                stray,
                "rows in a default partition: their month had no partition"
            );
        }
        let mut seen = self.status.seen();
        seen.months = months;
        seen.default_rows = u64::try_from(stray).unwrap_or(0);
        Ok(())
    }

    async fn drop_old(&self) -> Result<()> {
        let usage = self.drop_months(Partitioned::Usage, self.retention.usage_months);
        let usage = usage.await;
        self.drop_months(Partitioned::Audit, self.retention.audit_months)
            .await?;
        usage
    }

    /// Drops what is older than so many full months.
    async fn drop_months(&self, of: Partitioned, months_kept: u32) -> Result<()> {
        if months_kept == 0 {
            return Ok(());
        }
        for month in self.store.partitions_older(of, months_kept).await? {
            let Some(rows) = self.store.partition_drop(of, month).await? else {
                continue;
            };
            self.status.dropped.add_one();
            match of {
                Partitioned::Usage => {
                    info!(%month, rows_about = rows, "dropped usage records past their retention");
                }
                Partitioned::Audit => {
                    info!(%month, rows_about = rows, "dropped audit events past their retention");
                }
            }
        }
        Ok(())
    }
}

/// Makes the partitions that writes of now and of the next months need.
///
/// # Errors
/// `Unavailable`
pub async fn make_partitions(store: &Store, now: DateTime<Utc>) -> Result<()> {
    store
        .partitions_ensure(&months_around(Period::containing(now)))
        .await
}

/// Deletes what ended long ago, batch by batch.
async fn sweep<F>(what: &str, batch: impl Fn() -> F) -> Result<()>
where
    F: Future<Output = Result<usize>>,
{
    let swept = repeat(batch).await?;
    if swept > 0 {
        info!(swept, "deleted {what} long ended");
    }
    Ok(())
}

/// Until there is nothing more to do; returns how much that was.
async fn repeat<F>(batch: impl Fn() -> F) -> Result<usize>
where
    F: Future<Output = Result<usize>>,
{
    let mut all = 0;
    loop {
        match batch().await? {
            0 => return Ok(all),
            done => all += done,
        }
    }
}

fn months_around(current: Period) -> Vec<Period> {
    let first = current.minus_months(MONTHS_BACK);
    (0..=MONTHS_BACK + MONTHS_AHEAD)
        .map(|n| first.plus_months(n))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_ahead_are_those_without_a_gap() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("valid");
        let status = UpkeepStatus::default();
        assert_eq!((status.months_ahead(now), status.age()), (0, None));
        status.seen().months = months_around(Period::containing(now));
        assert_eq!(status.months_ahead(now), 3);
        // Nobody makes any for a while.
        assert_eq!(status.months_ahead(now + TimeDelta::days(61)), 1);
        assert_eq!(status.months_ahead(now + TimeDelta::days(400)), 0);
        status.seen().months.remove(4);
        assert_eq!(status.months_ahead(now), 1);
    }

    #[test]
    fn every_acceptable_event_has_a_partition() {
        let mut day = DateTime::from_timestamp(1_767_225_600, 0).expect("2026-01-01");
        for _ in 0..1000 {
            let months = months_around(Period::containing(day));
            for offset in [
                TimeDelta::days(-35),
                TimeDelta::minutes(5),
                TimeDelta::days(31),
            ] {
                assert!(months.contains(&Period::containing(day + offset)), "{day}");
            }
            day += TimeDelta::days(1);
        }
    }
}
