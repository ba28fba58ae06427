//! What callers see when the database, the network or the server itself goes away.

mod database;
mod drain;
mod network;

use std::time::Duration;

use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tollkeeper::proto::tollkeeper::{
    admin::v1::SetUserTierRequest,
    usage::v1::{
        GetMonthlyUsageRequest, ListUsageRecordsRequest, UsageEvent, record_usage_response::Outcome,
    },
};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;

use crate::{
    harness::{Blocker, TestApp, eventually, reason},
    usage::{event, record_through},
};

/// Words of the machinery; none is for callers.
const INTERNALS: [&str; 16] = [
    "select",
    "insert",
    "update",
    "usage_records",
    "monthly_usage",
    "postgres",
    "psql",
    "socket",
    "diesel",
    "deadpool",
    "pool",
    "tokio",
    "server closed",
    "connection",
    "terminating",
    "statement",
];

/// Asserts that a call failed because the database was away, and says so as documented.
pub(crate) fn assert_database_unavailable(status: &Status) {
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(reason(status), "DATABASE_UNAVAILABLE");
    let retry = status.get_details_retry_info().expect("RetryInfo");
    assert!(retry.retry_delay.expect("a delay") > Duration::ZERO);
    assert_tells_nothing(status, &[]);
}

/// Asserts that neither message nor details show SQL, driver text or `secrets`.
fn assert_tells_nothing(status: &Status, secrets: &[&str]) {
    let details = String::from_utf8_lossy(status.details()).to_lowercase();
    // "the database is unavailable" is what callers are told instead.
    let text = format!("{} {details}", status.message().to_lowercase());
    for word in INTERNALS.iter().chain(secrets) {
        assert!(!text.contains(word), "{word} in {text}");
    }
}

/// Starts to book an event, on a connection and a task of its own.
fn start_recording(app: &TestApp, event: UsageEvent) -> JoinHandle<Result<Outcome, Status>> {
    let (channel, key) = (app.channel.clone(), app.service_key.clone());
    tokio::spawn(async move { record_through(&channel, &key, &event).await })
}

/// Starts to read a month, on a connection and a task of its own.
fn start_reading(app: &TestApp, user_id: &str) -> JoinHandle<()> {
    let request = GetMonthlyUsageRequest {
        user_id: user_id.to_owned(),
        month: String::new(),
    };
    let mut usage = app.usage(&app.service_key);
    tokio::spawn(async move {
        usage
            .get_monthly_usage(request)
            .await
            .map(drop)
            .unwrap_or(())
    })
}

/// Starts to change a user's tier, on a task of its own.
fn start_changing(app: &TestApp, user_id: &str) -> JoinHandle<()> {
    let request = SetUserTierRequest {
        user_id: user_id.to_owned(),
        tier: "builder".to_owned(),
    };
    let mut admin = app.admin(&app.service_key);
    tokio::spawn(async move { admin.set_user_tier(request).await.map(drop).unwrap_or(()) })
}

async fn health(channel: &Channel) -> Result<ServingStatus, Status> {
    let request = HealthCheckRequest::default();
    let answer = HealthClient::new(channel.clone()).check(request).await?;
    Ok(answer.into_inner().status())
}

async fn eventually_reports(channel: &Channel, status: ServingStatus) {
    eventually(status.as_str_name(), async || {
        health(channel).await.is_ok_and(|current| current == status)
    })
    .await;
}
