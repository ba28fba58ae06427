use std::time::Duration;

use futures_util::future::join_all;
use proptest::{collection::vec, prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use tokio::task::JoinSet;
use tollkeeper::proto::tollkeeper::usage::v1::{
    TokenCounts, UsageEvent, record_usage_response::Outcome,
};

use super::{at, event, record_through, turn_of_the_month};
use crate::harness::TestApp;

const TASKS: usize = 64;
const USERS: usize = 3;
const MODELS: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn sums_hold_under_load_over_two_replicas() {
    // Waits, rather than failing, on a busy machine: what counts here are the books.
    let patient = Duration::from_secs(60);
    let app = TestApp::spawn_with(|settings| settings.database.acquire_timeout = patient).await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let mut users = Vec::new();
    for _ in 0..USERS {
        users.push(app.user().create().await.id);
    }
    let (last, first, ..) = turn_of_the_month();
    // Two tasks are given each event, and neither in the order of the other.
    let mut events: Vec<UsageEvent> = (0..TASKS * 5)
        .map(|n| UsageEvent {
            occurred_at: Some(at(if n % 5 == 0 { last } else { first })),
            model: format!("model-{}", n % MODELS),
            tokens: counts(i64::try_from(n).unwrap() + 1),
            ..event(&users[n / MODELS % USERS])
        })
        .collect();
    let distinct = i64::try_from(events.len()).unwrap();
    events.extend(events.clone());
    let order = shuffled(events.len());
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let channel = channels[task % channels.len()].clone();
        let key = app.service_key.clone();
        let mine: Vec<UsageEvent> = order
            .iter()
            .skip(task)
            .step_by(TASKS)
            .map(|&index| events[index].clone())
            .collect();
        tasks.spawn(async move {
            let mut recorded = 0;
            for event in &mine {
                if record_through(&channel, &key, event).await.unwrap() == Outcome::Recorded {
                    recorded += 1;
                }
            }
            recorded
        });
    }
    let recorded: i64 = tasks.join_all().await.into_iter().sum();
    assert_eq!(recorded, distinct);
    app.assert_books_balance(distinct).await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(app.count(deadlocks).await, 0);
}

/// One delivery: which event, over which replica, and whether the next waits for its answer.
type Delivery = (usize, bool, bool);

#[tokio::test(flavor = "multi_thread")]
async fn any_replays_in_any_order_count_each_event_once() {
    const EVENTS: usize = 6;
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let (last, first, ..) = turn_of_the_month();
    let mut runner = TestRunner::default();
    let deliveries = vec((0..EVENTS, any::<bool>(), any::<bool>()), 1..30);
    let plans = (deliveries, vec((1_i64..1000, 0..3, any::<bool>()), EVENTS));
    let mut booked = 0;
    for _ in 0..8 {
        let (deliveries, shapes): (Vec<Delivery>, Vec<(i64, i32, bool)>) =
            plans.new_tree(&mut runner).unwrap().current();
        let user = app.user().create().await;
        let events: Vec<UsageEvent> = shapes
            .iter()
            .map(|(amount, model, before)| UsageEvent {
                model: format!("model-{model}"),
                tokens: counts(*amount),
                occurred_at: Some(at(if *before { last } else { first })),
                ..event(&user.id)
            })
            .collect();
        let mut recorded = [0; EVENTS];
        for together in deliveries.split_inclusive(|(_, _, wait)| *wait) {
            let calls = together.iter().map(|(index, elsewhere, _)| {
                let channel = &channels[usize::from(*elsewhere)];
                record_through(channel, &app.service_key, &events[*index])
            });
            for ((index, ..), outcome) in together.iter().zip(join_all(calls).await) {
                recorded[*index] += i64::from(outcome.unwrap() == Outcome::Recorded);
            }
        }
        for (index, recorded) in recorded.into_iter().enumerate() {
            let sent = deliveries.iter().any(|(delivered, ..)| *delivered == index);
            assert_eq!(recorded, i64::from(sent), "event {index} of {deliveries:?}");
            booked += recorded;
        }
        app.assert_books_balance(booked).await;
    }
}

fn counts(amount: i64) -> Option<TokenCounts> {
    Some(TokenCounts {
        input: amount,
        output: amount * 2,
        cached_input: amount % 3,
        cache_write: amount % 5,
        reasoning: amount % 7,
    })
}

/// The numbers below `count` in an order without a pattern.
fn shuffled(count: usize) -> Vec<usize> {
    let order = Just((0..count).collect::<Vec<_>>()).prop_shuffle();
    let mut runner = TestRunner::deterministic();
    order.new_tree(&mut runner).unwrap().current()
}
