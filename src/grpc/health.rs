//! `grpc.health.v1`: follows the database.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::{
    auth::Trust,
    proto::{envoy, tollkeeper},
};

/// How often the database is asked, and how long it may take to answer.
const PERIOD: Duration = Duration::from_secs(1);

/// Whether changes on other replicas are known within the staleness bound.
const CHANGE_FEED: &str = "tollkeeper.ChangeFeed";

/// The names health is reported under: the server as a whole and each service.
const SERVICES: [&str; 6] = [
    "",
    tollkeeper::auth::v1::auth_service_server::SERVICE_NAME,
    tollkeeper::usage::v1::usage_service_server::SERVICE_NAME,
    tollkeeper::admin::v1::admin_service_server::SERVICE_NAME,
    envoy::service::auth::v3::authorization_server::SERVICE_NAME,
    envoy::service::ratelimit::v3::rate_limit_service_server::SERVICE_NAME,
];

/// Whether calls are welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Starting,
    Serving,
    DatabaseAway,
    Draining,
}

impl Readiness {
    pub fn why(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::DatabaseAway => "the database does not answer",
            Self::Draining => "shutting down",
        }
    }
}

/// Says whether calls are welcome, to those who ask by gRPC and to `readiness`.
pub async fn report(
    reporter: &HealthReporter,
    readiness: &watch::Sender<Readiness>,
    state: Readiness,
) {
    readiness.send_replace(state);
    for service in SERVICES {
        let status = serving(state == Readiness::Serving);
        reporter.set_service_status(service, status).await;
    }
    if matches!(state, Readiness::Starting | Readiness::Draining) {
        report_feed(reporter, false).await;
    }
}

async fn report_feed(reporter: &HealthReporter, live: bool) {
    reporter
        .set_service_status(CHANGE_FEED, serving(live))
        .await;
}

fn serving(serving: bool) -> ServingStatus {
    match serving {
        true => ServingStatus::Serving,
        false => ServingStatus::NotServing,
    }
}

/// Ends every watch: one that goes on would keep its connection, and with it the server, open.
pub async fn end_watches(mut reporter: HealthReporter) {
    for service in SERVICES.into_iter().chain([CHANGE_FEED]) {
        reporter.clear_service_status(service).await;
    }
}

/// Reports as serving while `database` answers a sign of life, and whether `feed` is in step; runs
/// until dropped.
pub async fn follow<E>(
    database: impl AsyncFn() -> Result<(), E>,
    feed: impl Fn() -> Trust,
    reporter: HealthReporter,
    readiness: watch::Sender<Readiness>,
) {
    let mut before = Readiness::Starting;
    let mut trust_before = Trust::Lost;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let state = match timeout(PERIOD * 2, database()).await {
            Ok(Ok(())) => Readiness::Serving,
            _ => Readiness::DatabaseAway,
        };
        if state != before {
            before = state;
            report(&reporter, &readiness, state).await;
            if state == Readiness::Serving {
                info!("serving");
            } else {
                warn!("not serving: the database does not answer");
            }
        }
        let trust = feed();
        if trust != trust_before {
            trust_before = trust;
            report_feed(&reporter, trust == Trust::Live).await;
            match trust {
                Trust::Live => info!("the change feed is live"),
                Trust::Stale => warn!("the change feed is stale: answers come from the database"),
                Trust::Lost => {
                    warn!("the change feed is lost: memory is not used, even in an outage")
                }
            }
        }
    }
}
