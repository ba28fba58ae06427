//! The ledger and the quota, from outside.

mod batch;
mod concurrent;
mod export;
mod faults;
mod keeper;
mod leases;
mod limits;
mod list;
mod month;
mod notices;
mod query;
pub(crate) mod quota;
mod record;
mod replay;
pub(crate) mod reservations;
mod retention;
mod stream;

use chrono::{DateTime, TimeDelta, Utc};
use prost_types::Timestamp;
use tollkeeper::{
    model::Period,
    proto::tollkeeper::usage::v1::{
        GetMonthlyUsageRequest, GetMonthlyUsageResponse, RecordUsageRequest, TokenCounts,
        UsageEvent, record_usage_response::Outcome, usage_service_client::UsageServiceClient,
    },
};
use tonic::{Status, transport::Channel};
use uuid::Uuid;

use crate::harness::{TestApp, with_bearer};

/// Where the sums over distinct events and the booked sums differ: months and models.
pub(crate) const WRONG_MONTHS: &str = "
    SELECT count(*) FROM (
        SELECT user_id, usage_month AS month, sum(input_tokens)::bigint AS i,
            sum(output_tokens)::bigint AS o, sum(cached_input_tokens)::bigint AS c,
            sum(cache_write_tokens)::bigint AS w, sum(reasoning_tokens)::bigint AS r, count(*) AS n
        FROM usage_records GROUP BY 1, 2
    ) AS e FULL JOIN monthly_usage AS m USING (user_id, month)
    WHERE (e.i, e.o, e.c, e.w, e.r, e.n) IS DISTINCT FROM (m.input_tokens, m.output_tokens,
        m.cached_input_tokens, m.cache_write_tokens, m.reasoning_tokens, m.request_count)";
pub(crate) const WRONG_MODELS: &str = "
    SELECT count(*) FROM (
        SELECT user_id, usage_month AS month, model, sum(input_tokens)::bigint AS i,
            sum(output_tokens)::bigint AS o, sum(cached_input_tokens)::bigint AS c,
            sum(cache_write_tokens)::bigint AS w, sum(reasoning_tokens)::bigint AS r, count(*) AS n
        FROM usage_records GROUP BY 1, 2, 3
    ) AS e FULL JOIN monthly_model_usage AS m USING (user_id, month, model)
    WHERE (e.i, e.o, e.c, e.w, e.r, e.n) IS DISTINCT FROM (m.input_tokens, m.output_tokens,
        m.cached_input_tokens, m.cache_write_tokens, m.reasoning_tokens, m.request_count)";

impl TestApp {
    /// Books an event as a service.
    pub(crate) async fn record(&self, event: &UsageEvent) -> Result<Outcome, Status> {
        record_through(&self.channel, &self.service_key, event).await
    }

    /// A user's month as a service reads it; the current one when `month` is empty.
    pub(crate) async fn month(&self, user_id: &str, month: &str) -> GetMonthlyUsageResponse {
        let request = GetMonthlyUsageRequest {
            user_id: user_id.to_owned(),
            month: month.to_owned(),
        };
        let month = self
            .usage(&self.service_key)
            .get_monthly_usage(request)
            .await;
        month.expect("read").into_inner()
    }

    /// Asserts that both tables of sums say exactly what `events` distinct events add up to.
    pub(crate) async fn assert_books_balance(&self, events: i64) {
        let booked = self.count("SELECT count(*) FROM usage_records").await;
        assert_eq!(booked, events, "distinct events booked");
        assert_eq!(self.count(WRONG_MONTHS).await, 0, "wrong sums of months");
        assert_eq!(self.count(WRONG_MODELS).await, 0, "wrong sums of models");
    }
}

/// Books an event as a service, over any connection.
pub(crate) async fn record_through(
    channel: &Channel,
    service_key: &str,
    event: &UsageEvent,
) -> Result<Outcome, Status> {
    let request = RecordUsageRequest {
        event: Some(event.clone()),
    };
    let recorded = UsageServiceClient::new(channel.clone())
        .record_usage(with_bearer(request, service_key))
        .await?;
    Ok(recorded.into_inner().outcome())
}

/// A new event of this moment with something in every field.
pub(crate) fn event(user_id: &str) -> UsageEvent {
    UsageEvent {
        event_id: Uuid::now_v7().to_string(),
        occurred_at: Some(at(Utc::now())),
        user_id: user_id.to_owned(),
        model: "gpt-x".to_owned(),
        tokens: Some(TokenCounts {
            input: 100,
            output: 20,
            cached_input: 3,
            cache_write: 4,
            reasoning: 5,
        }),
        request_id: "req-1".to_owned(),
        labels: [("team".to_owned(), "blue".to_owned())].into(),
    }
}

/// From now on Postgres refuses events of this model, as a fault of its own would look.
async fn refuse_model(app: &TestApp, model: &str) {
    app.sql(
        "CREATE FUNCTION refuse_model() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN RAISE 'refused'; END $$",
    )
    .await;
    app.sql(&format!(
        "CREATE TRIGGER refuse_model BEFORE INSERT ON usage_records
         FOR EACH ROW WHEN (NEW.model = '{model}') EXECUTE FUNCTION refuse_model()"
    ))
    .await;
}

/// Brings a user's total of this month up to 807 tokens below what can be counted.
pub(crate) async fn use_up(app: &TestApp, user_id: &str, model: &str) {
    let this = Period::containing(Utc::now());
    app.sql(&format!(
        "INSERT INTO monthly_model_usage
             VALUES ('{user_id}', '{this}', '{model}', 9223372036854775000, 0, 0, 0, 0, 1)",
    ))
    .await;
}

/// To the microsecond, as it comes back.
fn at(instant: DateTime<Utc>) -> Timestamp {
    Timestamp {
        seconds: instant.timestamp(),
        nanos: i32::try_from(instant.timestamp_subsec_micros() * 1000).expect("fits"),
    }
}

/// The last microsecond of the previous month, the first instant of this one, and the two months.
///
/// Both are accepted on every day of every month.
fn turn_of_the_month() -> (DateTime<Utc>, DateTime<Utc>, Period, Period) {
    let this = Period::containing(Utc::now());
    let first = this.start();
    (
        first - TimeDelta::microseconds(1),
        first,
        this.previous(),
        this,
    )
}

fn tokens(input: i64) -> Option<TokenCounts> {
    Some(TokenCounts {
        input,
        ..TokenCounts::default()
    })
}
