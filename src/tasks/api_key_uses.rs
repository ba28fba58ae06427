use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::warn;

use crate::{auth::Auth, error::Error};

/// How far behind the times of last use are.
const PERIOD: Duration = Duration::from_mins(1);

/// At shutdown; what is not written by then is lost.
const LAST_CHANCE: Duration = Duration::from_secs(3);

/// Writes now and then when API keys were last used; runs until dropped.
pub async fn api_key_uses(auth: Auth) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = auth.write_api_key_uses().await {
            warn!(
                error = error.with_causes(),
                "times of last use could not be written, to be tried again"
            );
        }
    }
}

/// Writes what is still to be written of it, when nothing is served any more.
pub async fn last_api_key_uses(auth: &Auth) {
    let written = timeout(LAST_CHANCE, auth.write_api_key_uses()).await;
    let written = written.unwrap_or_else(|silence| Err(Error::Unavailable(silence.into())));
    if let Err(error) = written {
        warn!(
            error = error.with_causes(),
            "the last times of use of API keys were lost"
        );
    }
}
