use std::collections::HashMap;

use futures_util::future::join_all;
use proptest::{
    collection::vec, prelude::*, sample::subsequence, strategy::ValueTree as _,
    test_runner::TestRunner,
};
use tollkeeper::proto::tollkeeper::usage::v1::{
    BatchRecordUsageRequest, UsageEvent, UsageFailure, record_usage_response::Outcome,
    usage_result, usage_service_client::UsageServiceClient,
};
use tonic::{Code, Status, transport::Channel};
use uuid::Uuid;

use super::{at, event, refuse_model, tokens, turn_of_the_month, use_up};
use crate::harness::{TestApp, with_bearer};

pub(super) type Results = Vec<Result<Outcome, UsageFailure>>;

/// Books events as a service, over any connection.
pub(super) async fn record_batch(
    channel: &Channel,
    service_key: &str,
    events: Vec<UsageEvent>,
) -> Result<Results, Status> {
    let request = with_bearer(BatchRecordUsageRequest { events }, service_key);
    let mut usage = UsageServiceClient::new(channel.clone());
    let answer = usage.batch_record_usage(request).await?.into_inner();
    let results = answer.results.into_iter().map(|one| match one.result {
        Some(usage_result::Result::Outcome(outcome)) => Ok(outcome.try_into().unwrap()),
        Some(usage_result::Result::Failure(failure)) => Err(failure),
        None => panic!("a result without content"),
    });
    Ok(results.collect())
}

/// `RECORDED`, `DUPLICATE` or the reason of a refusal, of each.
pub(super) fn names(results: &Results) -> Vec<&str> {
    let names = results.iter().map(|result| match result {
        Ok(Outcome::Recorded) => "RECORDED",
        Ok(Outcome::Duplicate) => "DUPLICATE",
        Ok(Outcome::Unspecified) => "nothing",
        Err(failure) => failure.reason.as_str(),
    });
    names.collect()
}

impl TestApp {
    pub(super) async fn record_batch(&self, events: Vec<UsageEvent>) -> Result<Results, Status> {
        record_batch(&self.channel, &self.service_key, events).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_keeps_its_labels_however_many_differ() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for different in [1, 5, 200] {
        let labelled = |n: usize| UsageEvent {
            labels: match n % different {
                0 => HashMap::new(),
                n => [("team".to_owned(), n.to_string())].into(),
            },
            ..event(&user.id)
        };
        let events: Vec<UsageEvent> = (0..200).map(labelled).collect();
        let results = app.record_batch(events.clone()).await.unwrap();
        assert_eq!(names(&results), ["RECORDED"; 200]);
        let kept = "SELECT event_id::text, labels ->> 'team' FROM usage_records";
        let rows = app.sql(kept).await;
        let kept: HashMap<String, Option<String>> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        for event in events {
            assert_eq!(kept[&event.event_id].as_ref(), event.labels.get("team"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_of_a_batch_has_a_result_of_its_own() {
    let app = TestApp::spawn().await;
    let users = [app.user().create().await, app.user().create().await];
    let booked = event(&users[0].id);
    app.record(&booked).await.unwrap();
    let new = event(&users[1].id);
    let changed = |event: &UsageEvent| UsageEvent {
        tokens: tokens(7),
        ..event.clone()
    };
    let wrong = UsageEvent {
        model: "a model".to_owned(),
        tokens: tokens(-1),
        ..event(&users[0].id)
    };
    let results = app
        .record_batch(vec![
            new.clone(),
            booked.clone(),
            changed(&booked),
            wrong,
            event(&Uuid::now_v7().to_string()),
            new.clone(),
            changed(&new),
            event(&users[0].id),
        ])
        .await
        .unwrap();
    let expected = [
        "RECORDED",
        "DUPLICATE",
        "EVENT_CONFLICT",
        "INVALID_FIELD",
        "USER_NOT_FOUND",
        "DUPLICATE",
        "EVENT_CONFLICT",
        "RECORDED",
    ];
    assert_eq!(names(&results), expected);
    let wrong = results[3].as_ref().unwrap_err();
    let fields: Vec<_> = wrong.fields.iter().map(|one| one.field.as_str()).collect();
    assert_eq!(fields, ["model", "tokens.input"]);
    assert!(wrong.fields.iter().all(|one| !one.description.is_empty()));
    app.assert_books_balance(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_has_at_most_a_thousand_events_and_a_replay_of_it_counts_once() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let events: Vec<_> = (0..1000).map(|_| event(&user.id)).collect();
    let results = app.record_batch(events.clone()).await.unwrap();
    assert_eq!(names(&results), ["RECORDED"; 1000]);
    let results = app.record_batch(events.clone()).await.unwrap();
    assert_eq!(names(&results), ["DUPLICATE"; 1000]);
    let more = [events, vec![event(&user.id)]].concat();
    for events in [vec![], more] {
        let refused = app.record_batch(events).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    app.assert_books_balance(1000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_total_beyond_what_can_be_counted_is_refused_alone() {
    let app = TestApp::spawn().await;
    let (full, other) = (app.user().create().await, app.user().create().await);
    use_up(&app, &full.id, "gpt-x").await;
    let (_, now, ..) = turn_of_the_month();
    let of = |user: &str, input| UsageEvent {
        occurred_at: Some(at(now)),
        tokens: tokens(input),
        ..event(user)
    };
    let results = app
        .record_batch(vec![
            of(&other.id, 5),
            of(&full.id, 1000),
            of(&full.id, 500),
            of(&other.id, 6),
        ])
        .await
        .unwrap();
    let expected = ["RECORDED", "TOTAL_OUT_OF_RANGE", "RECORDED", "RECORDED"];
    assert_eq!(names(&results), expected);
    let totals = app.month(&other.id, "").await.totals.unwrap();
    assert_eq!((totals.total_tokens, totals.request_count), (11, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_the_database_refuses_fails_alone() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    refuse_model(&app, "poison").await;
    let mut events: Vec<_> = (0..50).map(|_| event(&user.id)).collect();
    for poisoned in [0, 17, 49] {
        events[poisoned].model = "poison".to_owned();
    }
    let results = app.record_batch(events.clone()).await.unwrap();
    for (index, name) in names(&results).into_iter().enumerate() {
        let expected = if [0, 17, 49].contains(&index) {
            "INTERNAL"
        } else {
            "RECORDED"
        };
        assert_eq!(name, expected, "{index}");
    }
    app.assert_books_balance(47).await;
    // Others who come at the same time do not notice.
    let poison = &events[0];
    let good: Vec<_> = (0..20).map(|_| event(&user.id)).collect();
    let calls = good
        .iter()
        .flat_map(|event| [app.record(poison), app.record(event)]);
    for outcome in join_all(calls).await.chunks(2) {
        assert_eq!(outcome[0].as_ref().unwrap_err().code(), Code::Internal);
        assert_eq!(*outcome[1].as_ref().unwrap(), Outcome::Recorded);
    }
    app.assert_books_balance(67).await;
    app.sql("DROP TRIGGER refuse_model ON usage_records").await;
    let results = app.record_batch(events).await.unwrap();
    assert_eq!(
        results
            .iter()
            .filter(|one| **one == Ok(Outcome::Recorded))
            .count(),
        3
    );
    app.assert_books_balance(70).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_taken_for_new_ones_until_a_replay_comes() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let known = event(&user.id);
    app.record(&known).await.unwrap();
    // A sequence counts also what is rolled back.
    for statement in [
        "CREATE SEQUENCE tried MINVALUE 0",
        "CREATE FUNCTION try() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM nextval('tried'); RETURN NEW; END $$",
        "CREATE TRIGGER try BEFORE INSERT ON usage_records
         FOR EACH ROW EXECUTE FUNCTION try()",
    ] {
        app.sql(statement).await;
    }
    let replica = app.replica().await;
    let tried = async |with: &[UsageEvent]| {
        let before = app.count("SELECT nextval('tried')").await;
        let batch = [&[event(&user.id), event(&user.id)], with].concat();
        let results = record_batch(&replica.channel(), &app.service_key, batch).await;
        let names = names(&results.unwrap()).join(" ");
        let after = app.count("SELECT nextval('tried')").await;
        (names, after - before - 1)
    };
    let (of_new, rows) = tried(&[]).await;
    assert_eq!((of_new.as_str(), rows), ("RECORDED RECORDED", 2));
    let known = [known];
    let (with_replay, rows) = tried(&known).await;
    assert_eq!(with_replay, "RECORDED RECORDED DUPLICATE");
    // Once until the one that was there, and once more.
    assert!((4..=6).contains(&rows), "{rows}");
    let (after_it, rows) = tried(&known).await;
    assert_eq!(
        (after_it.as_str(), rows),
        ("RECORDED RECORDED DUPLICATE", 3)
    );
    app.assert_books_balance(7).await;
}

/// Batches by the indices of their events, each over one of two replicas, and whether the next one
/// waits for its answer.
type Plan = Vec<(Vec<usize>, bool, bool)>;

#[tokio::test(flavor = "multi_thread")]
async fn batches_split_mixed_and_repeated_in_any_way_count_each_event_once() {
    const EVENTS: usize = 40;
    let app = TestApp::spawn().await;
    let (last, first, ..) = turn_of_the_month();
    let mut runner = TestRunner::default();
    let indices: Vec<usize> = (0..EVENTS).collect();
    let batch = subsequence(indices, 1..EVENTS).prop_shuffle();
    let plans = vec((batch, any::<bool>(), any::<bool>()), 1..12);
    let shapes = vec((1_i64..1000, 0..3, 0_usize..3, any::<bool>()), EVENTS);
    let mut booked = 0;
    for _ in 0..12 {
        // Replicas that have seen no replay yet take all events for new ones.
        let replicas = [app.replica().await, app.replica().await];
        let channels = replicas.each_ref().map(|replica| replica.channel());
        let plan: Plan = plans.new_tree(&mut runner).unwrap().current();
        let shapes = shapes.new_tree(&mut runner).unwrap().current();
        let mut users = Vec::new();
        for _ in 0..3 {
            users.push(app.user().create().await.id);
        }
        let events: Vec<UsageEvent> = shapes
            .into_iter()
            .map(|(amount, model, user, before)| UsageEvent {
                model: format!("model-{model}"),
                tokens: tokens(amount),
                occurred_at: Some(at(if before { last } else { first })),
                ..event(&users[user])
            })
            .collect();
        let mut recorded = [0; EVENTS];
        for together in plan.split_inclusive(|(_, _, wait)| *wait) {
            let calls = together.iter().map(|(batch, elsewhere, _)| {
                let batch = batch.iter().map(|&index| events[index].clone());
                let channel = &channels[usize::from(*elsewhere)];
                record_batch(channel, &app.service_key, batch.collect())
            });
            for ((batch, ..), results) in together.iter().zip(join_all(calls).await) {
                for (&index, result) in batch.iter().zip(results.unwrap()) {
                    recorded[index] += i64::from(result.unwrap() == Outcome::Recorded);
                }
            }
        }
        for (index, recorded) in recorded.into_iter().enumerate() {
            let sent = plan.iter().any(|(batch, ..)| batch.contains(&index));
            assert_eq!(recorded, i64::from(sent), "event {index} of {plan:?}");
            booked += recorded;
        }
        app.assert_books_balance(booked).await;
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(app.count(deadlocks).await, 0);
}
