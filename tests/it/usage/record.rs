use chrono::{TimeDelta, Utc};
use tollkeeper::proto::tollkeeper::usage::v1::{
    TokenCounts, UsageEvent, record_usage_response::Outcome,
};
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::{at, event, turn_of_the_month};
use crate::harness::{TestApp, reason};

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_three_models_adds_up_per_model_and_dimension() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (model, times) in [("small", 1), ("medium", 2), ("large", 3)] {
        for _ in 0..times {
            let event = UsageEvent {
                model: model.to_owned(),
                ..event(&user.id)
            };
            assert_eq!(app.record(&event).await.unwrap(), Outcome::Recorded);
        }
    }
    let month = app.month(&user.id, "").await;
    let sums = |times: i64| TokenCounts {
        input: 100 * times,
        output: 20 * times,
        cached_input: 3 * times,
        cache_write: 4 * times,
        reasoning: 5 * times,
    };
    let models: Vec<_> = month
        .models
        .iter()
        .map(|model| (model.model.as_str(), model.totals.unwrap()))
        .collect();
    let names: Vec<_> = models.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["large", "medium", "small"]);
    for ((_, totals), times) in models.iter().zip([3, 2, 1]) {
        assert_eq!(totals.tokens, Some(sums(times)));
        assert_eq!(totals.total_tokens, 132 * times);
        assert_eq!(totals.request_count, times);
    }
    let totals = month.totals.unwrap();
    assert_eq!(totals.tokens, Some(sums(6)));
    assert_eq!(totals.total_tokens, 132 * 6);
    assert_eq!(totals.request_count, 6);
    app.assert_books_balance(6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_counts_add_up() {
    const MAX: i64 = 1_000_000_000_000;
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for _ in 0..3 {
        let event = UsageEvent {
            tokens: Some(TokenCounts {
                input: MAX,
                output: MAX,
                cached_input: MAX,
                cache_write: MAX,
                reasoning: MAX,
            }),
            ..event(&user.id)
        };
        app.record(&event).await.unwrap();
    }
    let totals = app.month(&user.id, "").await.totals.unwrap();
    assert_eq!(totals.total_tokens, 15 * MAX);
    app.assert_books_balance(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_at_the_turn_of_the_month_go_to_their_months() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (last, first, before, this) = turn_of_the_month();
    for instant in [last, first] {
        let event = UsageEvent {
            occurred_at: Some(at(instant)),
            ..event(&user.id)
        };
        assert_eq!(app.record(&event).await.unwrap(), Outcome::Recorded);
    }
    for period in [before, this] {
        let month = app.month(&user.id, &period.to_string()).await;
        assert_eq!(month.month, period.to_string());
        assert_eq!(month.totals.unwrap().request_count, 1, "{period}");
    }
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_nanosecond_of_a_month_is_not_rounded_into_the_next() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (last, _, before, _) = turn_of_the_month();
    let mut occurred_at = at(last);
    occurred_at.nanos = 999_999_999;
    let event = UsageEvent {
        occurred_at: Some(occurred_at),
        ..event(&user.id)
    };
    app.record(&event).await.unwrap();
    let month = app.month(&user.id, &before.to_string()).await;
    assert_eq!(month.totals.unwrap().request_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_inside_the_window_are_booked() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let slack = TimeDelta::minutes(1);
    for age in [TimeDelta::days(35) - slack, slack - TimeDelta::minutes(5)] {
        let event = UsageEvent {
            occurred_at: Some(at(Utc::now() - age)),
            ..event(&user.id)
        };
        assert_eq!(app.record(&event).await.unwrap(), Outcome::Recorded);
    }
    app.assert_books_balance(2).await;
    let stray = "SELECT count(*) FROM usage_records_default";
    assert_eq!(app.count(stray).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_outside_the_window_are_refused() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let slack = TimeDelta::seconds(1);
    // Two minutes: the clock of the server runs on while the call is under way.
    let ahead = TimeDelta::minutes(5) + TimeDelta::minutes(2);
    for age in [TimeDelta::days(35) + slack, -ahead] {
        let event = UsageEvent {
            occurred_at: Some(at(Utc::now() - age)),
            ..event(&user.id)
        };
        let refused = app.record(&event).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert_eq!(reason(&refused), "INVALID_FIELD");
        let fields = refused.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields[0].field, "event.occurred_at");
    }
    app.assert_books_balance(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_an_unknown_user_is_refused_and_not_booked() {
    let app = TestApp::spawn().await;
    let refused = app
        .record(&event(&Uuid::now_v7().to_string()))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(reason(&refused), "USER_NOT_FOUND");
    app.assert_books_balance(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_a_disabled_user_is_booked() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.disable(&user.id).await;
    let outcome = app.record(&event(&user.id)).await.unwrap();
    assert_eq!(outcome, Outcome::Recorded);
    app.assert_books_balance(1).await;
}
