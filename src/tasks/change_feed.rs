//! Hears of changes on all replicas and proves, by heartbeats, up to when it has.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{info, warn};

use crate::{
    auth::Auth,
    clock::BootTime,
    error::{Error, Result},
    model::Change,
    store::{ChangeListener, Notification, Store},
    usage::Usage,
};

/// Heartbeats within the staleness bound: some may be late without an effect.
const BEATS_PER_BOUND: u32 = 4;

/// Between attempts to listen again.
const RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(2);

/// Follows the change feed; runs until dropped.
///
/// After every connect everything known is doubted, for changes may have been missed. A connection
/// that is silent beyond the staleness bound counts as lost: its end may never be told.
pub async fn change_feed(store: Store, auth: Auth, usage: Usage) {
    let mut retry = RETRY;
    loop {
        match store.changes().await {
            Ok(listener) => {
                auth.doubt();
                usage.apply(Change::All);
                info!("listening for changes");
                retry = RETRY;
                let error = follow(listener, &auth, &usage).await;
                warn!(error = error.with_causes(), "the change feed was lost");
            }
            Err(error) => warn!(
                error = error.with_causes(),
                "the change feed cannot be reached"
            ),
        }
        sleep(retry).await;
        retry = (retry * 2).min(MAX_RETRY);
    }
}

/// Applies changes until the connection is lost; returns why.
async fn follow(mut listener: ChangeListener, auth: &Auth, usage: &Usage) -> Error {
    let bound = auth.freshness().staleness_bound();
    let mut beats = interval(bound / BEATS_PER_BOUND);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sent = BTreeMap::new();
    let mut number = 0;
    loop {
        let step = tokio::select! {
            notification = listener.next() => notification.map(Some),
            _ = beats.tick() => {
                number += 1;
                // Before it is sent: what is proved is what was committed up to here.
                sent.insert(number, BootTime::now());
                beat(&listener, number, bound).await.map(|()| None)
            }
        };
        match step {
            Ok(Some(Notification::Changed(change))) => {
                auth.apply(change);
                usage.apply(change);
            }
            Ok(Some(Notification::Heartbeat(number, revision))) => {
                if let Some(sent_at) = sent.remove(&number) {
                    auth.heard_up_to(revision, sent_at);
                    // Earlier ones that did not come back prove nothing more.
                    sent = sent.split_off(&number);
                }
            }
            Ok(None) => {}
            Err(error) => return error,
        }
    }
}

async fn beat(listener: &ChangeListener, number: u64, bound: Duration) -> Result<()> {
    let sent = timeout(bound, listener.heartbeat(number)).await;
    sent.map_err(|silence| Error::Unavailable(silence.into()))?
}
