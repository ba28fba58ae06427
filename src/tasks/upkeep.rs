use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use crate::{error::Result, model::Period, store::Store};

const PERIOD: Duration = Duration::from_hours(1);

/// Events of 35 days ago are accepted, so two months back may still be written to.
const MONTHS_BACK: u32 = 2;

/// A service that cannot make partitions for so long has louder problems.
const MONTHS_AHEAD: u32 = 3;

/// Sessions are kept for a while after their end, to tell a replay from a forgery.
const SESSION_RETENTION: TimeDelta = TimeDelta::days(30);
const SWEEP_BATCH: i64 = 5_000;

/// API keys are listed for a while after their end.
const API_KEY_RETENTION: TimeDelta = TimeDelta::days(90);

/// Makes partitions ahead and deletes sessions and API keys long ended; runs until dropped.
pub async fn upkeep(store: Store) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = upkeep_once(&store, Utc::now()).await {
            warn!(%error, "upkeep failed, to be tried again");
        }
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

async fn upkeep_once(store: &Store, now: DateTime<Utc>) -> Result<()> {
    make_partitions(store, now).await?;
    let stray = store.partitions_default_rows().await?;
    if stray > 0 {
        error!(
            stray,
            "rows in a default partition: their month had no partition"
        );
    }
    let before = now - SESSION_RETENTION;
    sweep("sessions", || store.session_sweep(before, SWEEP_BATCH)).await?;
    let before = now - API_KEY_RETENTION;
    sweep("API keys", || store.api_key_sweep(before, SWEEP_BATCH)).await?;
    debug!("upkeep done");
    Ok(())
}

/// Deletes what ended long ago, batch by batch.
async fn sweep<F>(what: &str, batch: impl Fn() -> F) -> Result<()>
where
    F: Future<Output = Result<usize>>,
{
    let mut swept = 0;
    loop {
        match batch().await? {
            0 => break,
            deleted => swept += deleted,
        }
    }
    if swept > 0 {
        info!(swept, "deleted {what} long ended");
    }
    Ok(())
}

fn months_around(current: Period) -> Vec<Period> {
    let mut month = current;
    for _ in 0..MONTHS_BACK {
        month = month.previous();
    }
    (0..=MONTHS_BACK + MONTHS_AHEAD)
        .map(|n| month.plus_months(n))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
