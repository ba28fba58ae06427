use chrono::TimeDelta;
use futures_util::future::join_all;
use tollkeeper::proto::tollkeeper::usage::v1::{UsageEvent, record_usage_response::Outcome};
use tonic::{Code, transport::Channel};
use uuid::Uuid;

use super::{at, event, record_through, tokens, turn_of_the_month};
use crate::harness::{TestApp, TestUser, reason};

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_counts_once() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let event = event(&user.id);
    assert_eq!(app.record(&event).await.unwrap(), Outcome::Recorded);
    for _ in 0..3 {
        assert_eq!(app.record(&event).await.unwrap(), Outcome::Duplicate);
    }
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_racing_replays_count_once() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let channels = [app.channel.clone()];
    assert_one_of_fifty_is_recorded(&app, &user, &channels).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_racing_replays_over_two_replicas_count_once() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let channels = [app.channel.clone(), replica.channel()];
    assert_one_of_fifty_is_recorded(&app, &user, &channels).await;
}

async fn assert_one_of_fifty_is_recorded(app: &TestApp, user: &TestUser, channels: &[Channel]) {
    let event = event(&user.id);
    let calls = (0..50).map(|n| {
        let channel = &channels[n % channels.len()];
        record_through(channel, &app.service_key, &event)
    });
    let outcomes: Vec<Outcome> = join_all(calls)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let recorded = outcomes.iter().filter(|o| **o == Outcome::Recorded);
    assert_eq!(recorded.count(), 1);
    let duplicates = outcomes.iter().filter(|o| **o == Outcome::Duplicate);
    assert_eq!(duplicates.count(), 49);
    app.assert_books_balance(1).await;
}

/// What makes another payload of an event.
type Change = fn(&mut UsageEvent);

#[tokio::test(flavor = "multi_thread")]
async fn an_event_id_with_another_payload_conflicts_and_books_nothing() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    // Away from both ends of the month, so that a change of time stays in it.
    let (_, first, ..) = turn_of_the_month();
    let booked = UsageEvent {
        occurred_at: Some(at(first)),
        ..event(&user.id)
    };
    app.record(&booked).await.unwrap();
    let changes: [(&str, Change); 11] = [
        ("occurred_at", |e| {
            e.occurred_at.as_mut().unwrap().nanos = 1000;
        }),
        ("model", |e| e.model.push('!')),
        ("model's case", |e| e.model.make_ascii_uppercase()),
        ("input", |e| e.tokens.as_mut().unwrap().input += 1),
        ("output", |e| e.tokens.as_mut().unwrap().output += 1),
        ("cached_input", |e| {
            e.tokens.as_mut().unwrap().cached_input += 1;
        }),
        ("cache_write", |e| {
            e.tokens.as_mut().unwrap().cache_write += 1
        }),
        ("reasoning", |e| e.tokens.as_mut().unwrap().reasoning += 1),
        ("request_id", |e| e.request_id.clear()),
        ("a label's value", |e| {
            e.labels.insert("team".to_owned(), "red".to_owned());
        }),
        ("a label more", |e| {
            e.labels.insert("feature".to_owned(), String::new());
        }),
    ];
    for (field, change) in changes {
        let mut other = booked.clone();
        change(&mut other);
        assert_ne!(other, booked, "{field}");
        let refused = app.record(&other).await.expect_err(field);
        assert_eq!(refused.code(), Code::AlreadyExists, "{field}");
        assert_eq!(reason(&refused), "EVENT_CONFLICT", "{field}");
    }
    app.assert_books_balance(1).await;
    let totals = app.month(&user.id, "").await.totals.unwrap();
    assert_eq!(totals.tokens, booked.tokens);
    assert_eq!(app.record(&booked).await.unwrap(), Outcome::Duplicate);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_racing_payloads_with_one_event_id_one_is_booked() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let first = event(&user.id);
    let second = UsageEvent {
        tokens: tokens(7),
        ..first.clone()
    };
    let replica = replica.channel();
    let calls = (0..20).map(|n| {
        let (channel, event) = if n % 2 == 0 {
            (&app.channel, &first)
        } else {
            (&replica, &second)
        };
        record_through(channel, &app.service_key, event)
    });
    let (mut recorded, mut duplicates, mut conflicts) = (0, 0, 0);
    for outcome in join_all(calls).await {
        match outcome {
            Ok(Outcome::Recorded) => recorded += 1,
            Ok(_) => duplicates += 1,
            Err(status) => {
                assert_eq!(reason(&status), "EVENT_CONFLICT");
                conflicts += 1;
            }
        }
    }
    assert_eq!((recorded, duplicates, conflicts), (1, 9, 10));
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_id_in_another_month_is_another_event() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (last, first, ..) = turn_of_the_month();
    let mut event = event(&user.id);
    for instant in [last, first] {
        event.occurred_at = Some(at(instant));
        assert_eq!(app.record(&event).await.unwrap(), Outcome::Recorded);
    }
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_id_of_another_user_is_another_event() {
    let app = TestApp::spawn().await;
    let event_id = Uuid::now_v7().to_string();
    for _ in 0..2 {
        let user = app.user().create().await;
        let event = UsageEvent {
            event_id: event_id.clone(),
            ..event(&user.id)
        };
        assert_eq!(app.record(&event).await.unwrap(), Outcome::Recorded);
    }
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_id_means_the_same_in_either_case() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut event = event(&user.id);
    app.record(&event).await.unwrap();
    event.event_id.make_ascii_uppercase();
    event.user_id.make_ascii_uppercase();
    assert_eq!(app.record(&event).await.unwrap(), Outcome::Duplicate);
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nanoseconds_are_no_difference() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut event = event(&user.id);
    let nanos = event.occurred_at.unwrap().nanos;
    app.record(&event).await.unwrap();
    for more in [1, 500, 999] {
        event.occurred_at.as_mut().unwrap().nanos = nanos + more;
        assert_eq!(app.record(&event).await.unwrap(), Outcome::Duplicate);
    }
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_with_another_time_in_the_month_conflicts() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (_, first, ..) = turn_of_the_month();
    let mut event = event(&user.id);
    event.occurred_at = Some(at(first));
    app.record(&event).await.unwrap();
    event.occurred_at = Some(at(first + TimeDelta::microseconds(1)));
    let refused = app.record(&event).await.unwrap_err();
    assert_eq!(reason(&refused), "EVENT_CONFLICT");
}
