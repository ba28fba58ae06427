use std::time::Duration;

use tokio::time::{Instant, sleep};
use tollkeeper::{auth::Trust, clock::BootTime};

use super::RunningServer;

/// Longest wait for what has to come; generous, since the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
///
/// # Panics
/// Names `what` did not come in time.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until a server hears of changes: what it has learnt before is put in doubt once it does.
pub(crate) async fn hears_of_changes(server: &RunningServer) {
    let freshness = server.auth.freshness();
    eventually("it hears of changes", async || {
        freshness.trust(BootTime::now()) == Trust::Live
    })
    .await;
}
