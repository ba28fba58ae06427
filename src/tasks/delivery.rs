//! Delivers what waits in the outbox, at least once. Replicas share the work: each claims some for a
//! while, and what it does not come to an end with is anybody's again.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::rand;
use chrono::Utc;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::warn;

use super::backlog::Backlog;
use crate::{
    error::Result,
    model::{Count, QuotaNotice},
    store::{OutboxEvent, Store},
    webhook::{DEADLINE, Undelivered, Webhook},
};

/// Between looks for events that are due.
const PERIOD: Duration = Duration::from_secs(1);

/// Between looks at what waits, for whoever watches.
const WATCH: Duration = Duration::from_secs(5);

/// Posted at a time by one replica.
const MAX_AT_ONCE: usize = 8;

/// How long an event is this replica's: well beyond an attempt and the word of its end.
const CLAIM: Duration = DEADLINE.saturating_mul(6);

/// After the first failure; doubled with each, up to the most.
const RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_hours(1);

/// Posts the events of the outbox.
pub struct Delivery {
    store: Store,
    webhook: Option<Arc<Webhook>>,
    status: Arc<DeliveryStatus>,
}

/// What waits and what became of the others, for whoever watches.
#[derive(Debug, Default)]
pub struct DeliveryStatus {
    /// Attempts of this replica.
    pub delivered: Count,
    pub failed: Count,
    pub backlog: Backlog<Undelivered>,
}

impl Delivery {
    /// Without a webhook events stay where they are.
    pub fn new(store: Store, webhook: Option<Webhook>) -> Self {
        Self {
            store,
            webhook: webhook.map(Arc::new),
            status: Arc::default(),
        }
    }

    pub fn status(&self) -> Arc<DeliveryStatus> {
        self.status.clone()
    }

    /// Runs until dropped; what is under way then is tried again.
    pub async fn run(self) {
        let mut looks = interval(WATCH);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut posting = JoinSet::new();
        loop {
            tokio::select! {
                _ = looks.tick() => {
                    if let Err(error) = self.look().await {
                        warn!(error = error.with_causes(), "the outbox could not be looked at");
                    }
                }
                Some(_) = posting.join_next() => {}
                () = sleep(PERIOD) => {}
            }
            while posting.try_join_next().is_some() {}
            if let Err(error) = self.post_more(&mut posting).await {
                warn!(error = error.with_causes(), "no events could be claimed");
                sleep(PERIOD).await;
            }
        }
    }

    async fn post_more(&self, posting: &mut JoinSet<()>) -> Result<()> {
        let Some(webhook) = &self.webhook else {
            return Ok(());
        };
        let free = MAX_AT_ONCE.saturating_sub(posting.len());
        if free == 0 {
            return Ok(());
        }
        let store = &self.store;
        let claimed = store.outbox_claim(QuotaNotice::KIND, CLAIM, free).await?;
        for event in claimed {
            let (store, webhook) = (store.clone(), webhook.clone());
            let status = self.status.clone();
            posting.spawn(async move {
                let said = post(&store, &webhook, &event, &status).await;
                if let Err(error) = said {
                    // It will be claimed, and maybe posted, once more.
                    warn!(
                        error = error.with_causes(),
                        event_id = %event.id,
                        "what became of an event could not be written"
                    );
                }
            });
        }
        Ok(())
    }

    async fn look(&self) -> Result<()> {
        let (pending, oldest) = self.store.outbox_pending().await?;
        let failure = self.status.backlog.see(pending, oldest);
        if let Some(failure) = failure {
            warn!(%failure, pending, "events cannot be delivered to the webhook, to be tried again");
        }
        Ok(())
    }
}

async fn post(
    store: &Store,
    webhook: &Webhook,
    event: &OutboxEvent,
    status: &DeliveryStatus,
) -> Result<()> {
    let body = event.payload.to_string();
    match webhook.post(event.id, body, Utc::now()).await {
        Ok(()) => {
            status.delivered.add_one();
            store.outbox_delivered(event.id).await
        }
        Err(failure) => {
            status.failed.add_one();
            status.backlog.failed(failure);
            let mut random = [0; 1];
            // Without randomness replicas may come together, no more.
            let _ = rand::fill(&mut random);
            let pause = pause_after(event.attempts, random[0]);
            let why = failure.to_string();
            store.outbox_failed(event, &why, pause).await
        }
    }
}

/// How long to wait after so many attempts, from the half to all of what doubles with each: those who
/// failed together do not come back together.
pub(super) fn pause_after(attempts: i32, random: u8) -> Duration {
    let doublings = u32::try_from(attempts - 1).unwrap_or(0).min(20);
    let whole = (RETRY * 2_u32.pow(doublings)).min(MAX_RETRY);
    whole / 2 + whole / 2 * u32::from(random) / 255
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_an_hour_and_spread_over_a_half() {
        let seconds = |attempts, random| pause_after(attempts, random).as_secs_f64();
        for (attempts, whole) in [(1, 1.0), (2, 2.0), (5, 16.0), (12, 2048.0), (13, 3600.0)] {
            assert!(
                (seconds(attempts, 0) - whole / 2.0).abs() < 1e-6,
                "{attempts}"
            );
            assert!((seconds(attempts, 255) - whole).abs() < 1e-6, "{attempts}");
        }
        for attempts in [i32::MIN + 1, 0, i32::MAX] {
            let pause = pause_after(attempts, 128);
            assert!(RETRY / 2 <= pause && pause <= MAX_RETRY, "{attempts}");
        }
    }
}
