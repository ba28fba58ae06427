//! What becomes of events when Postgres cannot write, callers vanish or too many come.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tollkeeper::proto::tollkeeper::usage::v1::{UsageEvent, record_usage_response::Outcome};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    batch::{names, record_batch},
    event, record_through,
};
use crate::{
    harness::{Blocker, TestApp, cluster, eventually, reason},
    ops::scrape,
    outage::assert_database_unavailable,
};

const DISK_FULL: (&str, &str) = (
    "53100",
    "could not extend file \"base/16384/16402\": No space left on device",
);
const DEADLOCK: (&str, &str) = ("40P01", "deadlock detected");
const SERIALIZATION: (&str, &str) = (
    "40001",
    "could not serialize access due to concurrent update",
);

/// Attempts of the service at one batch.
const ATTEMPTS: i64 = 3;

/// Lets the next `times` statements that book fail as Postgres would say it.
async fn fail(app: &TestApp, (state, message): (&str, &str), times: i64) {
    // Sequences are not rolled back: they count what failed too.
    for statement in [
        "CREATE SEQUENCE IF NOT EXISTS booking",
        "ALTER SEQUENCE booking RESTART",
        &format!(
            "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF nextval('booking') <= {times} THEN
                     RAISE EXCEPTION USING ERRCODE = '{state}', MESSAGE = '{message}';
                 END IF;
                 RETURN NULL;
             END $$"
        ),
        "CREATE OR REPLACE TRIGGER fail AFTER INSERT ON usage_records
             FOR EACH STATEMENT EXECUTE FUNCTION fail()",
    ] {
        app.sql(statement).await;
    }
}

async fn statements(app: &TestApp) -> i64 {
    app.count("SELECT last_value FROM booking").await
}

async fn events(app: &TestApp, count: usize) -> Vec<UsageEvent> {
    let user = app.user().create().await;
    (0..count).map(|_| event(&user.id)).collect()
}

/// Sends the events by each of the three RPCs; their errors.
async fn refusals(app: &TestApp, events: &[UsageEvent]) -> Vec<Status> {
    let mut stream = app.stream().await;
    stream.send(0, events).await;
    let (acknowledged, end) = stream.end().await;
    assert_eq!(acknowledged, 0);
    vec![
        app.record(&events[0]).await.unwrap_err(),
        app.record_batch(events.to_vec()).await.unwrap_err(),
        end.unwrap_err(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_unavailable_and_what_is_repeated_once_there_is_room_counts_once() {
    let app = TestApp::spawn().await;
    let events = events(&app, 30).await;
    app.record_batch(events[..10].to_vec()).await.unwrap();
    fail(&app, DISK_FULL, i64::MAX).await;
    for status in refusals(&app, &events[10..]).await {
        assert_database_unavailable(&status);
        let says = format!("{status:?}");
        assert!(!says.contains("space") && !says.contains("base/"), "{says}");
    }
    app.assert_books_balance(10).await;
    app.sql("DROP TRIGGER fail ON usage_records").await;
    let results = app.record_batch(events.clone()).await.unwrap();
    assert_eq!(names(&results)[..10], ["DUPLICATE"; 10]);
    assert_eq!(names(&results)[10..], ["RECORDED"; 20]);
    app.assert_books_balance(30).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlocks_and_serialization_failures_are_repeated_unseen() {
    let app = TestApp::spawn().await;
    let events = events(&app, 30).await;
    let mut booked = 0;
    for (events, fault) in events.chunks(10).zip([DEADLOCK, SERIALIZATION, DISK_FULL]) {
        fail(&app, fault, ATTEMPTS - 1).await;
        assert_eq!(app.record(&events[0]).await.unwrap(), Outcome::Recorded);
        assert_eq!(statements(&app).await, ATTEMPTS);

        fail(&app, fault, ATTEMPTS - 1).await;
        let results = app.record_batch(events[1..6].to_vec()).await.unwrap();
        assert_eq!(names(&results), ["RECORDED"; 5]);
        assert_eq!(statements(&app).await, ATTEMPTS);

        fail(&app, fault, ATTEMPTS - 1).await;
        let mut stream = app.stream().await;
        stream.send(0, &events[6..]).await;
        let all = stream.until(4).await.unwrap();
        assert_eq!((all.recorded, all.failures.len()), (4, 0));
        assert_eq!(statements(&app).await, ATTEMPTS);
        booked += 10;
        app.assert_books_balance(booked).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_that_do_not_end_are_told_and_the_next_call_is_taken_afresh() {
    let app = TestApp::spawn().await;
    let events = events(&app, 10).await;
    for fault in [DEADLOCK, SERIALIZATION] {
        fail(&app, fault, 3 * ATTEMPTS).await;
        for status in refusals(&app, &events).await {
            assert_database_unavailable(&status);
        }
        assert_eq!(statements(&app).await, 3 * ATTEMPTS);
        app.assert_books_balance(0).await;
    }
    let results = app.record_batch(events).await.unwrap();
    assert_eq!(names(&results), ["RECORDED"; 10]);
    app.assert_books_balance(10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_past_its_deadline_is_told_and_its_event_is_booked() {
    let app = TestApp::spawn_with(|settings| {
        settings.server.max_deadline = Duration::from_secs(1);
    })
    .await;
    let events = events(&app, 2).await;
    let blocker = Blocker::lock(&app, "usage_records").await;
    // Of the first one the user has to be looked up; both wait for the ledger then.
    for event in &events {
        let status = app.record(event).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert_eq!(reason(&status), "DEADLINE_EXCEEDED");
    }
    blocker.release().await;
    let booked = "SELECT count(*) FROM usage_records";
    eventually("both are booked", async || app.count(booked).await == 2).await;
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_deadlock_costs_attempts_and_nothing_else() {
    let app = TestApp::spawn().await;
    let mut users = [app.user().create().await.id, app.user().create().await.id];
    users.sort();
    for user in &users {
        app.record(&event(user)).await.unwrap();
    }
    let [first, second] = users.each_ref().map(|user| {
        format!("UPDATE monthly_model_usage SET month = month WHERE user_id = '{user}'")
    });
    // Postgres looks for a deadlock once in each wait, a second after it began: the one that closes the
    // circle has to be that of the service. Two are in its way; the other one is patient itself.
    let hold = "SELECT FROM monthly_model_usage ORDER BY user_id LIMIT 1 FOR UPDATE";
    let gate = Blocker::begin(&app, hold).await;
    let client = cluster::connect(&app.database_url).await;
    client
        .batch_execute(&format!("SET deadlock_timeout = '60s'; BEGIN; {second}"))
        .await
        .unwrap();
    let both: Vec<_> = users.iter().map(|user| event(user)).collect();
    let (channel, key, events) = (app.channel.clone(), app.service_key.clone(), both.clone());
    let call = tokio::spawn(async move { record_batch(&channel, &key, events).await });
    gate.hold_up(&app, 1).await;
    let client = tokio::spawn(async move {
        client
            .batch_execute(&format!("{first}; COMMIT"))
            .await
            .unwrap();
    });
    gate.hold_up(&app, 2).await;
    // The service gets the first user's row, and then waits for the second's.
    gate.release().await;
    client.await.unwrap();
    // Two single events before.
    let batches = match call.await.unwrap() {
        Ok(results) => {
            assert_eq!(names(&results), ["RECORDED"; 2]);
            3.0
        }
        // It takes Postgres a second to see a deadlock.
        Err(status) => {
            assert_database_unavailable(&status);
            let results = app.record_batch(both).await.unwrap();
            assert_eq!(names(&results), ["RECORDED"; 2]);
            4.0
        }
    };
    let metrics = scrape(app.ops_address).await;
    let written = metrics["tollkeeper_usage_batches_total"];
    assert_eq!(written, batches, "no event was taken for poison");
    app.assert_books_balance(4).await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    // Or more: an attempt that is quicker than the other, who is just woken, meets it once more.
    eventually("it was one", async || app.count(deadlocks).await >= 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_event_fails_alone_whichever_way_it_comes() {
    let app = TestApp::spawn().await;
    app.sql("ALTER TABLE usage_records ADD CHECK (model <> 'poison')")
        .await;
    let mut events = events(&app, 40).await;
    for poisoned in [3, 20, 39] {
        events[poisoned].model = "poison".to_owned();
    }
    let is_poison = |index: usize| [3, 20, 39].contains(&index);
    // All of them wait for one batch.
    let blocker = Blocker::lock(&app, "monthly_model_usage").await;
    let calls: Vec<_> = events
        .iter()
        .map(|event| {
            let (channel, key, event) =
                (app.channel.clone(), app.service_key.clone(), event.clone());
            tokio::spawn(async move { record_through(&channel, &key, &event).await })
        })
        .collect();
    let backlog = || {
        let (waiting, writing) = app.running().usage.backlog();
        waiting + writing
    };
    eventually("all are there", async || backlog() >= 37).await;
    blocker.release().await;
    for (index, outcome) in join_all(calls).await.into_iter().enumerate() {
        match outcome.unwrap() {
            Ok(outcome) => assert!(!is_poison(index) && outcome == Outcome::Recorded),
            Err(status) => {
                assert!(is_poison(index), "{index}: {status:?}");
                assert_eq!(reason(&status), "INTERNAL");
            }
        }
    }
    app.assert_books_balance(37).await;
    let mut stream = app.stream().await;
    stream.send(0, &events).await;
    let all = stream.until(40).await.unwrap();
    assert_eq!((all.recorded, all.duplicates), (0, 37));
    let failed: Vec<_> = all.failures.iter().map(|one| one.offset).collect();
    assert_eq!(failed, [3, 20, 39]);
    app.assert_books_balance(37).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_and_streams_dropped_at_any_moment_count_each_event_once() {
    const ROUNDS: usize = 30;
    let app = TestApp::spawn().await;
    let events = events(&app, ROUNDS * 20).await;
    for (round, events) in (0_u32..).zip(events.chunks(20)) {
        let (channel, key) = (app.channel.clone(), app.service_key.clone());
        let patience = Duration::from_micros(u64::from(round % 10 * round) * 100);
        if round % 2 == 0 {
            let call = record_batch(&channel, &key, events.to_vec());
            let _ = timeout(patience, call).await;
        } else {
            let mut stream = app.stream().await;
            stream.send(0, &events[..10]).await;
            stream.send(10, &events[10..]).await;
            let _ = timeout(patience, stream.until(20)).await;
        }
        // The same once more, while the first may still be on its way.
        if round % 3 == 0 {
            let results = app.record_batch(events.to_vec()).await.unwrap();
            assert!(results.iter().all(Result::is_ok), "{:?}", names(&results));
        }
    }
    for events in events.chunks(500) {
        let results = app.record_batch(events.to_vec()).await.unwrap();
        assert!(results.iter().all(Result::is_ok), "{:?}", names(&results));
    }
    app.assert_books_balance(ROUNDS as i64 * 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_may_wait_is_refused_at_once_and_not_booked() {
    const ROOM: usize = 12;
    let app = TestApp::spawn_with(|settings| settings.usage.queue_events = ROOM).await;
    let events = events(&app, ROOM + 20).await;
    let (taken, refused) = events.split_at(ROOM);
    // Known, so that nothing but the queue is in the way.
    let blocker = Blocker::lock(&app, "usage_records").await;
    let calls: Vec<_> = taken
        .iter()
        .map(|event| {
            let (channel, key, event) =
                (app.channel.clone(), app.service_key.clone(), event.clone());
            tokio::spawn(async move { record_through(&channel, &key, &event).await })
        })
        .collect();
    let backlog = || {
        let (waiting, writing) = app.running().usage.backlog();
        waiting + writing
    };
    eventually("the queue is full", async || backlog() == ROOM).await;
    let mut stream = app.stream().await;
    stream.send(0, &refused[..5]).await;
    for _ in 0..3 {
        let at_once = Duration::from_secs(5);
        let one = timeout(at_once, app.record(&refused[5])).await.unwrap();
        let many = timeout(at_once, app.record_batch(refused[6..].to_vec()))
            .await
            .unwrap();
        for status in [one.unwrap_err(), many.unwrap_err()] {
            assert_eq!(status.code(), Code::ResourceExhausted);
            assert_eq!(reason(&status), "OVERLOADED");
            let retry = status.get_details_retry_info().expect("RetryInfo");
            assert!(retry.retry_delay.expect("a delay") > Duration::ZERO);
        }
    }
    blocker.release().await;
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), Outcome::Recorded);
    }
    // A stream is not refused: it waited.
    assert_eq!(stream.until(5).await.unwrap().recorded, 5);
    app.assert_books_balance(ROOM as i64 + 5).await;
    eventually("there is room again", async || backlog() == 0).await;
    let results = app
        .record_batch(refused[5..].to_vec()[..ROOM].to_vec())
        .await
        .unwrap();
    assert_eq!(names(&results), ["RECORDED"; ROOM]);
    app.assert_books_balance(2 * ROOM as i64 + 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_full_queue_are_booked_by_callers_that_come_back_when_told() {
    let app = TestApp::spawn_with(|settings| settings.usage.queue_events = 8).await;
    let events = events(&app, 200).await;
    let calls = events.iter().map(|event| {
        let (app, mut refused) = (&app, 0_u32);
        async move {
            loop {
                match app.record(event).await {
                    Ok(Outcome::Recorded) => return refused,
                    Ok(other) => panic!("{other:?}"),
                    Err(status) => {
                        assert_eq!(reason(&status), "OVERLOADED");
                        let told = status.get_details_retry_info().unwrap().retry_delay;
                        refused += 1;
                        sleep(told.unwrap()).await;
                    }
                }
            }
        }
    });
    let refused: u32 = join_all(calls).await.into_iter().sum();
    assert!(refused > 0, "the queue was never full");
    app.assert_books_balance(200).await;
}
